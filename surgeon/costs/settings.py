"""Settings of a step: the validated arguments of `cost`, and values derived from them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.errors import ConfigError, InputError
from surgeon.sites.inputs import Inputs, given_inputs
from surgeon.util.parse import parse_input_size

Mode = Literal["train", "infer"]
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
LossFunction = Callable[[Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a step: everything but the model."""

    input_size: tuple[int, int, int]
    batch_size: int
    mode: Mode = "train"
    optimizer: str | OptimizerFactory = "sgd"
    weight_decay: float = 1e-4
    amp: torch.dtype | None = None
    channels_last: bool = False
    accumulate: int = 1
    checkpointing: bool = False
    loss: LossFunction | None = None
    inputs: Inputs | None = None  # the model's arguments, instead of images


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float], torch.optim.Optimizer]] = {
    "sgd": lambda p, wd: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=wd, foreach=True),
    "sgd-plain": lambda p, wd: torch.optim.SGD(p, lr=0.1, weight_decay=wd, foreach=True),
    "adam": lambda p, wd: torch.optim.Adam(p, weight_decay=wd, foreach=True),
    "adamw": lambda p, wd: torch.optim.AdamW(p, weight_decay=wd, foreach=True),
}
_ALIASES = {"momentum": "sgd", "sgd-momentum": "sgd"}
_AMP = {"float16": torch.float16, "fp16": torch.float16, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}


def make_settings(model: nn.Module, *, input_size: Any, batch_size: int, amp: bool | str, **rest: Any) -> Settings:
    """Validate the arguments of `cost`; raises `ConfigError`."""
    for name, value in (("batch_size", batch_size), ("accumulate", rest.get("accumulate", 1))):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be an integer >= 1, got {value!r}")
    mode, optimizer = rest.get("mode", "train"), rest.get("optimizer", "sgd")
    if mode not in ("train", "infer"):
        raise ConfigError(f"mode must be 'train' or 'infer', got {mode!r}")
    if isinstance(optimizer, str):
        rest["optimizer"] = optimizer = _ALIASES.get(optimizer.lower(), optimizer.lower())
        if optimizer not in OPTIMIZERS:
            raise ConfigError(
                f"unknown optimizer {optimizer!r}; expected {', '.join(OPTIMIZERS)}, or a function "
                "that creates one from the parameters"
            )
    if isinstance(amp, str) and amp.lower() not in _AMP:
        raise ConfigError(f"amp must be a bool or one of {', '.join(_AMP)}, got {amp!r}")
    if rest.get("checkpointing") and not hasattr(model, "set_grad_checkpointing"):
        raise ConfigError(f"{type(model).__name__} has no set_grad_checkpointing, so checkpointing is not available")
    dtype = _AMP[amp.lower()] if isinstance(amp, str) else torch.float16 if amp else None
    example = rest.pop("example_inputs", None)
    if example is None:
        return Settings(input_size=image_size(model, input_size), batch_size=batch_size, amp=dtype, **rest)
    if input_size is not None or batch_size != 1:
        raise ConfigError("example_inputs already define size and batch: leave out input_size and batch_size")
    inputs = given_inputs(example)
    images = (
        arg.shape[1:] for arg in (*inputs.args, *inputs.kwargs.values()) if isinstance(arg, Tensor) and arg.dim() == 4
    )
    size = next(((int(c), int(h), int(w)) for c, h, w in images), image_size(model, None))
    return Settings(input_size=size, batch_size=inputs.batch, amp=dtype, inputs=inputs, **rest)


def image_size(model: nn.Module, given: Any) -> tuple[int, int, int]:
    """(C, H, W) of one image: as given, else from the model's `pretrained_cfg`, else 224."""
    config = getattr(model, "pretrained_cfg", None) or {}
    own = tuple(config.get("input_size") or ())
    sizes = parse_input_size(given) if given is not None else own or (224,)
    if len(sizes) == 3:
        return (sizes[0], sizes[1], sizes[2])
    first = next((m for m in model.modules() if hasattr(m, "in_channels") and hasattr(m, "kernel_size")), None)
    channels = int(str(first.in_channels)) if first is not None else own[0] if own else 3
    return (channels, sizes[0], sizes[-1])


def image_dtype(model: nn.Module) -> torch.dtype:
    """The model's dtype: a half-precision model's images take half the memory."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def make_optimizer(settings: Settings, parameters: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    """The optimizer over these parameters; None if there are none."""
    if not parameters:
        return None
    if isinstance(settings.optimizer, str):
        return OPTIMIZERS[settings.optimizer](parameters, settings.weight_decay)
    return settings.optimizer(parameters)


def default_loss(out: Any) -> Tensor:
    """Cross-entropy for (N, K), otherwise the mean square against a target of the same shape; summed over all outputs."""
    terms = []
    for tensor in _outputs(out):
        if tensor.dim() == 2 and tensor.shape[1] > 1:
            terms.append(F.cross_entropy(tensor, torch.zeros(len(tensor), dtype=torch.long, device=tensor.device)))
        else:
            terms.append(F.mse_loss(tensor.float(), torch.zeros_like(tensor, dtype=torch.float32)))
    if not terms:
        raise InputError(
            "the model's output contains no floating-point tensor that depends on its parameters; give a loss"
        )
    return torch.stack(terms).sum() if len(terms) > 1 else terms[0]


def _outputs(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        if out.is_floating_point() and out.requires_grad:
            yield out
    elif isinstance(out, dict):
        for value in out.values():
            yield from _outputs(value)
    elif isinstance(out, list | tuple):
        for value in out:
            yield from _outputs(value)


def optimizer_name(settings: Settings) -> str | None:
    """Name of the optimizer for display; None for inference."""
    if settings.mode == "infer":
        return None
    return (
        settings.optimizer if isinstance(settings.optimizer, str) else getattr(settings.optimizer, "__name__", "custom")
    )
