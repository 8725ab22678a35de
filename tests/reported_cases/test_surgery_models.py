"""Reported cases of the surgery (rows B, I, K1, K5): compiled, mixed, uncopyable and empty models."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.errors import ModelError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def conv(inputs: int = 3, outputs: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


def convert(model: Any, **options: Any) -> tuple[nn.Module, surgeon.Report]:
    return surgeon.convert(model, **({"layers": "all", "type": "pafu", "example_inputs": X} | options))


@pytest.mark.parametrize("what", ["model", "submodule", "method"])
def test_compiled_models_convert_under_their_own_names(what: str) -> None:
    """B: a compiled model, submodule or method is observed as it is written, and names have no `_orig_mod`."""
    model: Any = Net().eval()
    expected = model(X)
    if what == "model":
        model = torch.compile(model, backend="eager")
    elif what == "submodule":
        model.a = torch.compile(model.a, backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    converted, report = convert(model)
    assert [r.name for r in report.replaced] == ["a", "b"]
    assert not report.skipped
    with torch.compiler.set_stance("force_eager"):
        assert torch.allclose(converted(X), expected, atol=1e-5)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pre, self.net = nn.Conv2d(3, 3, 1), nn.Sequential(conv()).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(self.pre(x).bfloat16())
        return out


class Autocast(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


@pytest.mark.parametrize("kind", [Mixed, Autocast])
def test_mixed_precision_is_judged_by_the_dtype_of_each_layer(kind: type[nn.Module]) -> None:
    """I: a float32 stem with a bfloat16 body, autocast in forward."""
    _, report = convert(kind().eval())
    assert report.exact


def test_autocast_around_the_conversion_is_off_while_measuring() -> None:
    """I: convert inside of autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, report = convert(Net().eval())
        assert torch.is_autocast_enabled("cpu")
    assert report.max_rel_error is not None
    assert report.max_rel_error < 1e-5


def test_outputs_of_denormal_size_are_measured_by_what_they_can_hold() -> None:
    """I: outputs of 1e-41 have lost their digits."""
    model = Net().eval()
    with torch.no_grad():
        model.b.weight.mul_(1e-41)
        model.b.bias.mul_(1e-41)
    _, report = convert(model, layers="b")
    assert report.exact


def test_what_deepcopy_refuses_is_copied_or_one_clear_error() -> None:
    """K1: computed tensors in lists, locks; and what nobody can copy."""
    model: Any = Net().eval()
    model.kept, model.lock = [model.a.weight * 2], threading.Lock()
    assert len(convert(model)[1].replaced) == 2
    for inplace in (False, True):
        model.odd = (i for i in range(3))
        with pytest.raises(ModelError, match="cannot be copied"):
            convert(model, inplace=inplace)


def test_inference_mode_works_and_models_without_data_are_refused() -> None:
    """K5: convert under inference_mode; a model on the meta device."""
    with torch.inference_mode():
        converted, report = convert(Net().eval())
    assert len(report.replaced) == 2
    assert torch.isfinite(converted(X)).all()
    with pytest.raises(ModelError, match="without data"):
        convert(Net().to("meta"))
