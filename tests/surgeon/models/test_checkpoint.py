"""Folders of converted models: they come back whole, and nothing half-written or foreign ever counts as one."""

import copy
import importlib
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from surgeon.cli import main
from surgeon.errors import CheckpointError, ModelError, RecipeError, SurgeonError
from surgeon.layers.base import DynamicConv2d
from surgeon.models.checkpoint import load, read_report, save
from surgeon.models.names import build_model, chosen_size, open_model, restore
from surgeon.records.recipe import BaseModel, Recipe, Weights, get_recipe, set_recipe
from surgeon.records.report import Report
from surgeon.surgery.convert import convert
from tests.support.tiny_runs import X, contents, run_python, tiny, with_dynamic


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tiny(), tmp_path / "run")
    return tmp_path / "run"


# --- there and back -----------------------------------------------------------------------------------------------


def test_a_saved_model_comes_back(tmp_path: Path) -> None:
    model = tiny()
    save(model, tmp_path / "deep" / "run", report=Report(replaced=[], skipped=[], model="test_resnet"))
    assert sorted(contents(tmp_path / "deep" / "run")) == [
        "README.md",
        "model.safetensors",
        "recipe.json",
        "report.json",
        "report.txt",
    ]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["run"]
    back = load(tmp_path / "deep" / "run")
    assert type(back) is type(model)
    assert not back.training
    assert torch.equal(back(X), model(X))
    assert list(back.state_dict()) == list(model.state_dict())
    report = read_report(tmp_path / "deep" / "run")
    assert report is not None
    assert report.model == "test_resnet"
    recipe = get_recipe(back)
    assert recipe is not None
    assert recipe == Recipe.read(tmp_path / "deep" / "run")
    assert [(rule.layers, rule.type, rule.options["group_size"]) for rule in recipe.rules] == [
        ("layer3.0.conv2", "pafu", 3),
        ("layer4.0.conv1", "pafu", 3),
    ]


@pytest.mark.parametrize(
    ("made", "given", "size"),
    [
        (lambda: timm.create_model("test_resnet"), {"example_inputs": torch.zeros(1, 3, 64, 48)}, (3, 64, 48)),
        (lambda: timm.create_model("test_resnet"), {"input_size": 64}, (3, 64, 64)),
        (lambda: timm.create_model("test_resnet"), {}, (3, 160, 160)),
        (lambda: open_model("test_resnet", weights="random"), {"input_size": 64}, (3, 64, 64)),
    ],
)
def test_the_size_given_to_a_conversion_is_recorded(tmp_path: Path, made: Any, given: Any, size: Any) -> None:
    """Tasks run a model at it, also before the model was saved."""
    model, _ = convert(made(), "pafu", layers="layer4.0.conv1", check=False, **given)
    save(model, tmp_path / "run")
    base = Recipe.read(tmp_path / "run").base
    assert base is not None
    assert base.input_size == size
    chosen = None if size == (3, 160, 160) else size
    assert chosen_size(model) == chosen_size(load(tmp_path / "run")) == chosen


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    model = tiny()
    for number in range(8):
        save(model, tmp_path / str(number))
    assert len({(tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(8)}) == 1


@pytest.mark.parametrize("kind", ["acda", "pafu", "sekg"])
def test_every_layer_type_comes_back(tmp_path: Path, kind: str) -> None:
    model = with_dynamic(timm.create_model("test_efficientnet").eval(), "conv_stem", "blocks.1.0.conv_exp", kind=kind)
    for parameter in model.parameters():  # trained, so that no initial value can hide a lost tensor
        parameter.data += 0.01 * torch.randn_like(parameter)
    save(model, tmp_path / "run")
    assert torch.equal(load(tmp_path / "run")(X), model(X))


def test_it_comes_back_in_a_fresh_process(saved: Path) -> None:
    code = (
        "import sys, surgeon, torch; sys.modules['socket'].socket = None\n"
        f"m = surgeon.load({str(saved)!r}); x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))\n"
        "print(repr(m(x).double().sum().item()))"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == load(saved)(X).double().sum().item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    save(model, tmp_path / "run")
    back = load(tmp_path / "run")
    assert {name: value.dtype for name, value in back.state_dict().items()} == {
        name: value.dtype for name, value in model.state_dict().items()
    }
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))


def test_mixed_dtypes_are_kept(tmp_path: Path) -> None:
    model: Any = tiny()
    model.fc.to(torch.bfloat16)
    save(model, tmp_path / "run")
    back: Any = load(tmp_path / "run")
    assert back.fc.weight.dtype == torch.bfloat16
    assert back.conv1[0].weight.dtype == torch.float32


def test_layouts_and_views_are_saved_by_value(tmp_path: Path) -> None:
    model: Any = tiny().to(memory_format=torch.channels_last)
    wide = torch.randn(1000, 2 * 96)
    model.fc.weight.data = wide[:, ::2]
    save(model, tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").stat().st_size < 12e6
    assert all(torch.equal(a, b) for a, b in zip(load(tmp_path / "run").parameters(), model.parameters(), strict=True))


class Tied(nn.Module):
    """One convolution under two names, and a tied parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.again = self.first
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.third = nn.Conv2d(3, 3, 3, padding=1)
        self.third.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.again(self.first(x))))


def test_shared_modules_and_tied_parameters_are_saved_once_and_stay_shared(tmp_path: Path) -> None:
    model = with_dynamic(Tied().eval(), "first")
    save(model, tmp_path / "run")
    from safetensors import safe_open

    with safe_open(tmp_path / "run" / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    assert "third.weight" not in names
    assert not any(name.startswith("again.") for name in names)
    back: Any = load(tmp_path / "run", base=Tied())
    assert back.first is back.again
    assert isinstance(back.first, DynamicConv2d)
    assert back.third.weight is back.second.weight
    assert torch.equal(back(X), model(X))


def test_a_layer_that_is_switched_off_stays_off(tmp_path: Path) -> None:
    model: Any = tiny()
    model.layer4[0].conv1.adaptive = False
    save(model, tmp_path / "run")
    back: Any = load(tmp_path / "run")
    assert not back.layer4[0].conv1.adaptive
    assert back.layer3[0].conv2.adaptive


def test_a_head_that_was_changed_after_the_conversion_is_noticed(tmp_path: Path) -> None:
    model: Any = tiny()
    _, base = build_model("test_resnet", weights="random")
    assert base is not None
    set_recipe(model, Recipe(rules=(), base=base))
    model.reset_classifier(7)
    save(model, tmp_path / "run")
    back: Any = load(tmp_path / "run")
    assert back.fc.out_features == 7
    assert torch.equal(back(X), model(X))
    recipe = get_recipe(back)
    assert recipe is not None
    assert recipe.base is not None
    assert recipe.base.weights == base.weights, "where the weights came from is still known"


def _brighter_features(self: Any, x: Tensor) -> Any:
    return type(self).forward_features(self, 2 * x)


@pytest.mark.parametrize("named", [True, False], ids=["opened", "an object"])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(
            model, "forward", types.MethodType(lambda self, x: type(self).forward(self, 2 * x), model)
        ),
        lambda model: setattr(model.bn1, "eps", 0.1),
        lambda model: setattr(model, "forward_features", types.MethodType(_brighter_features, model)),
    ],
    ids=["forward", "attribute", "method"],
)
def test_what_was_changed_by_hand_is_not_rebuilt_without_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Any, named: bool
) -> None:
    model = open_model("test_resnet", weights="random") if named else timm.create_model("test_resnet").eval()
    change(model)
    converted, _ = convert(model, layers="stage4", type="pafu", input_size=64, check=False)
    save(converted, tmp_path / "run")
    assert f"{tmp_path / 'run'}: no way to rebuild this ResNet is known" in caplog.text
    with pytest.raises(CheckpointError, match="base=MODEL"):
        load(tmp_path / "run")


def test_hooks_that_are_not_saved_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    model.get_submodule("layer2").register_forward_hook(lambda module, args, output: 2 * output)
    save(model, tmp_path / "run")
    assert caplog.messages == [
        f"{tmp_path / 'run'}: forward hooks are not saved: what it loads computes without those of layer2"
    ]
    load(tmp_path / "run")


def test_a_model_of_ones_own_needs_its_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = with_dynamic(Tied().eval(), "second")
    save(model, tmp_path / "run")
    assert "base=MODEL" in caplog.text
    with pytest.raises(CheckpointError, match="base=MODEL"):
        load(tmp_path / "run")
    base = Tied()
    before = copy.deepcopy(base.state_dict())
    assert torch.equal(load(tmp_path / "run", base=base)(X), model(X))
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items()), "base is not touched"
    with pytest.raises(RecipeError, match="no layer 'second'"):
        load(tmp_path / "run", base=nn.Sequential())


def test_save_records_the_factory_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "factory_of_save.py").write_text(
        "from torch import nn\n\ndef make(width=4):\n    return nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, 3, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 3, 3)).eval()
    model, report = convert(network, layers="1", type="acda", input_size=16)
    save(model, "lost")
    with pytest.raises(CheckpointError, match=re.escape("surgeon.save(model, NEW, factory='module:NAME') records")):
        load("lost")
    with pytest.raises(CheckpointError, match=r"factory_of_save:make builds another network than this .*: .*has shape"):
        save(model, "run", factory="factory_of_save:make")
    assert not Path("run").exists()
    save(model, "run", report=report, factory="factory_of_save:make", options={"width": 6})
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(load("run", trust_factory=True)(x), model.eval()(x))
    with pytest.raises(ModelError, match="factory must be module:NAME"):
        save(model, "other", factory="make")


def test_a_factory_stands_for_the_original_only_if_it_makes_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seeded_factory.py").write_text(
        "import torch\nfrom torch import nn\n\ndef make(seed=0):\n    torch.manual_seed(seed)\n"
        "    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 3, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    make = importlib.import_module("seeded_factory").make
    x = torch.rand(1, 3, 16, 16)
    for seed in (0, 1):
        network = make(seed).eval()
        model = convert(network, layers="1", type="acda", input_size=16)[0]
        save(model, f"run{seed}", factory="seeded_factory:make")
        recipe = get_recipe(load(f"run{seed}", trust_factory=True))
        assert recipe is not None
        assert recipe.base is not None
        if seed == 0:
            assert torch.equal(restore(recipe.base, trust_factory=True)(x), network(x))
        else:
            with pytest.raises(
                ModelError, match=r"seeded_factory:make came from a model object and are not recorded; .* -w"
            ):
                restore(recipe.base, trust_factory=True, flag="-w")
            torch.save(network.state_dict(), "own.pth")
            assert torch.equal(restore(recipe.base, weights="own.pth", trust_factory=True)(x), network(x))


def test_a_wrapper_of_a_model_is_told_to_save_what_it_wraps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(torch.optim.swa_utils.AveragedModel(tiny()), tmp_path / "run")
    assert "no way to rebuild this AveragedModel" in caplog.text
    assert "It wraps a ResNet: save its .module instead" in caplog.text


def test_a_base_model_of_other_strides_is_refused(tmp_path: Path) -> None:
    save(with_dynamic(Tied().eval(), "second"), tmp_path / "run")
    for name, key, value in (("second", "stride", (2, 2)), ("first", "padding_mode", "reflect")):
        other = Tied()
        setattr(other.get_submodule(name), key, value)
        with pytest.raises(
            CheckpointError, match=f"{name} has {key} .* in the base model, and .* in the model that was"
        ):
            load(tmp_path / "run", base=other)


class Renamed(nn.Sequential):
    """Its state dict has a prefix that its submodules do not have, as some training libraries want it."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.register_state_dict_post_hook(_prefixed)
        self.register_load_state_dict_pre_hook(_unprefixed)


def _prefixed(module: nn.Module, state: dict[str, Any], prefix: str, local: Any) -> None:
    for name in list(state):
        state[f"net.{name}"] = state.pop(name)


def _unprefixed(module: nn.Module, state: dict[str, Any], *others: Any) -> None:
    for name in [name for name in state if name.startswith("net.")]:
        state[name.removeprefix("net.")] = state.pop(name)


def test_names_that_a_model_gives_its_state_dict(tmp_path: Path) -> None:
    model = with_dynamic(Renamed().eval(), "2").double()
    save(model, tmp_path / "run")
    back = load(tmp_path / "run", base=Renamed())
    assert torch.equal(back(X.double()), model(X.double()))


def test_factories_run_only_when_trusted(tmp_path: Path) -> None:
    base = BaseModel(source="factory", name="torchvision.models:squeezenet1_1", weights=Weights(kind="given"))
    import torchvision

    model = with_dynamic(torchvision.models.squeezenet1_1().eval(), "features.0")
    save(model, tmp_path / "run", base=base)
    with pytest.raises(ModelError, match="trust_factory"):
        load(tmp_path / "run")
    assert torch.equal(load(tmp_path / "run", trust_factory=True)(X), model(X))
    assert torch.equal(open_model(str(tmp_path / "run"), trust_factory=True)(X), model(X))


def test_a_factory_that_has_changed_or_is_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "changing.py").write_text(
        "from torch import nn\nWIDTH = 4\n"
        "def build(): return nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.Conv2d(WIDTH, 3, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model, base = build_model("changing:build", trust_factory=True)
    save(with_dynamic(model.eval(), "1"), tmp_path / "run", base=base)
    load(tmp_path / "run", trust_factory=True)
    monkeypatch.setattr("changing.WIDTH", 5)
    with pytest.raises(
        CheckpointError, match=r"expected \(5, .*the factory changing:build may build another network than when"
    ):
        load(tmp_path / "run", trust_factory=True)
    monkeypatch.undo()
    monkeypatch.delitem(sys.modules, "changing")
    with pytest.raises(
        ModelError, match=r"there is no Python module 'changing' in this folder or on PYTHONPATH. Run this in"
    ):
        load(tmp_path / "run", trust_factory=True)
    assert main(["evaluate", str(tmp_path / "run"), "--trust-factory", "--task", "brightness"]) == 2


# --- what is not a sound folder -----------------------------------------------------------------------------------


def test_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no surgeon folder"):
        load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"no recipe\.json"):
        load(tmp_path)
    (tmp_path / "recipe.json").write_text(Recipe(rules=()).to_json())
    with pytest.raises(CheckpointError, match="no artefact section"):
        load(tmp_path)


def damage(folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    whole = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(whole[: len(whole) // 2])
    else:
        whole[-5] ^= 1
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", ["model.safetensors is missing"]),
        ("truncated", ["model.safetensors is damaged", "bytes, expected"]),
        ("one bit", ["model.safetensors", "SHA-256", "expected"]),
    ],
)
def test_damaged_weights_are_never_loaded(saved: Path, how: str, words: list[str]) -> None:
    damage(saved, how)
    with pytest.raises(CheckpointError) as caught:
        load(saved)
    assert all(word in str(caught.value) for word in [str(saved), *words]), str(caught.value)


def rewrite_recipe(folder: Path, change: Any) -> None:
    values = json.loads((folder / "recipe.json").read_text())
    change(values)
    (folder / "recipe.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.update(version=3), ["version 3, newer than version 2"]),
        (lambda v: v["rules"][0].update(layers="layer9"), ["no layer 'layer9'"]),
        (lambda v: v["rules"][0].update(layers="fc"), ["fc cannot become pafu", "Linear"]),
        (lambda v: v["rules"].pop(), ["does not fit", "unexpected layer4.0.conv1"]),
        (lambda v: v["base"].update(name="test_efficientnet"), ["no layer 'layer3.0.conv2'"]),
        (lambda v: v["base"].update(name="resnet5O"), ["resnet5O"]),
        (lambda v: v["artefact"].pop("files"), ["does not describe model.safetensors"]),
        (
            lambda v: v["artefact"].update(files={"model.safetensors": {"bytes": "x", "sha256": 1}}),
            ["does not describe"],
        ),
        (lambda v: v["artefact"].update(static=["nothing"]), ["no layer 'nothing'"]),
    ],
)
def test_a_changed_recipe_is_one_clear_error(saved: Path, change: Any, words: list[str]) -> None:
    rewrite_recipe(saved, change)
    with pytest.raises(SurgeonError) as caught:
        load(saved)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_options_that_do_not_fit_the_weights(saved: Path) -> None:
    rewrite_recipe(saved, lambda v: v["rules"][0]["options"].update(group_size=4))
    with pytest.raises(CheckpointError, match=r"layer3\.0\.conv2.* has shape .*, expected"):
        load(saved)
