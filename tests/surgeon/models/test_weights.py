"""Weights of models: where they come from, that they are the recorded ones, and files that hold something else."""

import argparse
import collections
import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from surgeon.errors import ModelError
from surgeon.models.identify import identify
from surgeon.models.names import build_model, build_structure, restore, shapes_of
from surgeon.models.sources import as_published
from surgeon.models.weight_files import load_weights_file, read_weights
from surgeon.models.weights import reachable, state_sha256
from surgeon.records.recipe import BaseModel, Weights, get_recipe
from surgeon.surgery.convert import convert
from tests.support.tiny_models import TINY, dangerous, random_model


def test_random_weights_follow_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = state_sha256(random_model(TINY, seed=5)[0])
    before = torch.get_rng_state()
    torch.manual_seed(2)
    assert state_sha256(random_model(TINY, seed=5)[0]) == first
    assert state_sha256(random_model(TINY, seed=6)[0]) != first
    torch.manual_seed(1)
    random_model(TINY, seed=5)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers are his own"


def test_auto_goes_on_loudly_without_pretrained_weights(caplog: pytest.LogCaptureFixture) -> None:
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        _, base = build_model(TINY, weights="auto", seed=4)
    assert base is not None
    assert base.weights.kind == "random"
    assert "RANDOM WEIGHTS from seed 4" in caplog.text
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("spec", [TINY, "torchvision/squeezenet1_1", "zoo/resnet20_cifar", "torch.nn:Identity"])
def test_pretrained_fails_where_there_are_none(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no network in tests")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(ModelError, match=r"pretrained weights of .* are unavailable"):
        build_model(spec, weights="pretrained")


def test_a_host_that_does_not_answer_costs_no_time() -> None:
    started = time.monotonic()
    assert not reachable("https://localhost:1", patience=1.0)
    assert not reachable("https://surgeon.invalid", patience=1.0)
    assert time.monotonic() - started < 3


def test_a_local_hub_folder_is_pretrained(tmp_path: Path) -> None:
    source = timm.create_model(TINY, num_classes=5)
    from timm.models import save_for_hf

    save_for_hf(source, tmp_path / "hub", model_config={"num_classes": 5}, safe_serialization=True)
    model, base = build_model(f"local-dir:{tmp_path / 'hub'}", weights="pretrained")
    assert base is not None
    assert (base.name, base.weights.kind, base.kwargs["num_classes"]) == (TINY, "pretrained", 5)
    assert state_sha256(model) == state_sha256(source)
    assert type(build_structure(base)) is type(source)
    assert state_sha256(restore(base)) == state_sha256(source)


def test_torchvision_keeps_the_structure_that_goes_with_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detectors have frozen norms only with weights; a rebuilt one must have them too, without any download."""
    from torchvision.models import WeightsEnum

    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    bare = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    state = {k: v for k, v in bare.state_dict().items() if not k.endswith("num_batches_tracked")}
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, *args, **kwargs: state)
    model, base = build_model(f"torchvision/{name}", weights="pretrained")
    assert base is not None
    assert base.kwargs == {"weights": "COCO_V1"}
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, *args, **kwargs: pytest.fail("a download"))
    assert repr(build_structure(base)) == repr(model)
    assert "Frozen" in repr(model)
    found = identify(model)
    assert found is not None
    assert found.kwargs == base.kwargs
    assert nn.Linear(2, 2).load_state_dict({"weight": torch.ones(2, 2), "bias": torch.ones(2)}) is not None


def test_torchvision_gets_a_new_head_over_published_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As timm does; torchvision refuses another number of classes than its weights have, and got random weights for it."""
    from torchvision.models import WeightsEnum

    name = "lraspp_mobilenet_v3_large"
    published = torchvision.models.get_model(name, weights=None, weights_backbone=None).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, *args, **kwargs: published)
    model, base = build_model(f"torchvision/{name}", weights="pretrained", num_classes=5)
    assert base is not None
    assert (base.kwargs, base.weights.kind) == ({"num_classes": 5}, "pretrained")
    found = model.state_dict()
    new = [key for key, value in found.items() if not torch.equal(value, published[key])]
    assert {key.rpartition(".")[0] for key in new} == {"classifier.low_classifier", "classifier.high_classifier"}
    assert repr(build_structure(base)) == repr(model)


def weights_file(folder: Path, name: str, state: dict[str, torch.Tensor]) -> Path:
    file = folder / name
    prefixed = {f"module.{key}": value for key, value in state.items()}
    if file.suffix == ".safetensors":
        safetensors.torch.save_file(prefixed, file)
    else:
        torch.save({"epoch": 3, "state_dict": prefixed}, file)
    return file


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt", "w.bin"])
def test_weights_from_a_file(tmp_path: Path, name: str) -> None:
    source = timm.create_model(TINY)
    file = weights_file(tmp_path, name, source.state_dict())
    model, base = build_model(TINY, weights=str(file))
    assert base is not None
    assert state_sha256(model) == state_sha256(source)
    recorded = str(file) if file.suffix == ".safetensors" else f"{file}:state_dict"
    assert base.weights == Weights(kind="file", path=recorded, sha256=state_sha256(source))
    assert state_sha256(restore(base)) == state_sha256(source)


def test_weights_of_another_model_list_the_first_mismatches(tmp_path: Path) -> None:
    state = timm.create_model(TINY, num_classes=10).state_dict()
    state["extra.weight"] = state.pop("conv1.0.weight")
    file = weights_file(tmp_path, "w.pth", state)
    with pytest.raises(ModelError) as caught:
        build_model(TINY, weights=str(file))
    for word in (
        "another model",
        "missing conv1.0.weight",
        "unexpected extra.weight",
        "fc.weight has shape (10, 96), expected (1000, 96)",
    ):
        assert word in str(caught.value)


def with_classes(classes: int = 5, width: int = 3, **others: Any) -> nn.Module:
    return timm.create_model(TINY, num_classes=classes, in_chans=width, **others)


def fixed() -> nn.Module:
    return timm.create_model(TINY)


# --- files of several state dicts -------------------------------------------------------------------------------------


def saved(folder: Path, name: str, content: object) -> Path:
    torch.save(content, folder / name)
    return folder / name


def two_states() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return timm.create_model(TINY).state_dict(), timm.create_model(TINY).state_dict()


@pytest.mark.parametrize("keys", ["state_dict state_dict_ema", "params_ema params", "net ema", "model model_ema"])
def test_averaged_weights_come_first_and_that_is_told(
    tmp_path: Path, keys: str, caplog: pytest.LogCaptureFixture
) -> None:
    states = dict(zip(keys.split(), two_states(), strict=True))
    averaged = next(key for key in states if "ema" in key)
    (plain,) = states.keys() - {averaged}
    file = saved(tmp_path, "w.pth", {"epoch": 3, **states})
    model, base = build_model(TINY, weights=str(file))
    assert base is not None
    assert caplog.messages == [f"{file}: took {averaged}; {file}:{plain} takes those instead"]
    assert base.weights.path == f"{file}:{averaged}"
    assert torch.equal(model.state_dict()["fc.weight"], states[averaged]["fc.weight"])
    assert state_sha256(restore(base)) == state_sha256(model)
    other, base = build_model(TINY, weights=f"{file}:{plain}")
    assert base is not None
    assert base.weights.path == f"{file}:{plain}"
    assert torch.equal(other.state_dict()["fc.weight"], states[plain]["fc.weight"])
    assert state_sha256(restore(base)) == state_sha256(other)
    with pytest.raises(ModelError, match=rf"has no state dict 'nett'; it has {' and |, '.join(states)}"):
        build_model(TINY, weights=f"{file}:nett")


@pytest.mark.parametrize("key", ["model_state_dict", "generator"])
def test_the_state_dict_under_any_key(tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture) -> None:
    source = timm.create_model(TINY)
    loss = torch.stack([p.square().mean() for p in source.parameters()]).sum()
    optimizer = torch.optim.AdamW(source.parameters())
    loss.backward()
    optimizer.step()
    other = {"discriminator": timm.create_model("test_vit").state_dict()} if key == "generator" else {}
    file = {key: source.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "epoch": 1, "loss": 0.1, **other}
    model, _ = build_model(TINY, weights=str(saved(tmp_path, "w.pth", file)))
    assert state_sha256(model) == state_sha256(source)
    assert not caplog.messages


def test_what_training_scripts_put_beside_the_weights(tmp_path: Path) -> None:
    source = timm.create_model(TINY)
    beside = {
        "args": argparse.Namespace(lr=0.1, output=Path("out")),  # as timm
        "metric": np.float64(81.5),
        "epochs": np.arange(3),
        "crop": slice(0, 2),
    }
    model, _ = build_model(TINY, weights=str(saved(tmp_path, "w.pth", {"state_dict": source.state_dict(), **beside})))
    assert state_sha256(model) == state_sha256(source)
    model, _ = build_model(TINY, weights=str(saved(tmp_path, "w.pth", source.state_dict() | {"epoch": 3})))
    assert state_sha256(model) == state_sha256(source)


def test_what_cannot_be_read_without_code_is_named(tmp_path: Path) -> None:
    file = saved(tmp_path, "w.pth", {"state_dict": {}, "history": collections.defaultdict(list, loss=[0.1])})
    with pytest.raises(ModelError, match=r"holds Python objects \(collections.defaultdict\)"):
        read_weights(file)


def test_names_below_a_prefix(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = two_states()
    lightning = {f"model.{name}": value for name, value in first.items()} | {"loss.weight": torch.ones(2)}
    file = saved(tmp_path, "w.ckpt", {"state_dict": lightning, "hyper_parameters": {"lr": 0.1}})
    model, base = build_model(TINY, weights=str(file))
    assert base is not None
    assert torch.equal(model.state_dict()["fc.weight"], first["fc.weight"])
    assert caplog.messages == [f"{file}: 1 tensor that is not the model's is left out"]
    assert state_sha256(restore(base)) == state_sha256(model)
    averaged = {f"module.{name}": value for name, value in first.items()} | {"n_averaged": torch.tensor(3)}
    assert load_weights_file(timm.create_model(TINY), saved(tmp_path, "swa.pth", averaged))
    both = {f"student.{name}": value for name, value in first.items()}
    both |= {f"teacher.{name}": value for name, value in second.items()}
    caplog.clear()
    file = saved(tmp_path, "both.pth", both)
    build_model(TINY, weights=str(file))
    assert caplog.messages == [f"{file}: took student; {file}:teacher takes those instead"]
    model, _ = build_model(TINY, weights=f"{file}:teacher")
    assert torch.equal(model.state_dict()["fc.weight"], second["fc.weight"])


def test_weights_of_a_converted_model_are_recognized(tmp_path: Path) -> None:
    model, _ = convert(random_model(TINY, seed=1)[0], layers="stage4", type="acda", input_size=64)
    torch.save(model.state_dict(), tmp_path / "converted.pth")
    with pytest.raises(
        ModelError, match=r"other layers in the place of layer4.0.conv1; layer4.0.conv2: a state dict of"
    ):
        build_model(TINY, weights=str(tmp_path / "converted.pth"))


@pytest.mark.parametrize(
    ("spec", "option"),
    [
        (TINY, ": num_classes=10"),
        (f"{__name__}:with_classes", r": options=\{'classes': 10\}"),
        (f"{__name__}:fixed", ""),
    ],
)
def test_weights_of_another_head_name_the_option_that_fits(tmp_path: Path, spec: str, option: str) -> None:
    file = weights_file(tmp_path, "w.pth", timm.create_model(TINY, num_classes=10).state_dict())
    with pytest.raises(ModelError, match=rf"has a head of 10 classes, and the model one of \d+ \(.*\){option}$"):
        build_model(spec, weights=str(file))


@pytest.mark.parametrize("name", ["fc.bias", "conv1.0.weight", "bn1.bias"])
def test_what_is_not_only_another_head_is_another_model(tmp_path: Path, name: str) -> None:
    state = timm.create_model(TINY, num_classes=10).state_dict()
    state[name] = torch.zeros(7, *state[name].shape[1:])
    file = weights_file(tmp_path, "w.pth", state)
    with pytest.raises(
        ModelError, match=r"another model: .*Check the model's name and its options \(options=\{\.\.\.\}\)\.$"
    ):
        build_model(TINY, weights=str(file))


class Evil:
    """Would run code when unpickled."""

    def __reduce__(self) -> Any:
        return (dangerous, ())


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 truncated"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_unreadable_weights_are_one_error(tmp_path: Path, content: bytes, suffix: str) -> None:
    file = tmp_path / f"w{suffix}"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"cannot read .* as weights"):
        build_model(TINY, weights=str(file))


def test_weights_that_need_code_or_are_none(tmp_path: Path) -> None:
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(
        ModelError, match=r"holds Python objects \(.*dangerous\).* torch.save\(model.state_dict\(\), FILE\)"
    ):
        read_weights(tmp_path / "evil.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(ModelError, match=r"contains no state dict \(names and tensors\) but a dict of 'epoch': int"):
        read_weights(tmp_path / "none.pth")
    with pytest.raises(ModelError, match="there is no weights file"):
        read_weights(tmp_path / "absent.pth")


def test_restored_weights_must_be_the_recorded_ones(tmp_path: Path) -> None:
    source = timm.create_model(TINY)
    file = weights_file(tmp_path, "w.pth", source.state_dict())
    _, base = build_model(TINY, weights=str(file))
    assert base is not None
    weights_file(tmp_path, "w.pth", timm.create_model(TINY).state_dict())
    with pytest.raises(ModelError, match="not those that were converted: SHA-256"):
        restore(base)
    file.rename(tmp_path / "moved.pth")
    with pytest.raises(
        ModelError, match=rf"{TINY}, recorded as .*w\.pth:state_dict, are gone; pass their file with --weights$"
    ):
        restore(base, flag="--weights")
    given = BaseModel(source="timm", name=TINY, weights=Weights(kind="given", sha256=state_sha256(source)))
    with pytest.raises(ModelError, match=r"came from a model object and are not recorded$"):
        restore(given)
    with pytest.raises(ModelError, match=r"are not recorded; pass their file with --against-weights$"):
        restore(given, flag="--against-weights")


@pytest.mark.parametrize("kind", ["random", "file"])
def test_an_original_with_a_new_classifier_says_what_to_compare_with(tmp_path: Path, kind: str) -> None:
    """It is the network of before only with the head that its weights have."""
    file = weights_file(tmp_path, "w.pth", timm.create_model(TINY).state_dict())
    model, base = build_model(TINY, weights="random" if kind == "random" else str(file))
    assert base is not None
    assert restore(base)
    changed = dataclasses.replace(base, kwargs={**base.kwargs, "num_classes": 2})
    with pytest.raises(ModelError, match=r"got a new classifier of 2 classes .* compare with a plain run"):
        restore(changed)
    before = restore(changed, head="weights")
    assert state_sha256(before) == state_sha256(model)
    recipe = get_recipe(before)
    assert recipe is not None
    assert recipe.base is not None
    assert recipe.base.kwargs.get("num_classes", 1000) == 1000
    given = dataclasses.replace(changed, weights=Weights(kind="given"))
    with pytest.raises(ModelError, match=r"2 classes that .*w.pth never had: give the weights that it had when"):
        restore(given, weights=str(file))
    assert len(restore(given, weights=str(file), head="weights").get_parameter("fc.bias")) == 1000
    other = dataclasses.replace(changed, weights=dataclasses.replace(changed.weights, sha256="0" * 64))
    with pytest.raises(ModelError, match="not those that were converted"):
        restore(other, head="weights")


def test_shapes_are_those_of_published_weights() -> None:
    """GoogLeNet has two auxiliary classifiers only without its weights."""
    assert not {"aux1.conv.conv", "aux2.conv.conv"} & {
        name for name, _ in shapes_of("torchvision/googlenet").named_modules()
    }
    base = BaseModel(source="torchvision", name="googlenet", weights=Weights(kind="random"))
    assert as_published(base).kwargs == {"weights": "DEFAULT"}
    options = dataclasses.replace(base, kwargs={"num_classes": 3})
    assert as_published(options) == options
