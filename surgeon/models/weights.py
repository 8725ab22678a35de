"""State dicts: loaded strictly, hashed, and fetched without long waits. `weight_files` reads them."""

import contextlib
import hashlib
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from surgeon.errors import ModelError, called
from surgeon.layers.base import DynamicConv2d
from surgeon.models.heads import check_head
from surgeon.surgery.raised import Raised
from surgeon.surgery.rewrite import folded_window
from surgeon.util.copying import is_lazy

_SHOWN = 5
_PATIENCE = 5.0  # seconds


def mismatches(state: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """Reasons why a state dict does not fit a model: missing or unexpected names, other shapes, integers for floats.

    Counters of batch norms may be missing.
    """
    own = model.state_dict()
    return [
        *(f"missing {name}" for name in own if name not in state and not name.endswith("num_batches_tracked")),
        *(f"unexpected {name}" for name in state if name not in own),
        *(
            f"{name} has shape {tuple(value.shape)}, expected {tuple(own[name].shape)}"
            for name, value in state.items()
            if name in own and value.shape != own[name].shape
        ),
        *(
            f"{name} is of dtype {_dtype(value)}, expected {_dtype(own[name])}"
            for name, value in state.items()
            if name in own and value.shape == own[name].shape and _kind(value) != _kind(own[name])
        ),
    ]


def _kind(value: Tensor) -> str:
    """The kind of a dtype: dtypes of one kind are converted, others are errors."""
    if value.is_floating_point():
        return "real"
    if value.is_complex():
        return "complex"
    return "truth" if value.dtype == torch.bool else "whole"


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def told_mismatches(problems: list[str]) -> str:
    """The first few mismatches and the number of others."""
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more


def _what_to_check(state: Mapping[str, Tensor], model: nn.Module) -> str:
    """A convolution whose weight is missing, and in whose place the file has something else, was probably converted."""
    own = model.state_dict()
    gone = {name.removesuffix("weight") for name in own if name.endswith(".weight") and name not in state}
    others = [name for name in state if name not in own]
    if others and gone == {place for place in gone if any(name.startswith(place) for name in others)}:
        return (
            f"It has other layers in the place of {told_mismatches(sorted(place[:-1] for place in gone))}: a state dict of a "
            "converted model fits the same conversion; surgeon.save writes a folder that every command opens."
        )
    options = called("--model-args KEY=VALUE", "options={...}")
    return f"Check the model's name and its options ({options})."


def load_weights(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict strictly; raises `ModelError` with the first mismatches, `HeadError` if only the head is another."""
    problems = mismatches(state, model)
    if problems:
        if all(" has shape " in problem for problem in problems):
            check_head(state, model, where)
        raise ModelError(
            f"{where} contains the weights of another model: {told_mismatches(problems)}. {_what_to_check(state, model)}"
        )
    model.load_state_dict(dict(state), strict=False)


def state_sha256(model: nn.Module) -> str:
    """SHA-256 over the sorted state dict: names, dtypes, shapes, bytes. Raises `ModelError` for tensors without a shape yet."""
    if is_lazy(model):
        raise ModelError(
            f"{type(model).__name__} has lazy layers whose parameters are not initialized yet: run it on an input once, where it "
            "is made"
        )
    digest = hashlib.sha256()
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for name in sorted(state):
        value = state[name].detach()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def changed_tensors(original: nn.Module, converted: nn.Module) -> list[str]:
    """Names of parameters and buffers outside the dynamic layers that differ between the models.

    Convolutions folded to another window are excluded, too: their tensors cannot be equal. A layer that was
    converted and reverted has its weight back up to rounding, which counts as equal.
    """
    modules = converted.named_modules(remove_duplicate=False)
    inside = tuple(f"{name}." for name, module in modules if isinstance(module, DynamicConv2d) or folded_window(module))
    raised = Raised(original, [name.removesuffix(".") for name in inside])
    before = {name: value for name, value in original.state_dict().items() if not name.startswith(inside)}
    raised.undo()
    after = {name: value for name, value in converted.state_dict().items() if not name.startswith(inside)}
    return [name for name in {**before, **after} if not _same(before.get(name), after.get(name))]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape:
        return False
    if torch.equal(a, b) or not a.numel():
        return True
    if not a.is_floating_point() or not b.is_floating_point():
        return False
    a, b = a.double(), b.double()
    return bool((a - b).abs().max() <= 1e-5 * a.abs().max())


@contextlib.contextmanager
def bounded_network() -> Iterator[None]:
    """Make downloads fail within seconds without a network; cached files are still found.

    The Hugging Face client retries an unknown host for most of a minute, and urllib waits forever.
    """
    from huggingface_hub import constants

    offline, timeout = constants.HF_HUB_OFFLINE, socket.getdefaulttimeout()
    constants.HF_HUB_OFFLINE = offline or not reachable(constants.ENDPOINT)
    socket.setdefaulttimeout(4 * _PATIENCE)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        socket.setdefaulttimeout(timeout)


def reachable(url: str, patience: float = _PATIENCE) -> bool:
    """Whether a connection to the URL's host, or to its proxy, opens within `patience` seconds."""
    target = urllib.parse.urlsplit(urllib.request.getproxies().get("https", url))
    port = target.port or (80 if target.scheme == "http" else 443)
    opened = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError), socket.create_connection((target.hostname or "", port), timeout=patience):
            opened.set()

    # Name resolution has no timeout, hence the thread.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(patience)
    return opened.is_set()
