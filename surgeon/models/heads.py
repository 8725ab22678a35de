"""Weights that differ from a model only in the number of its outputs: those of the same network with another head."""

from collections.abc import Mapping

from torch import Tensor, nn

from surgeon.errors import ModelError


class HeadError(ModelError):
    """Weights fit a model except for its head: `state` has `outputs` there."""

    def __init__(self, message: str, state: Mapping[str, Tensor], outputs: int) -> None:
        super().__init__(message)
        self.state, self.outputs = state, outputs


def check_head(state: Mapping[str, Tensor], model: nn.Module, where: str) -> None:
    """Raise `HeadError` if a state dict with the model's names fits it except for the outputs of linear layers or convolutions.

    All of these must have the same number of outputs, both in the file and in the model.
    """
    own = model.state_dict()
    other = [name for name, value in state.items() if value.shape != own[name].shape]
    layers = {name.rpartition(".")[0] for name in other}
    if not all(isinstance(model.get_submodule(layer), nn.Linear | nn.Conv2d) for layer in layers):
        return
    if any(state[name].ndim != own[name].ndim or state[name].shape[1:] != own[name].shape[1:] for name in other):
        return
    sizes = {(len(state[name]), len(own[name])) for name in other}
    if len(sizes) != 1:
        return
    [(there, here)] = sizes
    what = "classes" if all(isinstance(model.get_submodule(layer), nn.Linear) for layer in layers) else "outputs"
    first = f"{other[0]} has shape {tuple(state[other[0]].shape)}, expected {tuple(own[other[0]].shape)}"
    raise HeadError(f"{where} has a head of {there} {what}, and the model one of {here} ({first})", state, there)
