"""Public weights: keys renamed to those of the zoo's networks. `surgeon.models.weight_files` reads the files safely."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from surgeon.models.weight_files import load_weights_file
from surgeon.zoo.registry import Entry, Layout, entry


def translate(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The same tensors under the names that `layout` maps their keys to."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in layout:
            name = re.sub(pattern, replacement, name)
        if name:
            out[name] = value
    return out


def adapt(state: Mapping[str, Tensor], found: Entry, model: nn.Module) -> dict[str, Tensor]:
    """A public state dict in the form that `model`, a network of the entry `found`, can load.

    The model's own keys are accepted as they are. Tensors that the entry lists as `reshaped` get the model's shape.
    """
    own = model.state_dict()
    if set(state) <= set(own):
        return dict(state)
    out = translate(state, found.layout)
    for name, value in out.items():
        fits = found.reshaped and name in own and re.search(found.reshaped, name) and value.numel() == own[name].numel()
        out[name] = value.reshape(own[name].shape) if fits else value
    return out


def load_foreign(model: nn.Module, path: str | Path, *, network: str | None = None) -> nn.Module:
    """Load a weights file into `model` and return it.

    `network` is the zoo name whose public key layout may be used; the model's own keys are always accepted. A batch norm's
    batch counters may be missing. Raises `ModelError` with the first mismatches.
    """
    load_weights_file(model, path, None if network is None else partial(adapt, found=entry(network), model=model))
    return model
