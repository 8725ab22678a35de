"""Dynamic layers that do not vary, those that do, and a small network of them: what the tests of collapse share."""

import copy
from typing import Any

import timm
import torch
from torch import Tensor, nn

import surgeon
from surgeon.layers import ACDAConv2d, DynamicConv2d, PAFUConv2d, SEKGConv2d, layer_class, layer_types
from tests.support.layers.contract import (
    awaken,
)

TYPES = layer_types()
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("acda", {}),
    ("pafu", {}),
    ("pafu", {"supports": (5,)}),
    ("sekg", {}),
    ("sekg", {"mode": "factorised"}),
]


def shift_static(layer: DynamicConv2d, *, seed: int = 3) -> DynamicConv2d:
    """Train the layer so to speak, but only what does not vary: another kernel is selected, atoms and kernels are others."""
    noise = torch.Generator().manual_seed(seed)

    def add(parameter: Tensor, scale: float = 0.3) -> None:
        parameter.add_(scale * torch.randn(parameter.shape, generator=noise, dtype=torch.float64).to(parameter))

    with torch.no_grad():
        if isinstance(layer, PAFUConv2d):
            add(layer.further_kernels)
            layer.selector.expand.bias[1 + seed % (layer.config.group_size - 1)] = 7.0
        if isinstance(layer, ACDAConv2d):
            add(layer.generator.static_output)
        if isinstance(layer, SEKGConv2d):
            add(layer.dconv.static)
    return layer


def hidden_from_input(layer: DynamicConv2d) -> None:
    """Let the generator give the same at every pixel by other means than a zero last weight, so that only images tell."""
    with torch.no_grad():
        if isinstance(layer, PAFUConv2d):
            layer.selector.expand.weight.normal_()
            layer.selector.expand.bias[2] = 3 * layer.selector.expand.weight.abs().sum(dim=(1, 2, 3)).max()
            layer.selector.expand.weight[2] *= 4  # so large that it could lose against another, but not on small inputs
            layer.selector.reduce.weight.mul_(1e-3)
            layer.selector.reduce.bias.zero_()


def vary(layer: DynamicConv2d, scale: float = 0.3) -> DynamicConv2d:
    """Let the dynamic part do something that the input decides, PAFU's selection included."""
    if not isinstance(layer, PAFUConv2d):
        return awaken(layer, scale)
    kernels, spread = layer.further_kernels.detach().clone(), layer.static_weight().std()
    awaken(layer, scale)
    with torch.no_grad():
        layer.further_kernels.copy_(kernels + 0.5 * spread * (layer.further_kernels - kernels) / scale)
        layer.selector.set_static_output(torch.zeros(layer.config.group_size))
    return layer


def network(kind: str, **options: Any) -> nn.Module:
    """With layers as published: a group of PAFU has different kernels from the start."""
    options = {**layer_class(kind).Config.paper, **options}
    model = timm.create_model("test_resnet", num_classes=5).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm starts a block's last one at zero, which would hide its convolutions
    x = images()
    return surgeon.convert(model, layers="stage3,stage4", type=kind, example_inputs=x, **options)[0].eval()


def images(n: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = copy.deepcopy(model).eval()(x)
    return out
