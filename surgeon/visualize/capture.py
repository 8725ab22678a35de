"""Inputs, codes and outputs of every dynamic layer for one image, captured with hooks."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.collapsing.evidence import Watch
from surgeon.errors import InputError
from surgeon.layers.base import CodedConv2d, DynamicConv2d, as_batch, batch_of
from surgeon.sites.inputs import given_inputs
from surgeon.surgery.running import run
from surgeon.util.copying import evaluating


@dataclass(frozen=True, kw_only=True)
class Captured:
    """The first call of one layer for one image: input (C, H, W), outputs (C_out, H', W'), code (V, H', W').

    `static` is the output with the dynamic part off, `original` that of the same layer in the original model, run on the
    same image. `variation` is as in `surgeon.collapsing.evidence`, for this image alone.
    """

    name: str
    layer: DynamicConv2d
    input: Tensor
    output: Tensor
    static: Tensor
    code: Tensor | None
    variation: float | None
    original: Tensor | None = None


def capture(
    model: nn.Module, layers: Mapping[str, DynamicConv2d], picture: Tensor, original: nn.Module | None = None
) -> dict[str, Captured]:
    """Run a model on one image (C, H, W) and capture the dynamic layers that the forward pass reaches.

    Raises `InputError` if a model does not run on it, or if the original has no layer of a name.
    """
    beside = {} if original is None else _outputs(original, list(layers), picture)
    found: dict[str, Captured] = {}

    def hook(name: str) -> Any:
        def look(layer: DynamicConv2d, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
            if name not in found:
                found[name] = _see(name, layer, batch_of(args, kwargs), as_batch(output), beside.get(name))

        return look

    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        run(model, given_inputs(picture[None]))
    return {name: found[name] for name in layers if name in found}


def _see(name: str, layer: DynamicConv2d, x: Tensor, output: Tensor, original: Tensor | None) -> Captured:
    x, code, evidence = x[:1], None, None
    with evaluating(layer):
        static = layer.static_conv2d(x)
        if layer.adaptive and isinstance(layer, CodedConv2d):
            code, watch = layer.code(x), Watch(layer)
            watch.look(x)
            evidence = watch.evidence()
    return Captured(
        name=name,
        layer=layer,
        input=x[0].float(),
        output=output[0].float(),
        static=static[0].float(),
        code=None if code is None else code[0].float(),
        variation=None if evidence is None else evidence.variation,
        original=original if original is None or original.shape == output[0].shape else None,
    )


def _outputs(model: nn.Module, names: list[str], picture: Tensor) -> dict[str, Tensor]:
    """First outputs (C, H, W) of the named layers."""
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in names:
            try:
                module = model.get_submodule(name)
            except AttributeError as error:
                raise InputError(
                    f"--against: {type(model).__name__} has no layer {name!r}: it is not the original of this model"
                ) from error

            def look(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                if isinstance(output, Tensor):
                    found.setdefault(name, output[0].float())

            stack.callback(module.register_forward_hook(look).remove)
        run(model, given_inputs(picture[None]))
    return found


@torch.no_grad()
def channel_rms(features: Tensor) -> Tensor:
    """Root mean square over channels, (C, H, W) -> (H, W)."""
    return features.square().mean(0).sqrt()
