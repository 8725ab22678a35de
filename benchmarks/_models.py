"""Library models of the coverage matrix, how to build them, and inputs that they accept."""

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks._results import ROOT

CHOICE = ROOT / "benchmarks" / "coverage_models.json"
# Beyond one model a family: what is known to be awkward (standardized weights, TensorFlow's padding, sliced weights, …).
AWKWARD = (
    *("convnext_atto", "dm_nfnet_f0", "mobilevitv2_050", "mobilenetv2_100", "resnet50", "resnetv2_50x1_bit"),
    *("tf_efficientnet_b0", "vit_small_r26_s32_224"),
)
SIZES = (64, 96, 128, 160, 192, 224, 256, 299, 384)
BATCH = 2
ASLEEP = 1e-3  # the largest weight of a layer that makes kernels and has not been trained
KINDS = ("classification", "segmentation", "detection", "video", "optical_flow")


@dataclass(frozen=True)
class Case:
    """A model of the matrix: `library` is timm or torchvision, `kind` what it does, `family` its module."""

    library: str
    kind: str
    family: str
    name: str

    @property
    def key(self) -> str:
        return f"{self.library}/{self.name}"


def spatial_convolutions(model: nn.Module) -> list[str]:
    """Names of the convolutions with k >= 2; a module that has two names counts once."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]


# --- the choice -------------------------------------------------------------------------------------------------------


def timm_families(cache: Path = CHOICE) -> dict[str, Any]:
    """By module of timm.models: the smallest model (by parameters) that has spatial convolutions, or why there is none.

    timm's toys for its own tests (`test_…`) do not count. Every model is built once, on the meta device; the
    choice is kept in a small JSON for this version of timm.
    """
    if cache.is_file():
        kept = json.loads(cache.read_text())
        if kept["timm"] == timm.__version__:
            return dict(kept["families"])
    families = {
        module: _smallest(timm.list_models(module=module)) for module in tqdm(_modules(), desc="families", disable=None)
    }
    cache.write_text(json.dumps({"timm": timm.__version__, "families": families}, indent=1) + "\n")
    return families


def _modules() -> list[str]:
    return [module for module in timm.list_modules() if timm.list_models(module=module)]


def _smallest(names: list[str]) -> dict[str, Any]:
    sizes: list[tuple[int, str]] = []
    for name in (name for name in names if not name.startswith("test_")):
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = timm.create_model(name)
        if spatial_convolutions(model):
            sizes.append((sum(p.numel() for p in model.parameters()), name))
    if not sizes:
        return {"model": None, "reason": f"no spatial convolutions in its {len(names)} models"}
    parameters, name = min(sizes)
    return {"model": name, "parameters": parameters, "of": len(names)}


def cases(*, every: bool = False) -> list[Case]:
    """timm's families (or every timm model) and all torchvision models, in a fixed order."""
    if every:
        chosen = [Case("timm", "classification", m, n) for m in _modules() for n in timm.list_models(module=m)]
    else:
        chosen = [
            Case("timm", "classification", module, found["model"])
            for module, found in timm_families().items()
            if found["model"]
        ]
        families = {name: module for module in _modules() for name in timm.list_models(module=module)}
        chosen += [Case("timm", "classification", families[n], n) for n in AWKWARD if n not in {c.name for c in chosen}]
    return chosen + list(_torchvision_cases())


def _torchvision_cases() -> Iterator[Case]:
    for kind in KINDS:
        module = torchvision.models if kind == "classification" else getattr(torchvision.models, kind)
        for name in torchvision.models.list_models(module=module):
            builder = torchvision.models.get_model_builder(name)
            family = builder.__module__.rsplit(".", 1)[-1]
            yield Case("torchvision", kind, family, name)


# --- building ---------------------------------------------------------------------------------------------------------


def build(case: Case) -> nn.Module:
    """The model with random weights in which no part is switched off (see `awaken`), in eval mode."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if case.library == "timm":
            model: nn.Module = timm.create_model(case.name)
        else:
            model = torchvision.models.get_model(case.name, weights=None, **_torchvision_options(case))
    awaken(model)
    return model.eval()


def _torchvision_options(case: Case) -> dict[str, Any]:
    if case.kind == "segmentation":
        return {"weights_backbone": None} | ({} if case.family == "lraspp" else {"aux_loss": True})
    if case.kind == "detection":
        sized = {} if case.name.startswith("ssd") else {"min_size": 128, "max_size": 192}
        # of 1000, 2000
        few = {f"rpn_post_nms_top_n_{mode}": 50 for mode in ("train", "test")} if "rcnn" in case.name else {}
        return {"weights_backbone": None} | sized | few
    return {"init_weights": False} if case.family in ("googlenet", "inception") else {}


def awaken(model: nn.Module) -> None:
    """Give weight to what starts at nothing: zero-initialized norms, gates and layer scales.

    A fresh residual network is often the identity in every block, so that an error in a block would not be seen.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.numel() < 2 or not bool((parameter == parameter.flatten()[0]).all()):
                continue
            if name.endswith("bias"):
                parameter.uniform_(-0.1, 0.1)
            else:
                level = abs(float(parameter.flatten()[0]))
                parameter.uniform_(0.5, 1.5).mul_(level if level > 0.1 else 0.2)


def awaken_kernels(model: nn.Module, std: float = 0.02) -> None:
    """Give random weights to the matrices and convolutions that start at or near nothing: what makes kernels and offsets.

    `awaken` would make all of their elements positive.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.numel() and float(parameter.abs().max()) < ASLEEP:
                parameter.normal_(std=std)


def settle_norms(model: nn.Module, run: Callable[[], object]) -> None:
    """Give batch norms the statistics of what they get in `run`, a pass of one batch, their variance evened out over the channels.

    Each uses its new ones at once, so that those behind it see what they will see later. `run` says what else is in train mode;
    ends in eval mode.

    With the neutral ones of a fresh network the signal of many architectures dies on its way, and with it any error. Variances
    by channel, of so few values, would now and then be next to nothing and magnify rounding.
    """

    def settle(norm: nn.Module, args: tuple[Any, ...]) -> None:
        norm.eval()
        values = args[0].transpose(0, 1).flatten(1)
        variance = float(values.var(1, correction=0).mean())
        spread = torch.empty_like(norm.running_var).uniform_(0.5, 1.5)
        norm.running_mean.copy_(values.mean(1))
        norm.running_var.copy_((variance or 1.0) * spread)

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_var is not None]
    hooks = [norm.register_forward_pre_hook(settle) for norm in norms]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run()
    for hook in hooks:
        hook.remove()
    model.eval()


def sensitivity(model: nn.Module, case: Case, size: int) -> float:
    """Relative change of the output where the weights of all spatial convolutions change by a tenth.

    Far below 0.1 the output says little about the convolutions; then only the errors of the layers do.
    """
    args = inputs(model, case, size)
    names = spatial_convolutions(model)
    state = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    with torch.no_grad():
        before = tensors(model(*args))
        for name in names:
            weight = model.get_submodule(name).weight
            weight.mul_(1 + 0.1 * torch.randn_like(weight))
        after = tensors(model(*args))
        for name, weight in state.items():
            model.get_submodule(name).weight.copy_(weight)
    return max((relative_change(a, b) for a, b in zip(before, after, strict=False)), default=0.0)


def relative_change(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value of a; 1 where the shapes differ (another number of detections)."""
    if a.shape != b.shape:
        return 1.0
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) if a.numel() else 0.0


# --- inputs -----------------------------------------------------------------------------------------------------------


def inputs(model: nn.Module, case: Case, size: int, seed: int = 0) -> tuple[Any, ...]:
    """Arguments of one call in eval mode, batch 2."""
    generator = torch.Generator().manual_seed(seed)

    def image(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    if case.kind == "detection":
        return ([image(3, size, size), image(3, size, size + 32)],)
    if case.kind == "video":
        return (image(BATCH, 3, 16, size, size),)
    if case.kind == "optical_flow":
        return (image(BATCH, 3, size, size) * 2 - 1, image(BATCH, 3, size, size) * 2 - 1)
    channels = model.pretrained_cfg.get("input_size", (3,))[0] if case.library == "timm" else 3
    return (image(BATCH, channels, size, size) * 2 - 1,)


def smallest_size(model: nn.Module, case: Case) -> int:
    """The smallest of `SIZES`, and of its own size, that the model takes in eval and in train mode."""
    own = {model.pretrained_cfg["input_size"][-1]} if case.library == "timm" else set()
    errors: list[str] = []
    for size in sorted({*SIZES, *own}):
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model(*inputs(model, case, size))
                training_loss(copy.deepcopy(model).train(), case, size)
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            errors.append(f"{size}: {type(error).__name__} {str(error)[:80]}")
            continue
        return size
    raise RuntimeError(f"{case.key} takes none of the input sizes: {'; '.join(errors)}")


def training_loss(model: nn.Module, case: Case, size: int) -> Tensor:
    """Sum of the mean squares of all outputs; for detection the model's own losses with one box an image."""
    args = inputs(model, case, size)
    if case.kind == "detection":
        out = model(*args, [_target(size) for _ in args[0]])
        return torch.stack(list(out.values())).sum()
    return torch.stack([t.square().mean() for t in tensors(model(*args))]).sum()


def _target(size: int) -> dict[str, Tensor]:
    box = torch.tensor([[size * 0.2, size * 0.2, size * 0.8, size * 0.7]])
    mask = torch.zeros(1, size, size, dtype=torch.uint8)
    mask[:, size // 4 : size // 2, size // 4 : size // 2] = 1
    points = torch.tensor([[[size * 0.4, size * 0.4, 1.0]] * 17])
    return {"boxes": box, "labels": torch.tensor([1]), "masks": mask, "keypoints": points}


def tensors(value: Any) -> list[Tensor]:
    """All floating-point tensors in nested lists, tuples, dicts and named tuples, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors(item)]
    return []
