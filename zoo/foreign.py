"""Weights in circulation: keys renamed to those of the zoo's networks. Files are read by `surgeon.models.weights`, safely."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from surgeon.models import weights
from surgeon.zoo.registry import Entry, Layout, entry

read_state = weights.read_weights


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


def adapt(state: Mapping[str, Tensor], found: Entry, model: nn.Module) -> dict[str, Tensor]:
    """A state dict in circulation as `model`, a network of the entry `found`, takes it.

    The model's own keys are understood as they are. Tensors that the entry names as `reshaped` get the model's shape.
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

    `network` is the zoo name whose public key layout may be used; the model's own keys are always understood. Counters of
    batches that a batch norm keeps may be missing. Raises `ModelError` with the first mismatches.
    """
    state = read_state(path)
    if network is not None:
        state = adapt(state, entry(network), model)
    weights.load_weights(model, state, str(path))
    return model
