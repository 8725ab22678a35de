"""Models by name: what is built, with which weights, and what is said when something cannot be had."""

import json
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum

import surgeon
from surgeon.errors import CheckpointError, ModelError
from surgeon.models.identify import identify
from surgeon.models.names import build_model, build_structure, restore
from surgeon.models.places import check_module_of, check_trust
from surgeon.models.specs import model_names
from surgeon.models.weights import state_sha256
from surgeon.records.recipe import BaseModel, Weights, get_recipe
from surgeon.util.outputs import RUN, SEARCH, TRIAL
from tests.support.tiny_models import TINY, random_model


def tiny_model() -> nn.Module:
    """A factory for the tests."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))


def sized_model(width: int = 4, *, depth: int = 1) -> nn.Module:
    """A factory with options."""
    return nn.Sequential(*(nn.Conv2d(3, width, 3) for _ in range(depth)))


# --- names --------------------------------------------------------------------------------------------------------


def test_an_opened_model_carries_how_it_was_built(tmp_path: Path) -> None:
    """A folder made of it loads by itself, and opens as a model of that folder."""
    model = surgeon.open_model(TINY, weights="random", seed=5)
    assert not model.training
    converted, _ = surgeon.convert(model, "pafu", layers="stage4", input_size=64)
    surgeon.save(converted, tmp_path / "run")
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for again in (surgeon.load(tmp_path / "run"), surgeon.open_model(str(tmp_path / "run"))):
        assert torch.equal(again(x), converted.eval()(x))
        assert get_recipe(again) == get_recipe(converted)


@pytest.mark.parametrize(
    ("spec", "source", "name", "size"),
    [
        (TINY, "timm", TINY, (3, 160, 160)),
        (f"timm/{TINY}.r160_in1k", "timm", f"{TINY}.r160_in1k", (3, 160, 160)),
        ("torchvision/squeezenet1_1", "torchvision", "squeezenet1_1", (3, 224, 224)),
        ("zoo/resnet20_cifar", "zoo", "resnet20_cifar", (3, 32, 32)),
        ("resnet20_cifar", "zoo", "resnet20_cifar", (3, 32, 32)),
        ("torch.nn:Identity", "factory", "torch.nn:Identity", ()),
    ],
)
def test_every_kind_of_name(spec: str, source: str, name: str, size: tuple[int, ...]) -> None:
    model, base = random_model(spec, seed=3)
    assert (base.source, base.name, base.input_size) == (source, name, size)
    assert (base.weights.kind, base.weights.seed) == ("random", 3)
    assert base.weights.sha256 == state_sha256(model)
    assert not model.training


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("resnet5O", ["'resnet5O'", "Did you mean resnet50"]),
        ("torchvision/resnet5", ["Did you mean", "torchvision/resnet50"]),
        ("googlenet", ["torchvision/googlenet"]),
        ("resnet20_cifr", ["zoo/resnet20_cifar"]),
        ("qqqqqqqq", ["there is no model 'qqqqqqqq'", "surgeon models"]),
        ("resnet50.a9_in1k", ["'a9_in1k'", "a1_in1k"]),
        ("no_such_package:make", ["there is no Python module 'no_such_package'", "Run this in the folder that has it"]),
        ("torch.nn:Sequentiel", ["torch.nn has no 'Sequentiel'. Did you mean 'Sequential'?"]),
        ("timm:resnet18", ["timm has no 'resnet18'. Its models are named timm/NAME, as timm/resnet18"]),
        ("os:getcwd", ["str", "not a torch.nn.Module"]),
        ("local-dir:/no/such/folder", ["/no/such/folder"]),
    ],
)
def test_unknown_names_are_one_error_with_the_nearest_ones(spec: str, words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        build_model(spec, weights="random")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_trained_plain_folder_is_the_original_of_what_is_made_of_it(tmp_path: Path) -> None:
    """Not the random or pretrained weights that its own training began with."""
    model, _ = random_model(TINY, seed=3)
    with torch.no_grad():
        next(model.parameters()).add_(1)  # the training
    surgeon.save(model, tmp_path / "plain")
    again, base = build_model(str(tmp_path / "plain"))
    assert base is not None
    assert (base.weights.kind, base.weights.path) == ("file", str(tmp_path / "plain" / "model.safetensors"))
    assert state_sha256(restore(base)) == state_sha256(again) == state_sha256(model)

    converted, report = surgeon.convert(again, layers="stage4", type="pafu", input_size=64)
    surgeon.save(converted, tmp_path / "pafu", report=report)
    assert build_model(str(tmp_path / "pafu"))[1] is not None


def test_a_folder_that_surgeon_did_not_write(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is not a model: surgeon did not write this folder: it has no recipe\.json"):
        build_model(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "told"), [(RUN, "its fine-tuning is incomplete"), (TRIAL, "incomplete trial"), (SEARCH, "is a search")]
)
def test_a_folder_that_surgeon_wrote_without_a_model_is_not_called_foreign(
    tmp_path: Path, file: str, told: str
) -> None:
    Path(tmp_path, file).parent.mkdir(parents=True, exist_ok=True)
    Path(tmp_path, file).write_text("{}")
    for error, opened in ((ModelError, build_model), (CheckpointError, surgeon.load)):
        with pytest.raises(error, match=f"is not a model: .*{told}") as caught:
            opened(str(tmp_path))
        assert "did not write" not in str(caught.value)
        assert "recipe.json" not in str(caught.value)


def test_how_to_resume_names_the_model_and_the_folder(tmp_path: Path) -> None:
    for file, command, text in ((RUN, "finetune", '{"model": "a"}'), (TRIAL, "try", '{"identity": {"model": "a"}}')):
        folder = tmp_path / command
        Path(folder, file).parent.mkdir(parents=True)
        Path(folder, file).write_text(text)
        with pytest.raises(ModelError, match=f"surgeon {command} a ... -o {re.escape(str(folder))} --resume"):
            build_model(str(folder))


def test_names_are_listed_by_glob_and_by_part() -> None:
    everything = model_names()
    assert {"resnet50", "torchvision/resnet50", "zoo/resnet20_cifar"} <= set(everything)
    assert model_names("test_res*") == [TINY]
    assert "zoo/resnet56_cifar" in model_names("56_cif")
    assert "torchvision/lraspp_mobilenet_v3_large" in model_names("lraspp*")
    assert not any("quantized" in name for name in everything)


# --- options ------------------------------------------------------------------------------------------------------


def test_options_reach_the_model_and_the_record() -> None:
    model, base = random_model(TINY, num_classes=7, input_size=(1, 64, 48), options={"drop_rate": 0.5})
    assert base.kwargs == {"num_classes": 7, "in_chans": 1, "drop_rate": 0.5}
    assert base.input_size == (1, 64, 48)
    assert model(torch.zeros(2, 1, 64, 48)).shape == (2, 7)
    rebuilt = build_structure(base)
    assert {n: v.shape for n, v in rebuilt.state_dict().items()} == {n: v.shape for n, v in model.state_dict().items()}


def test_an_input_size_of_two_numbers_keeps_the_channels() -> None:
    assert random_model(TINY, input_size=(64, 48))[1].input_size == (3, 64, 48)
    assert random_model(TINY, in_chans=1)[1].input_size == (1, 160, 160)


def test_networks_of_one_size_are_built_for_the_wanted_one() -> None:
    model, base = random_model("test_vit", input_size=(3, 96, 96))
    assert base.kwargs["img_size"] == [96, 96]
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 1000)


def test_options_that_a_model_does_not_take() -> None:
    with pytest.raises(ModelError, match=r"timm cannot build test_resnet with .*no_such_option"):
        random_model(TINY, options={"no_such_option": 1})
    with pytest.raises(ModelError, match=r"ResNet.* argument 'no_such_option'\. It takes .*global_pool"):
        random_model(TINY, options={"no_such_option": 1})
    with pytest.raises(ModelError, match=r"ResNet.*Did you mean 'block_args'\? It takes "):
        random_model(TINY, options={"blok_args": {}})
    with pytest.raises(ModelError, match=r"'num_clases'\. Did you mean 'num_classes'\? It takes "):
        random_model("torchvision/resnet18", options={"num_clases": 2})
    factory = f"{__name__}:sized_model"
    with pytest.raises(
        ModelError, match=r": sized_model\(\) got .*'widht'\. Did you mean 'width'\? It takes width, depth$"
    ):
        random_model(factory, options={"widht": 8})
    with pytest.raises(ModelError, match=r": tiny_model\(\) got .*'widht'\. It takes no arguments$"):
        random_model(f"{__name__}:tiny_model", options={"widht": 8})
    with pytest.raises(ModelError, match=r"zoo cannot build resnet20_cifar .* It takes .*num_classes"):
        random_model("resnet20_cifar", options={"no_such_option": 1})


# --- factories and foreign recipes --------------------------------------------------------------------------------


@pytest.fixture
def factories(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "my_models", sys.modules[__name__])
    return "my_models"


def test_the_name_of_an_own_file_is_not_yet_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mynet.py").touch()
    with pytest.raises(
        ModelError, match=r"'mynet': for a network in mynet\.py, name its class or function, mynet:NAME$"
    ):
        build_model("mynet")


def test_trust_is_asked_for_before_anything_is_loaded(tmp_path: Path) -> None:
    for source in ("factory", "timm"):
        (tmp_path / source).mkdir()
        (tmp_path / source / "recipe.json").write_text(json.dumps({"base": {"source": source, "name": "a:b"}}))
    check_trust(tmp_path / "timm")
    check_trust(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="the factory a:b, which is code"):
        check_trust(tmp_path / "factory")


def test_a_factory_brings_its_own_weights(factories: str) -> None:
    model, base = build_model(f"{factories}:tiny_model", seed=2)
    assert base is not None
    assert (base.source, base.weights.kind, base.weights.seed) == ("factory", "given", 2)
    assert state_sha256(restore(base, trust_factory=True)) == state_sha256(model)


def test_a_trained_folder_of_a_factory_is_the_original_too(factories: str, tmp_path: Path) -> None:
    """Not what the factory would make again."""
    model = surgeon.open_model(f"{factories}:tiny_model")
    with torch.no_grad():
        next(model.parameters()).add_(1)  # the training
    surgeon.save(model, tmp_path / "plain")
    _, base = build_model(str(tmp_path / "plain"), trust_factory=True)
    assert base is not None
    assert base.weights.kind == "file"
    assert state_sha256(restore(base, trust_factory=True)) == state_sha256(model)


def test_factories_of_recipes_do_not_run_untrusted(factories: str) -> None:
    base = BaseModel(source="factory", name=f"{factories}:dangerous", weights=Weights(kind="given"))
    for build in (build_structure, restore):
        with pytest.raises(ModelError, match="which is code"):
            build(base)


@pytest.mark.parametrize(
    ("source", "name", "kwargs"),
    [
        ("timm", TINY, {"checkpoint_path": "/tmp/evil.pth"}),
        ("timm", TINY, {"pretrained": True}),
        ("timm", TINY, {"pretrained_cfg": {"file": "/tmp/evil.pth"}}),
        ("timm", "hf-hub:someone/something", {}),
        ("timm", "local-dir:/tmp", {}),
        ("torchvision", "resnet18", {"weights_backbone": "DEFAULT"}),
    ],
)
def test_recipes_cannot_make_loading_fetch_or_unpickle(source: str, name: str, kwargs: dict[str, Any]) -> None:
    base = BaseModel(source=source, name=name, kwargs=kwargs, weights=Weights(kind="random", seed=0))
    with pytest.raises(ModelError, match="may not have"):
        build_structure(base)


# --- models given as objects --------------------------------------------------------------------------------------


def without_weights(name: str, **options: Any) -> nn.Module:
    """torchvision's own model of 5 classes; of a backbone's weights only the structure, frozen norms."""
    options = {"weights": None, "weights_backbone": None} | options
    with patch.object(WeightsEnum, "get_state_dict", return_value={}), patch.object(nn.Module, "load_state_dict"):
        return torchvision.models.get_model(name, num_classes=5, **options)


@pytest.mark.parametrize(
    ("make", "name", "kwargs"),
    [
        (lambda: timm.create_model(TINY), f"{TINY}.r160_in1k", {"num_classes": 1000}),
        (
            lambda: timm.create_model("test_efficientnet", num_classes=7, in_chans=1),
            "test_efficientnet.r160_in1k",
            {"num_classes": 7, "in_chans": 1},
        ),
        (
            lambda: timm.create_model(TINY, features_only=True, out_indices=(1, 2)),
            f"{TINY}.r160_in1k",
            {"features_only": True, "out_indices": [1, 2]},
        ),
        (lambda: torchvision.models.squeezenet1_1(), "squeezenet1_1", {}),
        (lambda: torchvision.models.resnet18(num_classes=5), "resnet18", {"num_classes": 5}),
        (lambda: torchvision.models.squeezenet1_1(num_classes=5), "squeezenet1_1", {"num_classes": 5}),
        (lambda: without_weights("lraspp_mobilenet_v3_large"), "lraspp_mobilenet_v3_large", {"num_classes": 5}),
        (
            lambda: without_weights("deeplabv3_mobilenet_v3_large", aux_loss=True),
            "deeplabv3_mobilenet_v3_large",
            {"num_classes": 5, "aux_loss": True},
        ),
        (lambda: without_weights("ssdlite320_mobilenet_v3_large"), "ssdlite320_mobilenet_v3_large", {"num_classes": 5}),
        (
            lambda: without_weights("fasterrcnn_mobilenet_v3_large_320_fpn", weights_backbone="IMAGENET1K_V1"),
            "fasterrcnn_mobilenet_v3_large_320_fpn",
            {"num_classes": 5, "weights_backbone": "IMAGENET1K_V1"},
        ),
    ],
)
def test_models_given_as_objects_are_identified(make: Any, name: str, kwargs: dict[str, Any]) -> None:
    model = make()
    base = identify(model)
    assert base is not None
    assert (base.name, base.kwargs, base.weights.kind) == (name, kwargs, "given")
    assert base.weights.sha256 == state_sha256(model)
    assert repr(build_structure(base)) == repr(model)


def changed_by_hand() -> nn.Module:
    model: Any = timm.create_model(TINY)
    model.layer1[0].act1 = nn.GELU()
    return model


@pytest.mark.parametrize(
    "make",
    [
        tiny_model,
        changed_by_hand,
        lambda: timm.create_model(TINY, output_stride=8),
        lambda: torchvision.models.resnet18(norm_layer=lambda n: nn.GroupNorm(4, n)),
    ],
)
def test_models_that_are_not_known_for_sure_are_not_identified(make: Any) -> None:
    assert identify(make()) is None


def test_modules_that_an_editable_installation_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """setuptools puts a finder of its own into `sys.meta_path`: such a package is in no folder of `sys.path`."""

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
            return ModuleSpec(name, None) if name == "installed_elsewhere" else None

    check_module_of("torchvision.models:resnet18")
    with pytest.raises(ModelError, match="there is no Python module 'installed_elsewhere'"):
        check_module_of("installed_elsewhere.nets:build")
    monkeypatch.setattr("sys.meta_path", [*sys.meta_path, Finder])
    check_module_of("installed_elsewhere.nets:build")
