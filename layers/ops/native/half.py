"""Half precision for the compiled operators: a few images at a time are converted to float32, in which everything is summed."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

BLOCK_BYTES = 4 << 20  # of the tensors of some images, in float32; an image that is larger is a block of its own


def all_float32(*tensors: Tensor | None) -> bool:
    """Whether nothing has to be converted."""
    return all(t is None or t.dtype == torch.float32 for t in tensors)


def image_blocks(*batched: Tensor) -> Iterator[slice]:
    """Slices of the images of tensors (N, …), of the shapes only; one that is empty if there are no images."""
    images = batched[0].shape[0]
    each = 4 * sum(t.numel() for t in batched) // max(images, 1)
    step = max(1, BLOCK_BYTES // max(each, 1))
    for first in range(0, max(images, 1), step):
        yield slice(first, min(first + step, images))


def by_images(run: Callable[..., Tensor], dtype: torch.dtype, *batched: Tensor) -> Tensor:
    """The result of `run` in float32, (N, …), for tensors (N, …) of any dtype, rounded once to `dtype`."""
    if dtype == torch.float32 and all_float32(*batched):
        return run(*batched)
    result: Tensor | None = None
    for block in image_blocks(*batched):
        found = run(*(t[block].float() for t in batched))
        if result is None:
            result = found.new_empty((batched[0].shape[0], *found.shape[1:]), dtype=dtype)
        result[block] = found
    assert result is not None
    return result


def gradients_by_images(
    run: Callable[..., Sequence[Tensor]], batched: Sequence[Tensor], inputs: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    """The results of `run` in float32 for the batched tensors: gradients of `inputs`, of which the first two are (N, …).

    Those of the others are summed over the blocks in float32. Each is rounded once, to the dtype of its input; those not in
    `needs` are empty.
    """
    if all_float32(*batched, *inputs):
        return list(run(*batched))
    results = [
        torch.zeros_like(t, dtype=t.dtype if i < 2 else torch.float32, memory_format=torch.contiguous_format)
        if need
        else t.new_empty(0)
        for i, (t, need) in enumerate(zip(inputs, needs, strict=True))
    ]
    for block in image_blocks(*batched):
        found = run(*(t[block].float() for t in batched))
        for i, (result, part, need) in enumerate(zip(results, found, needs, strict=True)):
            if need and i < 2:
                result[block] = part
            elif need:
                result += part
    return [result.to(t.dtype) for result, t in zip(results, inputs, strict=True)]
