"""FLOPs of DConv for torch's counter (1 MAC = 2 FLOPs), which passes shapes in place of tensors."""

import math
from collections.abc import Sequence

Shape = Sequence[int]


def apply_flops(x: Shape, kernels: Shape, *rest: object, out_shape: Shape, **kwargs: object) -> int:
    return 2 * math.prod(out_shape) * kernels[2]


def apply_backward_flops(
    grad: Shape,
    x: Shape,
    kernels: Shape,
    kernel_size: Shape,
    needs: Sequence[bool],
    *rest: object,
    out_shape: object,
    **kwargs: object,
) -> int:
    return 2 * math.prod(grad) * kernels[2] * sum(needs)


def layer_flops(
    x: Shape, features: Shape, weight: Shape, static: Shape, *rest: object, out_shape: Shape, **kwargs: object
) -> int:
    return 2 * sum(_layer_macs(features, weight, static))


def layer_backward_flops(
    grad: Shape,
    x: Shape,
    features: Shape,
    weight: Shape,
    static: Shape,
    bias: Shape | None,
    needs: Sequence[bool],
    *rest: object,
    out_shape: object,
    **kwargs: object,
) -> int:
    """The kernels are recomputed for the gradient of x."""
    generate, apply = _layer_macs(features, weight, static)
    return 2 * (generate * sum(needs[:3]) + apply * (needs[0] + any(needs[1:4])))


def _layer_macs(features: Shape, weight: Shape, static: Shape) -> tuple[int, int]:
    """Multiply-accumulates of generating the kernels and of applying them."""
    pixels = features[0] * features[2] * features[3]
    return pixels * math.prod(weight), pixels * math.prod(static)
