"""Convolutions that are more, or other, than their attributes say, and code that reads them itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import surgeon
from surgeon.errors import NothingReplacedError, VerificationError
from surgeon.layers import DynamicConv2d
from surgeon.sites.reads import written_reads
from surgeon.sites.syntax import Read, reads_of

X = torch.randn(1, 3, 8, 8)


class Pair(nn.Module):
    """Two convolutions, `a` and `b`; children say what is odd about `a`."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


def refusal(model: nn.Module, name: str = "a", x: Tensor = X) -> str:
    """The reason why one convolution was refused while the other was converted exactly."""
    converted, report = surgeon.convert(model, layers="all", type="pafu", group_size=2, example_inputs=x)
    assert report.exact
    assert torch.allclose(converted.eval()(x), model.eval()(x), atol=1e-5)
    assert not isinstance(converted.get_submodule(name), DynamicConv2d)
    return "; ".join(next(entry for entry in report.skipped if entry.name == name).reasons)


def converted(model: nn.Module, x: Tensor = X) -> nn.Module:
    """The model with every convolution replaced, exactly."""
    result, report = surgeon.convert(model, layers="all", type="acda", atoms=2, hidden=4, example_inputs=x)
    assert report.exact
    assert not any(entry.selected for entry in report.skipped)
    return result


# --- F: more than its numbers -----------------------------------------------------------------------------------------


def test_a_pruned_convolution_is_refused() -> None:
    """F: a pruning mask is a pre-hook that writes the weight."""
    model = Pair()
    prune.l1_unstructured(model.a, "weight", 0.5)
    assert "prune.remove" in refusal(model)
    prune.remove(model.a, "weight")
    converted(model)


def test_a_hook_that_writes_what_a_convolution_computes_with_is_refused() -> None:
    """F: pre-hooks that write attributes, in whatever way."""

    def renew(conv: nn.Module, args: Any) -> None:
        conv.weight = nn.Parameter(conv.weight.detach() * 1)

    def clip(conv: nn.Module, args: Any) -> None:
        conv.weight.data.clamp_(-0.01, 0.01)

    def widen(conv: nn.Module, args: Any) -> None:
        conv.padding = (1, 1)

    for hook, written in ((renew, "weight"), (clip, "weight"), (widen, "padding")):
        model = Pair()
        model.a.register_forward_pre_hook(hook)
        assert f"calling it writes its {written}" in refusal(model)
    model = Pair()
    model.a.register_forward_pre_hook(lambda conv, args: setattr(conv, "calls", getattr(conv, "calls", 0) + 1))
    converted(model)


def test_attributes_set_on_a_convolution_go_over_to_the_new_layer() -> None:
    """F: YOLO's parsers set `m.i` and `m.f`, which the parent's forward reads; back again, too."""

    class Routed(Pair):
        def __init__(self) -> None:
            super().__init__()
            for index, conv in enumerate((self.a, self.b)):
                conv.i, conv.f, conv.type = index, -1, "conv"

        def forward(self, x: Tensor) -> Tensor:
            for conv in self.children():
                assert (conv.f, conv.type) == (-1, "conv")
                x = conv(x) + conv.i
            return x

    result = converted(Routed())
    assert (result.b.i, result.b.f) == (1, -1)
    back = surgeon.revert(result)
    assert (back.b.i, back.b.f) == (1, -1)
    assert not hasattr(back.b, "config")


def test_the_input_may_be_named() -> None:
    """F: conv(input=x)."""

    class Named(Pair):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(input=self.a(input=x))
            return out

    converted(Named())


class Scaled(nn.Conv2d):
    gain = 2.0

    def forward(self, input: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(input) if scale == 1 else scale * super().forward(input)

    def twice(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_convolution_called_with_more_than_its_input_is_refused() -> None:
    """F: extra arguments."""

    class Model(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.a = Scaled(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x, scale=2.0))
            return out

    assert "more than its input: scale=" in refusal(Model())


def test_what_the_new_layer_does_not_have_is_seen_in_the_source() -> None:
    """F: attributes and methods of a subclass that the parent's forward uses."""

    class Model(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.a = Scaled(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a.twice(self.a(x)) * self.a.gain)
            return out

    told = refusal(Model())
    assert "its gain is read by Model.forward" in told
    assert "its twice is read by Model.forward" in told


def test_a_failure_of_the_converted_model_is_not_blamed_on_the_inputs() -> None:
    """F: what only shows when the converted model runs."""

    class Model(Pair):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = vars(self)["_modules"]["a"].transposed or self.b(self.a(x))
            return out

    with pytest.raises(VerificationError, match=r"fails where the original runs: AttributeError: .*transposed"):
        surgeon.convert(Model(), layers="all", type="pafu", example_inputs=X)


# --- G: attributes and weight disagree --------------------------------------------------------------------------------


def _numbers(conv: nn.Conv2d) -> None:
    conv.stride, conv.padding, conv.dilation = 1, 1, 1


def _gray(conv: nn.Conv2d) -> None:
    conv.weight = nn.Parameter(conv.weight.detach().sum(1, keepdim=True))


def _later_same(conv: nn.Conv2d) -> None:
    conv.padding, conv.dilation = "same", (2, 2)


def _later_reflect(conv: nn.Conv2d) -> None:
    conv.padding_mode, conv.padding = "reflect", (2, 2)  # torch goes on with what it computed for (1, 1)


def _other_window(conv: nn.Conv2d) -> None:
    conv.weight = nn.Parameter(torch.randn(4, 3, 5, 5))


@pytest.mark.parametrize("change", [_numbers, _gray, _later_same, _later_reflect, _other_window])
def test_geometry_is_that_of_the_computation(change: Any) -> None:
    """G: attributes that were changed later, or left behind."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    change(model[0])
    converted(model, X[:, :1] if change is _gray else X)


def test_a_convolution_that_cannot_run_does_not_stop_the_others() -> None:
    """G: an unexpected failure refuses that layer."""

    class Model(Pair):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x) if self.training else x[:, :1].expand(-1, 4, -1, -1))
            return out

    for broken in ({"stride": (1, 1, 1)}, {"groups": 3}, {"padding": "same", "stride": (2, 2)}):
        model = Model()
        vars(model.a).update(broken)
        result, report = surgeon.convert(model, layers="all", type="pafu", example_inputs=X)
        assert isinstance(result.b, DynamicConv2d)
        assert {entry.name for entry in report.skipped} == {"a"}


# --- J, K9: code that reads a weight ----------------------------------------------------------------------------------


class Helped(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x))
        return y + self._aux(x) if self.training else y

    def _aux(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.a.weight * 2, padding=1)


class Aliased(Pair):
    def forward(this, x: Tensor) -> Tensor:
        conv = this.a
        w = conv.weight
        y: Tensor = this.b(this.a(x))
        return y + F.conv2d(x, w, padding=1) if this.training else y


class Looped(Pair):
    def loss(self) -> Tensor:
        return torch.stack([conv.weight.norm() for conv in (self.a,)]).sum() + self.penalty()

    def penalty(self) -> Tensor:
        weights = (getattr(m, "weight", None) for name, m in self.named_children() if name == "a")
        return sum((w.norm() for w in weights if w is not None), torch.zeros(()))


class Nested(Pair):
    def forward(self, x: Tensor) -> Tensor:
        def inner(scale: float) -> Tensor:
            return F.conv2d(x, self.a.weight * scale, padding=1)

        y: Tensor = self.b(self.a(x))
        return y + inner(2) if self.training else y


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1)])
        self.b = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, i: int = 0) -> Tensor:
        y: Tensor = self.b(self.convs[0](x))
        return F.conv2d(x, self.convs[i].weight, padding=1) if self.training else y


class Called(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x))
        return y * self.fuse_weights() if self.training else y

    def fuse_weights(self) -> Tensor:
        return self.a.weight.sum()


@pytest.mark.parametrize("kind", [Helped, Aliased, Nested, Listed, Called])
def test_a_weight_that_is_read_in_training_only_forbids_the_replacement(kind: type[nn.Module]) -> None:
    """J: helpers, aliases, closures, elements of lists; the example in eval mode comes by none of them."""
    name = "convs.0" if kind is Listed else "a"
    assert f"its weight is read outside its own forward, by {kind.__name__}." in refusal(kind(), name)


def test_a_look_at_the_shape_and_upkeep_are_no_reads() -> None:
    """J: dtype and shape tell nothing of the values; methods that initialize or fuse do not compute."""

    class Model(Pair):
        def forward(self, x: Tensor) -> Tensor:
            w = self.a.weight
            return super().forward(x.to(w.dtype)) / self.b.weight.shape[0] ** self.a.weight.dim()

        def init_weights(self) -> None:
            nn.init.ones_(self.a.weight)

        def fuse(self) -> None:
            self.a.weight.data.mul_(2)

    converted(Model())


def test_a_method_without_source_is_searched_by_its_names() -> None:
    """K9: made by exec; what its names could spell counts."""
    scope: dict[str, Any] = {"Pair": Pair, "F": F}
    exec(
        "class Made(Pair):\n"
        "    def forward(self, x):\n"
        "        y = self.b(self.a(x))\n"
        "        return y + F.conv2d(x, self.a.weight, padding=1) if self.training else y\n",
        scope,
    )
    model = scope["Made"]()
    assert set(written_reads(model, {id(model.a)})) == {id(model.a)}
    with pytest.raises(NothingReplacedError, match=r"Made\.forward"):
        surgeon.convert(model, layers="all", type="pafu", example_inputs=X)


READING = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("syntax", sys.argv[1])
syntax = importlib.util.module_from_spec(spec)
sys.modules["syntax"] = syntax
spec.loader.exec_module(syntax)
sys.path.insert(0, sys.argv[2])
import sample
R, forward = syntax.Read, sample.Net.forward
found = syntax.reads_of(forward)
wanted = {R(("conv",), "weight"), R(("conv",), "bias"), R(("other",), "weight", "shape"), R(("last",), "weight")}
wanted |= {R(("other", "weight"), "shape"), R(("convs", "*"), "weight"), R(("convs",), "*", "weight")}
assert set(found) == wanted, found
scope = {}
exec(sample.TEXT, scope)
names = syntax.reads_of(scope["forward"])
assert isinstance(names, syntax.Unread) and {"conv", "weight"} <= names.names, names
assert "torch" not in sys.modules
print("read")
"""
SAMPLE = """
class Net:
    def forward(self, x):
        y = F(x, self.conv.weight, self.conv.bias, self.other.weight.shape)
        for i in range(2):
            y = F(y, self.convs[i].weight)
        last = self.last
        return F(y, last.weight)

TEXT = "def forward(self, x):\\n    return F(x, self.conv.weight)"
"""


def interpreters() -> dict[str, str]:
    """This Python, and of the other supported ones those at hand.

    pyenv's own come before the PATH, where its shims lie, which run only where they are switched on.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    found: dict[str, str | None] = {}
    for version in ("3.11", "3.12", "3.13", "3.14"):
        kept = [str(path) for path in sorted(pyenv.glob(f"{version}.*/bin/python"))]
        found[version] = next(iter(kept), None) or shutil.which(f"python{version}")
    found[f"3.{sys.version_info.minor}"] = sys.executable
    return {version: python for version, python in found.items() if python}


@pytest.mark.parametrize("python", interpreters().values(), ids=interpreters())
def test_every_python_at_hand_reads_alike(python: str, tmp_path: Path, root: Path) -> None:
    """K9: byte code differs between Pythons; `F(x, self.conv.weight)` was not found on 3.13."""
    (tmp_path / "sample.py").write_text(SAMPLE)
    (tmp_path / "reading.py").write_text(READING)
    call = [python, "-S", str(tmp_path / "reading.py"), str(root / "surgeon" / "sites" / "syntax.py"), str(tmp_path)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.stdout == "read\n", done.stderr


def test_a_read_is_told_with_what_is_taken_of_it() -> None:
    """K9: the path, the attribute, and what follows."""

    def method(self: Any) -> Any:
        return self.a.b.weight.size(0), self.c["d"].bias

    assert set(reads_of(method)) == {
        Read(("a", "b"), "weight", "size"),
        Read(("a",), "b", "weight"),
        Read(("a", "b", "weight"), "size"),
        Read(("c", "d"), "bias"),
        Read(("c",), "d", "bias"),
    }


# --- K4: one memory for many ------------------------------------------------------------------------------------------


def test_disjoint_views_of_one_vector_are_not_shared() -> None:
    """K4: regions that meet are shared, a common storage is not enough."""

    def views(model: Pair, offset: int) -> Pair:
        flat = torch.randn(1000)
        for conv, start in ((model.a, 0), (model.b, offset)):
            count = conv.weight.numel()
            conv.weight = nn.Parameter(flat[start : start + count].view(conv.weight.shape))
        return model

    settings: dict[str, Any] = {"layers": "all", "type": "pafu", "example_inputs": X, "inplace": True}
    _, report = surgeon.convert(views(Pair(), 108), **settings)
    assert len(report.replaced) == 2
    with pytest.raises(NothingReplacedError, match="shared with"):
        surgeon.convert(views(Pair(), 107), **settings)
