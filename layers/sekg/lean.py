"""DConv in plain torch without storing an unfolded input or a full map of kernels: forward and backward.

Tiling and the names of sizes are described in `ops.tiles`. The gradient formulas are those of `dconv_reference`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.layers.ops.library import memory_format_of
from surgeon.layers.ops.tiles import (
    Band,
    BandPlan,
    ImageGradient,
    Workspace,
    channels_of,
    empty_fold,
    filter_with,
    fold,
    output_gradient,
    outputs_of,
    product_of,
    spread,
    sum_over,
    unfold,
)

LayerGradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


# --- kernels given ------------------------------------------------------------------------------------------------


def _apply_plan(x: Tensor, kernels: Tensor, kernel_size: Sequence[int], geometry: Sequence[Sequence[int]]) -> BandPlan:
    channels, groups = x.shape[1], kernels.shape[1]
    out_size = (kernels.shape[-2], kernels.shape[-1])
    return BandPlan.make(x, (channels, groups, max(channels, groups)), kernel_size, geometry, out_size)


def _given(plan: BandPlan, band: Band, piece: slice, kernels_GTHW: Tensor) -> Tensor:
    """View (p, 1, R, k_h, k_w, h, W') of one image's kernels."""
    p, _, r, _ = plan.split
    kernels = kernels_GTHW.view(p, 1, r, *plan.kernel, *plan.out_size)
    return kernels[piece, :, :, :, :, band[0] : band[1]]


def apply_forward(x: Tensor, kernels: Tensor, kernel_size: Sequence[int], *geometry: Sequence[int]) -> Tensor:
    """Forward of `dconv`; `geometry` is stride, padding, dilation."""
    plan, space = _apply_plan(x, kernels, kernel_size, geometry), Workspace(x)
    y = x.new_empty((x.shape[0], math.prod(plan.split), *plan.out_size))
    for image in range(x.shape[0]):
        for band in plan.bands():
            window = unfold(plan, band, x[image], space)
            for piece in plan.pieces():
                filtered = filter_with(window[piece], _given(plan, band, piece, kernels[image]), space)
                outputs_of(plan, band, piece, y[image]).copy_(filtered)
    return y


def apply_backward(
    grad: Tensor,
    x: Tensor,
    kernels: Tensor,
    kernel_size: Sequence[int],
    needs: Sequence[bool],
    *geometry: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Gradients of `dconv` for x and the kernels; empty if not in `needs`."""
    plan, space = _apply_plan(x, kernels, kernel_size, geometry), Workspace(x)
    grad_x = x.new_zeros(x.shape) if needs[0] else None
    grad_kernels = kernels.new_empty(kernels.shape) if needs[1] else None
    for image in range(x.shape[0]):
        sums = None if grad_x is None else ImageGradient(grad_x, image, space)
        for band in plan.bands():
            window = None if grad_kernels is None else unfold(plan, band, x[image], space)
            folded = None if sums is None else empty_fold(plan, band, x.shape[1], space)
            for piece in plan.pieces():
                grad_y = output_gradient(plan, band, piece, grad[image], space)
                if window is not None and grad_kernels is not None:
                    part = sum_over(product_of(window[piece], grad_y, space), 1, "grad_kernels", space)
                    _given(plan, band, piece, grad_kernels[image]).copy_(part)
                if folded is not None:
                    product = product_of(_given(plan, band, piece, kernels[image]), grad_y, space)
                    fold(plan, product, folded[channels_of(plan, piece)], space)
            if sums is not None and folded is not None:
                spread(plan, band, folded, sums.sums)
        if sums is not None:
            sums.keep()
    return filled(x, grad_x), filled(x, grad_kernels)


def filled(like: Tensor, part: Tensor | None) -> Tensor:
    """The part, or an empty tensor if it is None: operators return only tensors."""
    return like.new_empty(0) if part is None else part


# --- kernels generated --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerInputs:
    """Inputs of the fused layer; shapes as in `dconv_layer_reference`."""

    x: Tensor
    features: Tensor
    weight: Tensor
    static: Tensor
    bias: Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    @property
    def one_kernel_an_output(self) -> bool:
        """Whether the static kernels are added to the generated ones; otherwise they are a separate depthwise convolution."""
        return self.weight.shape[0] == self.static.numel()

    def plan(self) -> BandPlan:
        kernel = (self.static.shape[2], self.static.shape[3])
        groups = self.weight.shape[0] // (kernel[0] * kernel[1])
        channels = (self.x.shape[1], groups, self.static.shape[0])
        out_size = (self.features.shape[-2], self.features.shape[-1])
        return BandPlan.make(self.x, channels, kernel, (self.stride, self.padding, self.dilation), out_size)

    def static_conv2d(self) -> Tensor:
        """Output of the static kernels; uninitialized if they are added to the generated ones."""
        x = self.x
        if not self.one_kernel_an_output:
            return F.conv2d(x, self.static, self.bias, self.stride, self.padding, self.dilation, x.shape[1])
        shape = (x.shape[0], self.static.shape[0], self.features.shape[2], self.features.shape[3])
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))

    def static_gradients(
        self, grad: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The static kernels' contributions to the gradients of x, of themselves and of the bias; `needs` as in `layer_backward`.

        If they are added to the generated ones, x's and theirs are zeros, to be filled by the pieces.
        """
        if self.one_kernel_an_output:
            grad_x = torch.zeros_like(self.x) if needs[0] else None
            grad_static = torch.zeros_like(self.static) if needs[3] else None
            return grad_x, grad_static, grad.sum((0, 2, 3)) if needs[4] else None
        found: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
            grad,
            self.x,
            self.static,
            None if self.bias is None else [self.static.shape[0]],
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0, 0],
            self.x.shape[1],
            [needs[0], needs[3], needs[4]],
        )
        return found


class _Generator:
    """Generates kernels from features, in the dtype of sums, and propagates their gradient back."""

    def __init__(self, given: LayerInputs, plan: BandPlan, space: Workspace) -> None:
        self.plan, self.space, self.features = plan, space, given.features
        self.weight = given.weight.to(space.dtype)
        self.static = given.static.to(space.dtype).view(-1, 1) if given.one_kernel_an_output else None

    def band_features(self, image: int, band: Band) -> Tensor:
        """(Cf, h·W')."""
        return self.features[image, :, band[0] : band[1]].flatten(1).to(self.space.dtype)

    def kernels(self, piece: slice, features: Tensor) -> Tensor:
        """Kernels of a piece, (p, 1, R, k_h, k_w, h, W'), from the features of a band.

        If a kernel serves one input channel, they are in the buffer "product" and are multiplied in place.
        """
        plan, rows = self.plan, self.plan.weight_rows(piece)
        weight = self.weight[rows]
        buffer = "product" if plan.split[1] == 1 else "kernels"
        flat = self.space.take(buffer, weight.shape[0], features.shape[1])
        if self.static is None:
            torch.mm(weight, features, out=flat)
        else:
            torch.addmm(self.static[rows], weight, features, out=flat)
        return flat.view(piece.stop - piece.start, 1, plan.split[2], *plan.kernel, -1, plan.out_size[1])


def layer_forward(given: LayerInputs) -> Tensor:
    """Forward of `dconv_layer`."""
    plan, space, x = given.plan(), Workspace(given.x), given.x
    generator = _Generator(given, plan, space)
    y = given.static_conv2d()
    bias = None if given.bias is None else given.bias.view(*plan.split, 1, 1)
    for image in range(x.shape[0]):
        for band in plan.bands():
            window = unfold(plan, band, x[image], space)
            features = generator.band_features(image, band)
            for piece in plan.pieces():
                filtered = filter_with(window[piece], generator.kernels(piece, features), space)
                outputs = outputs_of(plan, band, piece, y[image])
                if not given.one_kernel_an_output:
                    outputs.add_(filtered)
                elif bias is None:
                    outputs.copy_(filtered)
                else:
                    outputs.copy_(filtered.add_(bias[piece]))
    return y


def layer_backward(grad: Tensor, given: LayerInputs, needs: Sequence[bool]) -> LayerGradients:
    """Gradients of `dconv_layer` for x, features, weight, static and bias; empty if not in `needs`."""
    plan, space, x = given.plan(), Workspace(given.x), given.x
    generator = _Generator(given, plan, space)
    grad_x, grad_static, grad_bias = given.static_gradients(grad, needs)
    grad_features = torch.empty_like(given.features) if needs[1] else None
    grad_weight = torch.zeros_like(generator.weight) if needs[2] else None
    grad_taps = None
    if grad_static is not None and given.one_kernel_an_output:
        grad_taps = generator.weight.new_zeros(generator.weight.shape[0])
    of_kernels = grad_features is not None or grad_weight is not None or grad_taps is not None
    for image in range(x.shape[0]):
        sums = None if grad_x is None else ImageGradient(grad_x, image, space)
        for band in plan.bands():
            features = generator.band_features(image, band)
            grad_band = None if grad_features is None else space.take("grad_features", *features.shape).zero_()
            window = unfold(plan, band, x[image], space) if of_kernels else None
            folded = None if sums is None else empty_fold(plan, band, x.shape[1], space)
            for piece in plan.pieces():
                grad_y, rows = output_gradient(plan, band, piece, grad[image], space), plan.weight_rows(piece)
                if window is not None:
                    part = sum_over(product_of(window[piece], grad_y, space), 1, "grad_kernels", space)
                    part = part.view(-1, features.shape[1])
                    if grad_weight is not None:
                        grad_weight[rows].addmm_(part, features.t())
                    if grad_band is not None:
                        grad_band.addmm_(generator.weight[rows].t(), part)
                    if grad_taps is not None:
                        grad_taps[rows].add_(part.sum(1))
                if folded is not None:
                    product = product_of(generator.kernels(piece, features), grad_y, space)
                    fold(plan, product, folded[channels_of(plan, piece)], space)
            if sums is not None and folded is not None:
                spread(plan, band, folded, sums.sums)
            if grad_features is not None and grad_band is not None:
                rows_of_band = grad_features[image, :, band[0] : band[1]]
                rows_of_band.copy_(grad_band.view(rows_of_band.shape))
        if sums is not None:
            sums.keep()
    if grad_static is not None and grad_taps is not None:
        grad_static.copy_(grad_taps.view(grad_static.shape))
    if grad_weight is not None:
        grad_weight = grad_weight.to(given.weight.dtype)
    found = filled(x, grad_x), filled(x, grad_features), filled(x, grad_weight)
    return (*found, filled(x, grad_static), filled(x, grad_bias))
