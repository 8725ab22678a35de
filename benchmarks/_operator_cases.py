"""Cases of the operator benchmark: every operator on the shapes of a ResNet, the published implementation, and plain convolutions.

A case is one operator on one shape: "ours" first, then named baselines, each a `Step` (what to run, and the tensors to
differentiate by). A new operator is one function that yields its cases, and a line in OPERATORS; its targets are lines
in TARGETS.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.layers.acda.operator import acda_conv
from surgeon.layers.acda.reference import acda_macs
from surgeon.layers.pafu.operator import pafu_conv
from surgeon.layers.sekg.operator import dconv, dconv_layer

SHAPES = {"A": (8, 64, 56), "B": (8, 128, 28), "C": (8, 256, 14), "D": (4, 32, 128)}  # images, channels, height = width


@dataclass(frozen=True)
class Step:
    """A forward computation and the tensors its gradient is taken by; not `trained`: only the forward pass is measured."""

    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    trained: bool = True


@dataclass(frozen=True)
class Case:
    """`build` makes the steps, by name, "ours" first; tensors exist only while the case is measured."""

    operator: str
    shape: str
    variant: str
    build: Callable[[], dict[str, Step]]
    flops: int  # of the definition, forward, 1 MAC = 2
    moved: int = 0  # bytes of inputs and output, for what is bound by memory
    passes: int = 3  # how many times as many operations forward and backward take together

    @property
    def name(self) -> str:
        return f"{self.operator}/{self.variant}/{self.shape}"


def _parameter(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def _convolutions(x: Tensor, *kernels: int) -> dict[str, Step]:
    """Plain convolutions of x with as many channels out as in."""
    steps = {}
    for k in kernels:
        weight = _parameter(x.shape[1], x.shape[1], k, k)
        steps[f"conv{k}"] = Step(partial(F.conv2d, x, weight, padding=k // 2), (x, weight))
    return steps


# --- ACDA ----------------------------------------------------------------------------------------------------------


def acda_cases() -> Iterator[Case]:
    """ACDA with the paper's m = 6 and K = 18, for windows 7 and 3; the operator without the generator."""
    for window in (7, 3):
        for shape in SHAPES:
            n, c, size = SHAPES[shape]
            sizes = {"channels": c, "out_channels": c, "groups": 1, "window": window**2, "pixels": n * size**2}
            flops = 2 * acda_macs(**sizes, atoms=6, static=0, elements=18)
            yield Case("acda", shape, f"l={window}", partial(_acda_steps, shape, window), flops)


def _acda_steps(shape: str, window: int) -> dict[str, Step]:
    n, c, size = SHAPES[shape]
    m, k = 6, 18
    x, alpha = _parameter(n, c, size, size), _parameter(n, m * k, size, size)
    coeff, psi, static = _parameter(c, c, m), torch.randn(k, window, window), torch.empty(0, window, window)
    geometry = ((1, 1), (window // 2, window // 2), (1, 1), 1)

    def operator(backend: str | None) -> Step:
        run = partial(acda_conv, x, alpha, psi, static, coeff, *geometry, backend=backend)
        return Step(run, (x, alpha, coeff, psi, static))

    multiplied = Step(partial(_multiplied, x, alpha, coeff, psi), (), trained=False)
    steps = {
        "ours": operator(None),
        "torch": operator("torch"),
        "unfold": operator("reference"),
        "multiply": multiplied,
    }
    return steps | _convolutions(x, 3, 7)


def _multiplied(x: Tensor, alpha: Tensor, coeff: Tensor, psi: Tensor) -> Tensor:
    """The published way to the letter (ACDA, appendix A): unfold, then multiply sliding blocks by atoms, and sum."""
    (n, c, size, _), (k, window, _) = x.shape, psi.shape
    patches = F.unfold(x, window, padding=window // 2).view(n, c, window**2, -1)
    atoms = torch.einsum("nakp,kt->natp", alpha.view(n, -1, k, size * size), psi.flatten(1))
    filtered = torch.stack([(patches * atoms[:, a, None]).sum(2) for a in range(atoms.shape[1])], 2)
    return torch.einsum("oca,ncap->nop", coeff, filtered).view(n, -1, size, size)


# --- DConv ---------------------------------------------------------------------------------------------------------


def dconv_cases() -> Iterator[Case]:
    """DConv with 3×3 kernels: applying given kernels, and the layer that makes them by a 1×1 convolution C → 9C."""
    for variant, build in (("apply", _apply_steps), ("layer", _layer_steps)):
        for shape in SHAPES:
            n, c, size = SHAPES[shape]
            flops, moved = 2 * 9 * n * c * size**2, torch.get_default_dtype().itemsize * 11 * n * c * size**2
            if variant == "layer":
                flops, moved = flops * (c + 1), 0
            yield Case("dconv", shape, variant, partial(build, shape), flops, moved)


def _apply_steps(shape: str) -> dict[str, Step]:
    n, c, size = SHAPES[shape]
    x, kernels = _parameter(n, c, size, size), _parameter(n, c, 9, size, size)
    return {
        "ours": Step(partial(dconv, x, kernels, (3, 3), padding=(1, 1)), (x, kernels)),
        "torch": Step(partial(dconv, x, kernels, (3, 3), padding=(1, 1), backend="torch"), (x, kernels)),
        "unfold": Step(partial(_unfolded, x, kernels), (x, kernels)),
    } | _convolutions(x, 3)


def _layer_steps(shape: str) -> dict[str, Step]:
    n, c, size = SHAPES[shape]
    x, features = _parameter(n, c, size, size), _parameter(n, c, size, size)
    weight, static = _parameter(9 * c, c), _parameter(c, 1, 3, 3)
    tensors = (x, features, weight, static)

    def published() -> Tensor:
        kernels = F.conv2d(features, weight[:, :, None, None], static.flatten())
        return _unfolded(x, kernels.unflatten(1, (c, 9)))

    ours = partial(dconv_layer, *tensors, padding=(1, 1))
    steps = {"ours": Step(ours, tensors), "torch": Step(partial(ours, backend="torch"), tensors)}
    return steps | {"unfold": Step(published, tensors)} | _convolutions(x, 3)


def _unfolded(x: Tensor, kernels: Tensor) -> Tensor:
    return (F.unfold(x, 3, padding=1).view(kernels.shape) * kernels).sum(2)


# --- PAFU ----------------------------------------------------------------------------------------------------------


def pafu_cases() -> Iterator[Case]:
    """PAFU with 3×3 kernels, selected evenly at random (the worst case): eval, and a training step with exact gradients."""
    for variant, build in (("eval", _eval_steps), ("train", _train_steps)):
        for n in (4, 8, 16):
            for shape in SHAPES:
                images, c, size = SHAPES[shape]
                flops, passes = 18 * images * (c * size) ** 2, 3 if variant == "eval" else 3 + n  # a score a kernel
                yield Case("pafu", shape, f"{variant} n={n}", partial(build, shape, n), flops, passes=passes)


def _group(shape: str, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, c, size = SHAPES[shape]
    kernel = (torch.randn(c, c, 3, 3) * 0.05).requires_grad_()
    further = (torch.randn(n - 1, c, 3, 3, c) * 0.05).movedim(-1, 2).requires_grad_()
    return _parameter(images, c, size, size), kernel, further, torch.randint(0, n, (images, size, size))


def _eval_steps(shape: str, n: int) -> dict[str, Step]:
    x, kernel, further, index = _group(shape, n)
    tensors = (x, kernel, further, index)
    ours = partial(pafu_conv, *tensors, padding=(1, 1))
    steps = {"ours": Step(ours, tensors), "torch": Step(partial(ours, backend="torch"), tensors)}
    return steps | _convolutions(x, 3)


def _train_steps(shape: str, n: int) -> dict[str, Step]:
    """Against two dense ways to the same straight-through gradients."""
    x, kernel, further, index = _group(shape, n)
    soft = torch.randn(index.shape[0], n, *index.shape[1:]).softmax(1).requires_grad_()
    kernels = torch.cat([kernel[None], further]).detach().flatten(0, 1).requires_grad_()

    def one_hot() -> Tensor:
        return F.one_hot(index, n).movedim(-1, 1).to(soft.dtype) + soft - soft.detach()

    def stacked() -> Tensor:
        return (F.conv2d(x, kernels, padding=1).unflatten(1, (n, -1)) * one_hot()[:, :, None]).sum(1)

    def one_by_one() -> Tensor:
        z = one_hot()
        parts = [F.conv2d(x, k, padding=1) * z[:, i : i + 1] for i, k in enumerate(kernels.chunk(n))]
        return sum(parts[1:], parts[0])

    ours = partial(pafu_conv, x, kernel, further, index, soft, padding=(1, 1))
    tensors = (x, kernel, further, index, soft)
    return {
        "ours": Step(ours, tensors),
        "torch": Step(partial(ours, backend="torch"), tensors),
        "stacked": Step(stacked, (x, kernels, soft)),
        "one by one": Step(one_by_one, (x, kernels, soft)),
    }


OPERATORS: dict[str, Callable[[], Iterator[Case]]] = {"acda": acda_cases, "dconv": dconv_cases, "pafu": pafu_cases}


# --- what they are held to -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Target:
    """A row of numbers to beat: `a` over `b` for each shape, "<=" or ">=" `must` and `aim`.

    `measure` is "forward", "both" (forward and backward, CPU ms), "peak" (bytes) or "saved" (bytes beyond the inputs, over
    those of x). Names joined by "|" mean the better of several steps.
    """

    operator: str
    variant: str
    measure: str
    a: str
    b: str
    sign: str
    must: dict[str, float] = field(default_factory=dict)
    aim: dict[str, float] = field(default_factory=dict)


def _for(shapes: str, *values: float) -> dict[str, float]:
    return dict(zip(shapes, values * len(shapes) if len(values) == 1 else values, strict=True))


def _targets() -> Iterator[Target]:
    at_least, at_most = ">=", "<="
    acda = partial(Target, operator="acda", variant="l=7")
    must, aim = _for("ABCD", 25, 16, 8, 20), _for("ABCD", 38, 24, 10, 28)
    yield acda(measure="forward", a="unfold", b="ours", sign=at_least, must=must, aim=aim)
    yield acda(measure="forward", a="multiply", b="ours", sign=at_least, must=must, aim=aim)
    must, aim = _for("ABCD", 8, 5.5, 3.5, 8), _for("ABCD", 14, 10, 6, 12)
    yield acda(measure="both", a="unfold", b="ours", sign=at_least, must=must, aim=aim)
    must, aim = _for("ABC", 0.9, 0.5, 0.4), _for("ABC", 0.6, 0.35, 0.27)
    yield acda(measure="forward", a="ours", b="conv7", sign=at_most, must=must, aim=aim)
    yield acda(measure="peak", a="ours", b="unfold", sign=at_most, must=_for("AD", 1 / 6))
    yield acda(measure="saved", a="ours", b="x", sign=at_most, must=_for("ABCD", 0))
    dconv_apply, dconv_whole = (
        partial(Target, operator="dconv", variant="apply"),
        partial(Target, operator="dconv", variant="layer"),
    )
    yield dconv_apply(measure="forward", a="unfold", b="ours", sign=at_least, must=_for("ABD", 6), aim=_for("ABD", 14))
    yield dconv_apply(measure="forward", a="ours", b="conv3", sign=at_most, aim=_for("ABD", 0.75))
    must, aim = _for("ABCD", 2.3, 1, 1, 2.3), _for("ABCD", 3, 1.3, 1.3, 3)
    yield dconv_whole(measure="both", a="unfold", b="ours", sign=at_least, must=must, aim=aim)
    yield dconv_whole(measure="peak", a="ours", b="unfold", sign=at_most, must=_for("AD", 1 / 3))
    yield dconv_whole(measure="saved", a="ours", b="x", sign=at_most, must=_for("ABCD", 0))
    for n in (4, 8, 16):
        group = partial(Target, operator="pafu")
        must, aim = _for("ABC", 1.3), _for("ABC", 1.15)
        yield group(variant=f"eval n={n}", measure="forward", a="ours", b="conv3", sign=at_most, must=must, aim=aim)
        yield group(variant=f"train n={n}", measure="saved", a="ours", b="x", sign=at_most, must=_for("ABCD", 0.05))
    for n, least, wanted in ((8, 1.35, 1.8), (16, 1.6, 2.2)):
        must, aim = _for("ABCD", least), _for("ABCD", wanted)
        dense = "stacked|one by one"
        yield group(variant=f"train n={n}", measure="both", a=dense, b="ours", sign=at_least, must=must, aim=aim)


TARGETS = list(_targets())


def half_targets() -> list[Target]:
    """In half precision the compiled operators should be faster than torch's; nothing else is asked of them."""
    cases = [case for make in OPERATORS.values() for case in make()]
    variants = dict.fromkeys((case.operator, case.variant) for case in cases)
    return [
        Target(operator=operator, variant=variant, measure=measure, a="torch", b="ours", sign=">=", aim=_for("ABCD", 1))
        for operator, variant in variants
        for measure in ("forward", "both")
    ]
