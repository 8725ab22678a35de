"""Evidence that a dynamic layer does not vary: proven from its parameters, or observed on images.

A layer's code determines its filter at a pixel (`CodedConv2d.code`). Its variation is relative: the root mean square, over
pixels, of the filter's distance from the filter to fold at, as a fraction of that filter's norm. It is 0 only if the code is the
same at every pixel.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgeon.layers.base import CodedConv2d, DynamicConv2d, batch_of
from surgeon.util.copying import copy_model

Kind = Literal["off", "parameters", "images"]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Evidence that a layer can be folded at a code (V,), and its variation around it; `code` is None for the static filter."""

    kind: Kind
    code: Tensor | None
    variation: float = 0.0
    pixels: int = 0
    told: str = ""


def prove(layer: DynamicConv2d) -> Evidence | None:
    """Evidence without images: the dynamic part is off, or its parameters make it constant."""
    if not layer.adaptive:
        return Evidence(kind="off", code=None)
    code = layer.constant_code() if isinstance(layer, CodedConv2d) else None
    return None if code is None else Evidence(kind="parameters", code=code, told=layer.code_text(code))


def settled(layer: DynamicConv2d, evidence: Evidence) -> DynamicConv2d:
    """A copy of the layer, without hooks, whose static filter is the one to fold at."""
    twin = copy_model(layer)
    assert isinstance(twin, DynamicConv2d)
    if isinstance(twin, CodedConv2d) and evidence.code is not None:
        twin.fix(evidence.code)
    return twin


class Watch:
    """Mean and variation of one layer's code, image by image: kernels for a whole batch can be large."""

    def __init__(self, layer: CodedConv2d) -> None:
        self.layer = layer
        self.pixels = 0
        self.moved = False
        self.first: Tensor | None = None
        self.total: Tensor | float = 0.0
        self.energy = 0.0

    @torch.no_grad()
    def look(self, x: Tensor) -> None:
        """Record one call of the layer, (N, C, H, W)."""
        for image in x.split(1):
            rows = self.layer.code(image).flatten(2).squeeze(0).T.double()
            if self.first is None:
                self.first = rows[0].clone()
            away = rows - self.first
            self.moved = self.moved or bool(away.any())
            self.pixels += len(rows)
            self.total = self.total + away.sum(0)
            self.energy += float(self.layer.energy_of(away).sum())

    def evidence(self) -> Evidence | None:
        """The observations; None if the layer was not called."""
        if self.first is None:
            return None
        offset = self.total / self.pixels
        assert isinstance(offset, Tensor)
        code = self.layer.nearest_constant(self.first + offset).to(self.first)
        dtype, told = next(self.layer.parameters()).dtype, self.layer.code_text(self.first + offset)
        found = Evidence(kind="images", code=code.to(dtype), pixels=self.pixels, told=told)
        if not self.moved:
            return found
        spread = self.energy / self.pixels - float(self.layer.energy_of(offset))
        spread += float(self.layer.energy_of(self.first + offset - code))
        size = float(settled(self.layer, found).static_energy())
        # A layer that varied at all never counts as constant, even if rounding makes its spread zero.
        variation = math.sqrt(max(spread, 0.0) / size) if size else math.inf
        return replace(found, variation=max(variation, sys.float_info.min))


@contextmanager
def watching(model: nn.Module, layers: Mapping[str, CodedConv2d]) -> Iterator[dict[str, Watch]]:
    """Context that watches every call of the named layers."""
    watches = {name: Watch(layer) for name, layer in layers.items()}

    def hook(watch: Watch) -> Any:
        def look(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            watch.look(batch_of(args, kwargs))

        return look

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook(watch), with_kwargs=True)
        for name, watch in watches.items()
    ]
    try:
        yield watches
    finally:
        for handle in handles:
            handle.remove()
