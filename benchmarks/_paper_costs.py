"""The tables that need no training: ACDA Tables 6 and 7, and the cost columns of ADFNet's Table 2."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from surgeon import cost, zoo
from surgeon.layers.acda import ACDAConfig, ACDAConv2d
from surgeon.zoo.comparators import DynamicFilterConv2d
from surgeon.zoo.networks.ad_resnet import ACDA

COSTS = {
    "ACDA 6": "one layer, 256 to 256 channels, 100×100 pixels, millions (multiply-accumulates and parameters)",
    "ACDA 7": "training Ad-ResNet-s and its convolutional twin: predicted memory, 64 images of 224×224 with SGD; measured time of "
    "a step on this CPU, 2 images of 112×112 (the paper's DFN generates whole filters and runs out of memory, ours one a pixel)",
    "ADFNet 2, cost": "one 128×128 image; time of a forward pass on this CPU",
}
_CHANNELS, _SIDE = 256, 100


def cost_rows(name: str) -> list[dict[str, Any]]:
    """The lines of a table of `COSTS`."""
    return _MAKERS[name]()


def _layers() -> list[dict[str, Any]]:
    """ACDA Table 6. Biases count one addition an output element there, and here."""
    printed = {
        3: ((5900.8, 0.59), (4073.0, 0.39), (4311.2, 0.41)),
        5: ((16386.6, 1.64), (4318.7, 0.39), (4557.0, 0.43)),
        7: ((32115.2, 3.12), (4687.4, 0.39), (4925.7, 0.45)),
    }
    rows = []
    bias = _CHANNELS * _SIDE**2
    for k, (conv_printed, only_printed, all_printed) in printed.items():
        conv = nn.Conv2d(_CHANNELS, _CHANNELS, k, padding=k // 2)
        config = ACDAConfig(**(ACDA | {"scales": (k - 1) // 2}))
        layer = ACDAConv2d.from_conv(conv, config)
        # Φ, and atoms of the basis
        generator = layer.generator.macs(_SIDE, _SIDE) + layer.psi.numel() * config.atoms * _SIDE**2
        own = sum(p.numel() for p in layer.generator.parameters())
        whole = layer.macs(_SIDE, _SIDE)
        params = sum(p.numel() for p in layer.parameters())
        counted = (
            ("Conv", conv.weight.numel() * _SIDE**2 + bias, conv.weight.numel(), conv_printed),
            ("ACDA (conv only)", whole - generator + bias, params - own - _CHANNELS, only_printed),
            ("ACDA (+ atom generation)", whole + bias, params - _CHANNELS, all_printed),
        )
        for method, macs, weights, (flops, parameters) in counted:
            rows.append(
                {
                    "kernel": f"{k}×{k}",
                    "method": method,
                    "MACs, ours": round(macs / 1e6, 1),
                    "published": flops,
                    "parameters, ours": round(weights / 1e6, 3),
                    "published parameters": parameters,
                }
            )
    return rows


class _Subsampled(nn.Module):
    """Dynamic filtering with a stride: every other pixel of the result."""

    def __init__(self, channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.filter = DynamicFilterConv2d(channels, channels, kernel_size)
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.filter(x)[..., :: self.stride, :: self.stride]
        return y


def _dfn() -> nn.Module:
    """The convolutional twin with one filter a pixel (DFN) in the place of its wide convolutions."""
    model = zoo.create("ad_resnet_s_conv")
    for stage in (model.get_submodule("layer3"), model.get_submodule("layer4")):
        for block in stage.children():
            conv = block.get_submodule("conv2")
            assert isinstance(conv, nn.Conv2d)
            block.register_module("conv2", _Subsampled(conv.in_channels, conv.kernel_size[0], conv.stride[0]))
    return model


def _training() -> list[dict[str, Any]]:
    """ACDA Table 7."""
    arms: tuple[tuple[str, Callable[[], nn.Module], tuple[str, str, str]], ...] = (
        ("Conv", lambda: zoo.create("ad_resnet_s_conv"), ("4.60 M", "3.7 GB × 4", "0.53 s")),
        ("DFN, one filter a pixel", _dfn, ("2.32 M", "out of memory", "-")),
        ("ACDA", lambda: zoo.create("ad_resnet_s"), ("2.28 M", "4.6 GB × 4", "0.46 s")),
    )
    rows = []
    for name, build, (params, memory, seconds) in arms:
        torch.manual_seed(0)
        model = build()
        found = cost(model, input_size=(3, 224, 224), batch_size=64, optimizer="sgd")
        rows.append(
            {
                "method": name,
                "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M",
                "memory, predicted": f"{found.peak_bytes / 2**30:.2f} GiB",
                "step, measured": f"{_step_seconds(model):.2f} s",
                "published parameters": params,
                "published memory": memory,
                "published time": seconds,
            }
        )
    return rows


def _step_seconds(model: nn.Module) -> float:
    """CPU seconds of forward and backward, the middle one of three."""
    x = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    model.train()
    times = []
    for _ in range(4):
        started = time.process_time()
        model.zero_grad()
        model(x).square().mean().backward()
        times.append(time.process_time() - started)
    return sorted(times[1:])[1]


def _adfnet() -> list[dict[str, Any]]:
    """ADFNet Table 2, its columns of cost."""
    rows = []
    for name, printed in (("adfnet", ("13.9 G", "0.027 s")), ("adfnet_l", ("46.2 G", "0.057 s"))):
        model = zoo.create(name).eval()
        macs = cost(model, input_size=(3, 128, 128), batch_size=1, mode="infer").macs
        x = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
        times = []
        with torch.no_grad():
            for _ in range(4):
                started = time.process_time()
                model(x)
                times.append(time.process_time() - started)
        rows.append(
            {
                "network": name,
                "MACs": f"{macs / 1e9:.2f} G",
                "forward": f"{sorted(times[1:])[1]:.2f} s",
                "published FLOPs": printed[0],
                "published time (2080 Ti)": printed[1],
            }
        )
    return rows


_MAKERS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "ACDA 6": _layers,
    "ACDA 7": _training,
    "ADFNet 2, cost": _adfnet,
}
