"""Checks that the new parameters of dynamic layers can learn: each must get a gradient within two steps."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import GeometryError, VerificationError
from surgeon.layers.base import DynamicConv2d
from surgeon.layers.geometry import ConvGeometry
from surgeon.layers.norm import SignalNorm
from surgeon.util.copying import seeded


def without_gradient(layer: DynamicConv2d, seed: int = 0) -> list[str]:
    """New parameters that get no gradient within two training steps on random input; trains a copy of the layer.

    Norms inside generators use their running statistics: batch statistics would cancel a bias in front of them, and leave
    only rounding errors, or nothing, as its gradient.
    """
    twin = copy.deepcopy(layer).float()
    for hooks in (twin._forward_hooks, twin._forward_pre_hooks, twin._backward_hooks, twin._backward_pre_hooks):
        hooks.clear()
    twin.train()
    for module in twin.modules():
        if isinstance(module, SignalNorm):
            module.eval()
    new = dict(twin.new_parameters())
    for parameter in new.values():
        parameter.requires_grad_(True)
    missing = set(new)
    with seeded(seed), torch.enable_grad():
        side = _small_side(twin.geometry)
        like = next(twin.parameters())
        x = torch.randn((2, twin.geometry.in_channels, side, side), dtype=like.dtype, device=like.device)
        for _ in range(2):
            _descend(twin, x, new)
            missing -= {name for name, p in new.items() if p.grad is not None and bool(p.grad.any())}
            if not missing:
                break
    return [name for name in new if name in missing]


def _small_side(geometry: ConvGeometry) -> int:
    """Side of the smallest square input with an output of at least 3×3: dilated kernels may extend beyond it."""
    padding = (0, 0, 0, 0) if geometry.padding == "tf_same" else geometry.padding
    side = 4 if geometry.padding_mode == "zeros" else max(4, 1 + max(padding))
    while True:
        try:
            if min(geometry.output_size(side, side)) >= 3:
                return side
        except GeometryError:
            pass
        side += 1


def _descend(twin: DynamicConv2d, x: Tensor, new: Mapping[str, nn.Parameter]) -> None:
    """One step down a random linear loss, scaled to change every parameter by about one percent."""
    twin.zero_grad()
    out = twin(x)
    loss = (out * torch.randn_like(out)).mean()
    extra = twin.regularization()
    (loss if extra is None else loss + extra).backward()
    with torch.no_grad():
        for p in new.values():
            if p.grad is not None:
                largest = float(torch.linalg.vector_norm(p.grad, math.inf))
                if 0 < largest < math.inf:  # in float64: the reciprocal of a denormal is infinite in float32
                    p.sub_((p.grad.double() * (0.01 / largest)).to(p.dtype))


def check_gradients(layers: Mapping[str, DynamicConv2d]) -> list[str]:
    """Check that new parameters can learn; layers that differ only in channel counts are checked once, on the smallest.

    Returns notes on layers that were not checked because their weight is zero, denormal or not finite. Raises
    `VerificationError` if a new parameter gets no gradient.
    """
    notes = []
    smallest: dict[tuple[Any, ...], str] = {}
    for name, layer in layers.items():
        weight = layer.static_weight().detach()
        if not weight.isfinite().all() or not weight.any():
            notes.append(f"{name}: its weight is zero or not finite; gradients of its new parameters were not checked")
            continue
        if weight.abs().max() < torch.finfo(torch.float32).tiny:
            notes.append(f"{name}: its weight is denormal; gradients of its new parameters were not checked")
            continue
        g = layer.geometry
        kind = (g.kernel_size, g.stride, g.padding, g.dilation, g.padding_mode, g.bias, g.groups == 1, g.is_depthwise)
        key = (layer.type_name, layer.config, *kind)
        if key not in smallest or g.in_channels < layers[smallest[key]].geometry.in_channels:
            smallest[key] = name
    for name in smallest.values():
        missing = without_gradient(layers[name])
        if missing:
            raise VerificationError(
                f"{name} ({layers[name].type_name}): no gradient reaches {', '.join(missing)} in two steps"
            )
    return notes
