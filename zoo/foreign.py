"""Weights that are in circulation: read a file safely and rename its keys to those of the zoo's networks.

Files are read with `weights_only=True`: a file from a stranger runs no code.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from surgeon.errors import ModelError
from surgeon.zoo.registry import Layout, entry

_WRAPPERS = ("state_dict", "model", "params_ema", "params", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """State dict in a `.pth`, `.pt` or `.safetensors` file, out of its wrappers.

    Takes {"state_dict": …} and its relatives, and takes off the prefixes that DataParallel and `torch.compile` put before
    every key. Raises `ModelError` for what is not a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"there is no weights file {path}")
    try:
        loaded = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # pickle, zip and safetensors each have errors of their own
        raise ModelError(
            f"cannot read {path} as weights ({type(error).__name__}: {_first_line(error)}). Expected a state dict "
            "saved by torch.save or safetensors; files that need code to load are not read."
        ) from error
    return _strip(_unwrap(loaded, path))


def translate(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The same tensors under the names that `layout` makes of their keys."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in layout:
            name = re.sub(pattern, replacement, name)
        if name:
            out[name] = value
    return out


def load_weights(model: nn.Module, path: str | Path, *, network: str | None = None) -> nn.Module:
    """Load a weights file into `model` and return it.

    `network` is the zoo name whose public key layout may be used; the model's own keys are always understood. Counters of
    batches that a batch norm keeps may be missing. Raises `ModelError` with the first mismatches.
    """
    state = read_state(path)
    own = model.state_dict()
    if network is not None and not set(state) <= set(own):
        state = translate(state, entry(network).layout)
    problems = _mismatches(state, own)
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise ModelError(f"{path} does not fit {network or type(model).__name__}: {shown}")
    model.load_state_dict(state, strict=False)
    return model


def _unwrap(loaded: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(loaded, Mapping):
        inner = next((loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ModelError(f"{path} holds no state dict (name -> tensor), but a {type(loaded).__name__}")
    return {str(key): value for key, value in loaded.items()}


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            return _strip({key[len(prefix) :]: value for key, value in state.items()})
    return state


def _mismatches(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    shapes = [k for k in state if k in own and state[k].shape != own[k].shape]
    return (
        [f"it lacks {k}" for k in missing]
        + [f"it has {k}, which the network has not" for k in state if k not in own]
        + [f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}" for k in shapes]
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
