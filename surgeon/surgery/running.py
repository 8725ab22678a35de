"""Runs a model for its outputs: in eval mode, seeded, without gradients, in full float32."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import InputError, VerificationError
from surgeon.sites.inputs import Inputs
from surgeon.surgery.compare import Leaves, leaves
from surgeon.util.copying import copy_model, evaluating, is_lazy, quiet_eager, seeded, strict_float32


def run(model: nn.Module, inputs: Inputs, seed: int = 0) -> Any:
    """Output in eval mode, without gradients; stochastic models draw from the given seed. The model is unchanged afterward.

    Raises `InputError` if the model does not run.
    """
    return _run(model, inputs, seed, lambda output: output)


def outputs(model: nn.Module, inputs: Inputs, seed: int = 0) -> Leaves:
    """Like `run`, but with the output tensors copied at the end of the run: some alias the model's state."""
    found: Leaves = _run(model, inputs, seed, leaves)
    return found


def _run(model: nn.Module, inputs: Inputs, seed: int, take: Callable[[Any], Any]) -> Any:
    model = copy_model(model) if is_lazy(model) else model
    try:
        with quiet_eager(), evaluating(model), seeded(seed), strict_float32():
            fresh = inputs.fresh()
            return take(model(*fresh.args, **fresh.kwargs))
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} does not run on {inputs.shapes()}: {type(error).__name__}: {error}"
        ) from error


def fails(error: InputError) -> VerificationError:
    """Explanation of a converted model's failure on inputs on which the original ran."""
    cause = error.__cause__ or error
    return VerificationError(
        f"the converted model fails where the original runs: {type(cause).__name__}: {cause}. Its forward needs more from a "
        f"replaced convolution than the new layer has; leave that one out with layers='...,!NAME'"
    )


def halves_agree(model: nn.Module, names: Sequence[str], pairs: Inputs, seed: int = 0) -> bool:
    """Whether these convolutions get the same input in both halves of a batch of repeated images (see `Inputs.twice`)."""
    agree = True

    def look(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal agree
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        if x.dim() != 4 or len(x) % 2:
            agree = False
        elif agree:
            first, second = x.chunk(2)
            agree = torch.allclose(first, second, rtol=1e-3, atol=1e-5 * float(first.abs().max()) + 1e-12)

    handles = [model.get_submodule(name).register_forward_pre_hook(look, with_kwargs=True) for name in names]
    try:
        run(model, pairs, seed)
    except InputError:  # does not take a batch of that length
        return False
    finally:
        for handle in handles:
            handle.remove()
    return agree
