"""Reported cases of the surgery (rows A, C, E, H): what runs is seen, and compared for what it is."""

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.errors import NothingReplacedError, VerificationError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def conv(inputs: int = 3, outputs: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def convert(model: nn.Module, x: Any = X, **options: Any) -> tuple[nn.Module, surgeon.Report]:
    return surgeon.convert(model, **({"layers": "all", "type": "pafu", "example_inputs": x} | options))


class Holding(nn.Module):
    """Runs its convolution through a reference that `hold` makes of it."""

    def __init__(self, hold: Callable[[nn.Module], Any], call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = conv(), conv(4, 4)
        object.__setattr__(self, "held", hold(self.a))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.call(self.held, x))
        return out


HELD: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any, Tensor], Tensor]]] = {
    "list": (lambda m: [m], lambda held, x: held[0](x)),
    "tuple": (lambda m: (m,), lambda held, x: held[0](x)),
    "dict": (lambda m: {"a": [m]}, lambda held, x: held["a"][0](x)),
    "partial": (functools.partial, lambda held, x: held(x)),
    "attribute": (lambda m: m, lambda held, x: held(x)),
    "method": (lambda m: m.forward, lambda held, x: held(x)),
    "closure": (lambda m: lambda x: m(x), lambda held, x: held(x)),
}


@pytest.mark.parametrize("kind", HELD)
def test_a_convolution_held_outside_the_module_tree_is_refused(kind: str) -> None:
    """A: a convolution reached through a list, tuple, dict, partial, plain attribute, bound method or closure."""
    _, report = convert(Holding(*HELD[kind]))
    assert [r.name for r in report.replaced] == ["b"]
    (refused,) = report.skipped
    assert refused.name == "a"
    assert "outside the module tree" in refused.reasons[0]
    assert "held" in refused.reasons[0]


def test_a_replaced_convolution_that_still_runs_is_an_error() -> None:
    """A: a reference that no search finds: the old convolution is seen to compute, and the new layer not to."""
    first = conv()
    others: list[nn.Module] = [nn.Conv2d(4, 3, 1), first]

    class Again(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for module in _OTHERS:
                x = module(x)
            return x

    _OTHERS[:] = others
    model = nn.Sequential(first, Again())
    with pytest.raises(VerificationError, match="old convolution still runs"):
        convert(model, layers="0", inplace=True)
    assert model[0] is first
    _OTHERS.clear()


_OTHERS: list[nn.Module] = []  # global: neither the tree nor the attributes lead to it


class Box:
    def __init__(self, t: Tensor) -> None:
        self.t = t


class Slotted:
    __slots__ = ("t",)

    def __init__(self, t: Tensor) -> None:
        self.t = t


class AsksForClass(nn.Module):
    def __init__(self, box: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layers, self.box = nn.ModuleList([conv(), conv(4, 4)]), box

    def forward(self, x: Tensor) -> Any:
        for m in self.layers:
            x = m(x) * 2 if isinstance(m, nn.Conv2d) else m(x)
        return self.box(x)


BOXES: dict[str, Callable[[Tensor], Any]] = {
    "object": Box,
    "slots": Slotted,
    "nested": lambda t: {"a": [Box(t)]},
    "distribution": lambda t: torch.distributions.Normal(t, 1.0),
    "generator": lambda t: (part for part in t.unbind()),
    "numpy": lambda t: t.detach().numpy(),
    "nothing": lambda t: None,
}


@pytest.mark.parametrize("kind", BOXES)
def test_a_difference_is_seen_whatever_the_output_is(kind: str) -> None:
    """C: own classes, distributions, generators, arrays, None: a model that asks for the class of its layers is caught."""
    with pytest.raises(VerificationError, match="is not equivalent to the original"):
        convert(AsksForClass(BOXES[kind]))


class Aliasing(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b, self.way = conv(), conv(4, 4), way
        self.register_buffer("out", torch.zeros(2, 4, 8, 8))
        self.kept = torch.zeros(2, 4, 8, 8)

    def forward(self, data: dict[str, Tensor]) -> Any:
        a = self.a(data["x"])
        y = self.b(a * (1 if isinstance(self.a, nn.Conv2d) else 2))
        if self.way == "buffer":
            return self.out.copy_(y)
        if self.way == "attribute":
            return self.kept.copy_(y)
        data["y"] = y
        return data


@pytest.mark.parametrize("way", ["buffer", "attribute", "input"])
def test_outputs_that_alias_something_are_compared_as_they_were(way: str) -> None:
    """C: the output is a buffer, an attribute or the input itself: the next run must not write over it."""
    model, data = Aliasing(way), {"x": X.clone()}
    with pytest.raises(VerificationError, match="is not equivalent"):
        convert(model, (data,))
    assert list(data) == ["x"]
    assert torch.equal(data["x"], X)
    assert not model.kept.any()


def test_an_output_without_tensors_is_said_so() -> None:
    """C: nothing of the output can be compared: the report says it, and modules inside decide."""
    model = nn.Sequential(conv(), nn.ReLU(), conv(4, 4))
    model.register_forward_hook(lambda module, args, out: "done")
    _, report = convert(model)
    assert any("no tensor of the output can be compared" in note for note in report.notes)


class InPlace(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(super().forward(x))


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mul_(2)


def patched_forward() -> nn.Conv2d:
    module = conv()
    own = module.forward
    module.forward = lambda x: own(x) + 1
    return module


def patched_inner() -> nn.Conv2d:
    module = conv()
    module._conv_forward = lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), w, b)
    return module


class OnLargeInput(nn.Conv2d):
    """A plain convolution on all inputs but those of the model."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out.mul_(2) if x.shape[-1] == 32 else out


ODD: dict[str, Callable[[], nn.Conv2d]] = {
    "in-place activation": lambda: InPlace(3, 4, 3, padding=1),
    "in-place factor": lambda: Scaled(3, 4, 3, padding=1),
    "patched forward": patched_forward,
    "patched _conv_forward": patched_inner,
    "seen in the run alone": lambda: OnLargeInput(3, 4, 3, padding=1),
}


@pytest.mark.parametrize("kind", ODD)
def test_one_convolution_that_does_more_is_refused_alone(kind: str) -> None:
    """E: a convolution that computes more than its numbers is refused with its reason, the others are converted."""
    x = torch.randn(1, 3, 32, 32)
    model = nn.Sequential(ODD[kind](), nn.ReLU(), conv(4, 4)).eval()
    converted, report = convert(model, x)
    assert [r.name for r in report.replaced] == ["2"]
    assert report.skipped[0].reasons
    assert torch.allclose(model(x), converted(x), atol=1e-5)
    with pytest.raises(NothingReplacedError):
        convert(model, x, layers="0")


class Stateful(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.c, self.r, self.h, self.way = conv(), conv(4, 4), None, way
        self.register_buffer("seen", torch.zeros(1))
        self.own, self.numpy_own = torch.Generator().manual_seed(3), np.random.default_rng(3)
        self.history: list[Tensor] = []
        self.state = Box(torch.zeros(1))

    def forward(self, x: Any) -> Tensor:
        y: Tensor = self.c(x if isinstance(x, Tensor) else x.pop())
        if self.way == "attribute":
            y = self.h = y if self.h is None else y + torch.tanh(self.r(self.h))
        elif self.way == "list":
            self.history.append(y)
            y = sum(self.history[1:], self.history[0])
        elif self.way == "object":
            self.state.t = y = y + self.state.t
        elif self.way == "buffer":
            self.seen = self.seen + 1
            y = y * self.seen
        elif self.way == "input in place":
            x.sub_(1)
        else:
            factors = {
                "python": random.random,
                "numpy": np.random.rand,
                "generator": lambda: float(torch.rand(1, generator=self.own)),
                "numpy generator": self.numpy_own.random,
            }
            y = y * factors.get(self.way, lambda: 1.0)()
        return self.r(y)


WAYS = [
    "attribute",
    "list",
    "object",
    "buffer",
    "input in place",
    "pop",
    "python",
    "numpy",
    "generator",
    "numpy generator",
]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_runs_are_independent_of_each_other(way: str, inplace: bool) -> None:
    """H: state in attributes, lists, objects and buffers, changed inputs, every random state: all runs start alike."""
    model, x = Stateful(way), X.clone()
    given = [x] if way == "pop" else x
    before = (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        model.own.get_state(),
        model.numpy_own.bit_generator.state,
    )
    converted, report = convert(model, (given,), inplace=inplace)
    assert len(report.replaced) == 2
    assert torch.equal(x, X)
    assert way != "pop" or len(given) == 1
    for m in (model, converted):
        assert m.h is None
        assert not m.history
        assert not m.state.t.any()
        assert not m.seen.any()
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(model.own.get_state(), before[2])
    assert model.numpy_own.bit_generator.state == before[3]


def test_an_original_that_differs_from_itself_is_said_so() -> None:
    """H: randomness that nobody can seed: the error blames the original, not the conversion."""

    class Unseeded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = conv()

        def forward(self, x: Tensor) -> Tensor:
            return self.c(x) * random.SystemRandom().random()

    with pytest.raises(VerificationError, match="the original model is not deterministic"):
        convert(Unseeded())


def test_a_failure_of_the_converted_model_is_told_as_such() -> None:
    """F, H: what breaks after the surgery is not the fault of the inputs."""

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = conv()

        def forward(self, x: Tensor) -> Tensor:
            if not isinstance(self.c, nn.Conv2d):
                raise AttributeError("no convolution")
            out: Tensor = self.c(x)
            return out

    with pytest.raises(VerificationError, match="the converted model fails where the original runs"):
        convert(Asks())
