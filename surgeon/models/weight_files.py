"""Files of weights: read without running code, and which of their state dicts a model takes."""

import logging
import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path, PosixPath, WindowsPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy._core.multiarray as multiarray
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from surgeon.errors import ModelError
from surgeon.models.places import check_weights, in_file
from surgeon.models.weights import load_weights, mismatches

StateDict = dict[str, Tensor]

logger = logging.getLogger(__name__)

_AVERAGED = re.compile(r"(^|_|\.)(ema|averaged|swa)($|_|\.)", re.IGNORECASE)
_PREFIXES = ("module.", "_orig_mod.")
_FOREIGN = re.compile(r"GLOBAL ([\w.]+)|but got <class '([\w.]+)'>")  # in torch's messages
_DEPTH = 3
_SHOWN = 3


def load_weights_file(
    model: nn.Module, weights: str | Path, adapt: Callable[[StateDict], StateDict] | None = None
) -> str:
    """Load the state dict of FILE, or FILE:KEY, that fits the model best; of equal ones, averaged weights come first, as in timm.

    A prefix under which a state dict has all names of the model, such as Lightning's `model.`, does not count. What was chosen, and
    what was left out, is logged. `adapt` gives a state dict the model's names. Returns the absolute path to record, with the key if
    there is one. Raises `ModelError`.
    """
    file, key = in_file(weights)
    named: dict[str, StateDict] = {}
    sizes: dict[str, int] = {}
    for outer, given in read_weights(file).items():
        state = adapt(given) if adapt else given
        parts = _parts(model, state)
        for prefix, part in parts.items():
            name = ".".join(filter(None, (outer, prefix if len(parts) > 1 else "")))
            named[name], sizes[name] = part, len(state)
    if key is not None and key not in named:
        known = ", ".join(filter(None, named)) or "only one, without a key"
        raise ModelError(f"{file} has no state dict {key!r}; it has {known}")
    wrong = {name: len(mismatches(state, model)) for name, state in named.items()} if key is None else {key: 0}
    chosen = min(wrong, key=lambda name: (wrong[name], _AVERAGED.search(name) is None))
    load_weights(model, named[chosen], f"{file}:{chosen}" if chosen else str(file))
    if others := [name for name in wrong if name != chosen and not wrong[name]]:
        logger.warning("%s: took %s; %s:%s takes those instead", file, chosen, file, f" or {file}:".join(others))
    elif left := sizes[chosen] - len(named[chosen]):
        what = "tensor that is not the model's is" if left == 1 else "tensors that are not the model's are"
        logger.warning("%s: %d %s left out", file, left, what)
    return f"{file.resolve()}:{chosen}" if chosen else str(file.resolve())


def _parts(model: nn.Module, state: StateDict) -> dict[str, StateDict]:
    """The parts of a state dict that have all names of the model below a prefix; if there are none, all of it."""
    own = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    if not own or own[0] in state:
        return {"": state}
    prefixes = [name.removesuffix(own[0]) for name in state if name.endswith(f".{own[0]}")]
    found = {
        prefix[:-1]: {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        for prefix in prefixes
        if all(f"{prefix}{name}" in state for name in own)
    }
    return found or {"": state}


# --- reading ------------------------------------------------------------------------------------------------------


def read_weights(path: str | Path) -> dict[str, StateDict]:
    """The state dicts in a .safetensors, .pth, .pt or .bin file, by the keys that lead to them; "" for a file that is one.

    They come without the prefix `module.`. Pickles are read with `weights_only=True`, so an untrusted file runs no code. Raises
    `ModelError`.
    """
    check_weights(path)
    path = Path(path)
    try:
        if not path.stat().st_size:
            raise EOFError("the file is empty")
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
        else:
            with torch.serialization.safe_globals(_plain_data()):
                loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (Exception, SafetensorError) as error:  # zip, pickle and safetensors each raise their own errors
        needed = re.search(_FOREIGN, str(error)) if "Weights only load failed" in str(error) else None
        if needed is not None:
            kind = needed[1] or needed[2]
            raise ModelError(
                f"{path} holds Python objects ({kind}), as of a whole model, which only code could load: save its weights "
                "with torch.save(model.state_dict(), FILE)"
            ) from error
        raise ModelError(
            f"cannot read {path} as weights{_why(error)}. Expected a state dict written by "
            "safetensors or torch.save; files that need code to load are not read."
        ) from error
    if not (found := _state_dicts(loaded)):
        raise ModelError(f"{path} contains no state dict (names and tensors) but a {_told(loaded)}")
    return {key: _strip(state) for key, state in found.items()}


def _plain_data() -> list[Any]:
    """Types that training scripts put beside the weights (timm its options, others numbers of NumPy); to make one runs no code."""
    numbers = [type(np.dtype(kind)) for kind in "?bhilqBHILQefdFD"]
    makers: list[Any] = [
        (getattr(multiarray, name), f"numpy.{core}.multiarray.{name}")  # of NumPy 2 and 1
        for name in ("scalar", "_reconstruct")
        for core in ("_core", "core")
    ]
    plain = [Namespace, SimpleNamespace, PosixPath, WindowsPath, list, dict, slice]
    return [*plain, np.ndarray, np.dtype, *makers, *numbers]


def _why(error: BaseException) -> str:
    """The first line of a reader's error, unless it is torch's advice on loading files that run code."""
    told = (str(error).splitlines() or [""])[0]
    if "weights_only" in told or not told:
        return ": it is no file of torch.save" if told else ""
    return f" ({type(error).__name__}: {told[:160]})"


def _state_dicts(loaded: Any, key: str = "", depth: int = 0) -> dict[str, StateDict]:
    """Mappings from names to tensors, in a mapping or in one inside it."""
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(name, str) for name in loaded):
        return {}
    tensors = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    found: dict[str, StateDict] = {}
    if len(tensors) < len(loaded) and depth < _DEPTH:
        for name, value in loaded.items():
            found |= _state_dicts(value, f"{key}.{name}" if key else name, depth + 1)
    return found or ({key: tensors} if tensors else {})


def _told(loaded: Any) -> str:
    kind = type(loaded).__name__
    if not isinstance(loaded, Mapping):
        return kind
    if not loaded:
        return f"{kind}, which is empty"
    more = ", ..." if len(loaded) > _SHOWN else ""
    held = ", ".join(f"{name!r}: {type(value).__name__}" for name, value in list(loaded.items())[:_SHOWN])
    return f"{kind} of {held}{more}"


def _strip(state: StateDict) -> StateDict:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            return _strip({name.removeprefix(prefix): value for name, value in state.items()})
    return state
