"""The loss term that dynamic layers add to the task's loss."""

import torch
from torch import Tensor, nn

from surgeon.layers.base import DynamicConv2d


def regularization(model: nn.Module) -> Tensor:
    """Average regularization loss of a model's dynamic layers, to be added to the task's loss (PAFU, §3.5, eq. 4).

    A differentiable scalar; zero, on the device of the model's parameters, if no layer has one.
    """
    layers = (module for module in model.modules() if isinstance(module, DynamicConv2d))
    terms = [term for term in (layer.regularization() for layer in layers) if term is not None]
    if not terms:
        first = next(model.parameters(), None)
        return torch.zeros((), device=None if first is None else first.device)
    return torch.stack([term.to(terms[0]) for term in terms]).mean()
