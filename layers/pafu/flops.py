"""FLOPs of PAFU's operator for torch's counter (1 MAC = 2 FLOPs), from its definition, independent of the backend.

Torch's counter passes shapes in place of tensors.
"""

import math
from collections.abc import Sequence

Shape = Sequence[int]


def pafu_flops(x: Shape, kernel: Shape, *rest: object, out_shape: Shape, **kwargs: object) -> int:
    """Every pixel is filtered with one kernel."""
    return 2 * out_shape[0] * out_shape[2] * out_shape[3] * math.prod(kernel)


def pafu_backward_flops(
    grad: Shape, x: Shape, kernel: Shape, further: Shape, *rest: Sequence[bool], out_shape: object, **kwargs: object
) -> int:
    """The soft selection needs the response of every kernel."""
    need_x, need_kernels, need_soft = rest[-1]
    units = need_x + need_kernels + need_soft * (1 + further[0])
    return 2 * grad[0] * grad[2] * grad[3] * math.prod(kernel) * units
