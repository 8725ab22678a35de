"""The DConv layer on CUDA: kernels of a chunk by cuBLAS, applied at once, discarded, and recomputed in the backward pass.

Scratch memory holds the kernels (G·T, n, h, W') of a chunk of n images and h rows, one product of the weight (G·T, Cf) with the
chunk's features; backward also has their gradient, from which those of weight, features and static kernels are products and sums.
The static kernels are added to the generated ones if every output has its own; otherwise they are a depthwise convolution.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from surgeon.layers.ops.triton.chunks import Chunk, are_cut, chunks
from surgeon.layers.ops.triton.launch import Geometry
from surgeon.layers.sekg.lean import LayerGradients, LayerInputs, filled
from surgeon.layers.sekg.triton import Filtering


class _Layer:
    """One call, and the steps shared by both directions."""

    def __init__(self, given: LayerInputs, copies: int) -> None:
        self.given, (self.kernel_h, self.kernel_w) = given, given.static.shape[2:]
        x, self.size = given.x, (given.features.shape[2], given.features.shape[3])
        self.g = Geometry.of(x, self.size, given.stride, given.padding, given.dilation)
        self.groups = given.weight.shape[0] // (self.kernel_h * self.kernel_w)
        numbers = copies * given.weight.shape[0] + given.weight.shape[1]
        self.chunks = list(chunks(x.shape[0], self.size[0], self.size[1], numbers * x.element_size()))

    def filtering(self, chunk: Chunk, top: int = 0, bottom: int | None = None) -> Filtering:
        """For the chunk's output rows and the input rows top:bottom, as if both began at 0."""
        g, bottom = self.g, self.g.height if bottom is None else bottom
        pad = g.pad_h - chunk.i0 * g.stride_h + top
        g = g._replace(height=bottom - top, out_height=chunk.rows, pad_h=pad)
        channels, outputs = self.given.x.shape[1], self.given.static.shape[0]
        return Filtering(g, channels, self.groups, outputs, (self.kernel_h, self.kernel_w))

    def features(self, chunk: Chunk) -> Tensor:
        """(Cf, n·h·W')."""
        return chunk.part(self.given.features).transpose(0, 1).reshape(self.given.features.shape[1], -1)

    def kernels(self, features: Tensor, chunk: Chunk) -> Tensor:
        """(n, G, T, h, W')."""
        weight = self.given.weight
        if self.given.one_kernel_an_output:
            made = torch.addmm(self.given.static.reshape(-1, 1), weight, features)
        else:
            made = weight @ features
        return self.shaped(made, chunk)

    def shaped(self, made: Tensor, chunk: Chunk) -> Tensor:
        """(G·T, n·h·W') as (n, G, T, h, W')."""
        return made.view(self.groups, -1, chunk.n1 - chunk.n0, chunk.rows, self.size[1]).permute(2, 0, 1, 3, 4)

    def rows_under(self, chunk: Chunk) -> tuple[int, int]:
        """Input rows that the chunk reads."""
        top = max(chunk.i0 * self.g.stride_h - self.g.pad_h, 0)
        last = (chunk.i1 - 1) * self.g.stride_h - self.g.pad_h + (self.kernel_h - 1) * self.g.dilation_h
        return top, max(min(last + 1, self.g.height), top)


def forward(given: LayerInputs) -> Tensor:
    """Forward of `dconv_layer`."""
    layer, y = _Layer(given, copies=1), given.static_conv2d()
    alone = given.one_kernel_an_output
    bias = given.bias.contiguous() if alone and given.bias is not None else None
    for chunk in layer.chunks:
        kernels = layer.kernels(layer.features(chunk), chunk)
        layer.filtering(chunk).apply(given.x[chunk.images], kernels, chunk.part(y), bias, add=not alone)
    return y


def backward(grad: Tensor, given: LayerInputs, needs: Sequence[bool]) -> LayerGradients:
    """Gradients of `dconv_layer` for x, features, weight, static and bias; empty if not in `needs`."""
    layer, x = _Layer(given, copies=2), given.x
    grad_x, grad_static, grad_bias = given.static_gradients(grad, needs)
    cut, alone = are_cut(layer.chunks, layer.size[0]), given.one_kernel_an_output
    sums = grad_x if grad_x is None or not cut else grad_x.float()  # chunks of rows add to the same input rows
    grad_features = torch.empty_like(given.features) if needs[1] else None
    sum_weight = torch.zeros_like(given.weight, dtype=torch.float32) if needs[2] else None
    sum_static = torch.zeros_like(given.static, dtype=torch.float32) if needs[3] and alone else None
    for chunk in layer.chunks:
        features, of_y = layer.features(chunk), chunk.part(grad)
        if sums is not None:
            top, bottom = layer.rows_under(chunk) if cut else (0, layer.g.height)
            if top < bottom:
                part = sums[chunk.images, :, top:bottom]
                kernels = layer.kernels(features, chunk)
                layer.filtering(chunk, top, bottom).grad_x(of_y, kernels, part, add=cut or not alone)
        if grad_features is None and sum_weight is None and sum_static is None:
            continue
        made = given.weight.new_empty(given.weight.shape[0], features.shape[1])
        layer.filtering(chunk).grad_kernels(of_y, x[chunk.images], layer.shaped(made, chunk))
        if sum_weight is not None:
            sum_weight += made @ features.t()
        if sum_static is not None:
            sum_static += made.sum(1, dtype=torch.float32).view(sum_static.shape)
        if grad_features is not None:
            part = chunk.part(grad_features).transpose(0, 1)
            part.copy_((given.weight.t() @ made).view(part.shape))
    grad_x = None if sums is None else sums.to(x.dtype)
    grad_weight = None if sum_weight is None else sum_weight.to(given.weight.dtype)
    grad_static = grad_static if sum_static is None else sum_static.to(given.static.dtype)
    return (
        *(filled(x, grad_x), filled(x, grad_features), filled(x, grad_weight)),
        *(filled(x, grad_static), filled(x, grad_bias)),
    )
