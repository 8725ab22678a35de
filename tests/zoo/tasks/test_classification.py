"""Classification: data of both kinds, transforms, mixing, heads, metrics, and what is refused."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

import surgeon
import surgeon.zoo as zoo
from surgeon.errors import ConfigError, DataError, InputError
from surgeon.models.names import restore
from surgeon.records.recipe import get_recipe
from surgeon.zoo.finetune import FinetuneConfig
from surgeon.zoo.finetune.dry import dry_run
from surgeon.zoo.tasks import create_task
from surgeon.zoo.tasks.classification import Classification
from tests.support.training.task_data import class_folders, photo


def task_of(folder: Path, **options: Any) -> Classification:
    task = create_task("classification", data=folder, **options)
    assert isinstance(task, Classification)
    return task


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    class_folders(tmp_path)
    return tmp_path


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10 as torchvision keeps it, with 20 + 10 pictures."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(name: str, content: dict[str, Any]) -> list[str]:
        blob = pickle.dumps(content)
        (folder / name).write_bytes(blob)
        return [name, hashlib.md5(blob).hexdigest()]

    def batch(count: int) -> dict[str, Any]:
        return {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(count)]}

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", [write("data_batch_1", batch(20))])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [write("test_batch", batch(10))])
    names = [f"class{i}" for i in range(10)]
    meta, checksum = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", {"filename": meta, "key": "label_names", "md5": checksum})
    return tmp_path


# --- data -------------------------------------------------------------------------------------------------------------


def test_cifar_is_found_and_read(cifar: Path) -> None:
    for data in (cifar, cifar / "cifar-10-batches-py"):
        task = task_of(data, mean=(0, 0, 0), std=(1, 1, 1))
        task.check()
        train, val = task.dataset("train"), task.dataset("val")
        assert (len(train), len(val)) == (20, 10)
        assert task.classes == [f"class{i}" for i in range(10)]
        raw = pickle.loads((cifar / "cifar-10-batches-py/test_batch").read_bytes())["data"][3].reshape(3, 32, 32)
        assert torch.equal((val[3]["input"] * 255).round().byte(), torch.from_numpy(raw))
        assert val[3]["target"].item() == 3


def test_cifar_that_is_not_there_or_damaged_is_named(cifar: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cifar-100-python.*download=true"):
        task_of(tmp_path, dataset="cifar100").check()
    (cifar / "cifar-10-batches-py/data_batch_1").write_bytes(b"half")
    with pytest.raises(DataError, match="cifar-10-batches-py"):
        task_of(cifar).check()


def test_small_pictures_are_padded_cropped_and_mirrored(cifar: Path) -> None:
    task = task_of(cifar, mean=(0, 0, 0), std=(1, 1, 1))
    train = task.dataset("train")
    raw = torch.from_numpy(pickle.loads((cifar / "cifar-10-batches-py/data_batch_1").read_bytes())["data"][0])
    padded = nn.functional.pad(raw.view(3, 32, 32), (4, 4, 4, 4))
    crops = {}
    for i in range(9):
        for j in range(9):
            crop = padded[:, i : i + 32, j : j + 32]
            crops[crop.numpy().tobytes()] = (i, j, False)
            crops[crop.flip(-1).contiguous().numpy().tobytes()] = (i, j, True)
    found = [crops[(train[20 * k]["input"] * 255).round().byte().numpy().tobytes()] for k in range(60)]
    assert len(set(found)) > 25
    assert {mirrored for _, _, mirrored in found} == {True, False}


def test_one_folder_is_divided_by_class(folders: Path) -> None:
    task = task_of(folders / "train", val_fraction=0.25)
    assert not (folders / "train/train").exists()
    train, val = task.dataset("train"), task.dataset("val")
    assert (len(train), len(val)) == (9, 3)
    assert sorted(val[index]["target"].item() for index in range(3)) == [0, 1, 2]


def test_problems_of_folders_are_named(folders: Path, tmp_path: Path) -> None:
    (folders / "train/cow/1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cow/1\.png"):
        task_of(folders).check()
    (folders / "train/cow/1.png").unlink()
    task_of(folders).check()
    photo(folders / "val/dog/0.png", 32, 32)
    with pytest.raises(DataError, match="only in train: none; only in val: dog"):
        task_of(folders).check()
    (folders / "val/dog/0.png").unlink()
    with pytest.raises(DataError, match=r"classes without an image.*dog"):
        task_of(folders).check()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no folders"):
        task_of(tmp_path / "empty").check()


# --- transforms -------------------------------------------------------------------------------------------------------


def test_validation_is_what_timm_does_for_the_model(folders: Path) -> None:
    model = timm.create_model("mobilenetv3_small_050", num_classes=3)
    task = task_of(folders)
    task.bind(model)
    from timm.data import create_transform, resolve_model_data_config

    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    expected = transform(Image.open(folders / "val/ant/0.png"))
    assert torch.equal(task.dataset("val")[0]["input"], expected)
    assert task.dataset("train")[0]["input"].shape == (3, 224, 224)


def test_options_come_before_the_model(folders: Path) -> None:
    task = task_of(folders, input_size=(3, 48, 40), mean=(0.1, 0.2, 0.3), std=(1, 2, 4))
    task.bind(timm.create_model("resnet10t", num_classes=3))
    form = task.format()
    assert (form.size, form.mean, form.std) == ((3, 48, 40), (0.1, 0.2, 0.3), (1, 2, 4))
    gray = task_of(folders, input_size=(1, 32, 32))
    assert gray.dataset("val")[0]["input"].shape == (1, 32, 32)
    for options in ({"input_size": (4, 32, 32)}, {"mean": (0.5,)}, {"std": (0, 1, 1)}):
        with pytest.raises(ConfigError):
            task_of(folders, **options).dataset("val")


@pytest.mark.parametrize(
    "options",
    [
        {"mixup": -1},
        {"dataset": "svhn"},
        {"label_smoothing": 2},
        {"mix_probability": 1.5},
        {"erase": -0.1},
        {"crop_scale": (1, 0.5)},
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        task_of(tmp_path, **options)


def test_classes_without_validation_images_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("ant", "bee", "cat"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{number}.png")
    task_of(tmp_path, val_fraction=0.4).check()
    assert caplog.text == ""
    task_of(tmp_path, val_fraction=0.2).check()
    assert "val_fraction=0.2 leaves 1 of 9 images for validation, none of the class" in caplog.text


# --- mixing and losses ------------------------------------------------------------------------------------------------


def batch_of(count: int) -> dict[str, Tensor]:
    x = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(count, 3, 8, 8).clone()
    return {"input": x, "target": torch.arange(count) % 3}


@pytest.mark.parametrize("count", [1, 4, 5])
@pytest.mark.parametrize(
    "options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1}]
)
def test_mixing_follows_the_generator_and_mixes_targets_as_pictures(
    folders: Path, count: int, options: dict[str, Any]
) -> None:
    task = task_of(folders, **options)
    batch = batch_of(count)
    before = batch["input"].clone()
    seen = set()
    for seed in range(6):
        mixed = task.augment(batch, torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        np.random.seed(seed)
        again = task.augment(batch, torch.Generator().manual_seed(seed))
        assert all(torch.equal(mixed[key], again[key]) for key in mixed)
        assert torch.equal(batch["input"], before)
        seen.add(mixed["target"].numpy().tobytes())
        assert torch.allclose(mixed["target"].sum(1), torch.ones(count))
        even = count // 2 * 2
        for index in range(count):
            partner = even - 1 - index if index < even else index
            smooth = options.get("label_smoothing", 0.0)
            value = mixed["input"][index].mean().item()
            share = (value - partner) / (index - partner) if partner != index else 1.0
            expected = torch.full((3,), smooth / 3)
            expected[index % 3] += share * (1 - smooth)
            expected[partner % 3] += (1 - share) * (1 - smooth)
            assert torch.allclose(mixed["target"][index], expected, atol=1e-5)
    assert len(seen) > 1 or count == 1


def test_without_mixing_a_batch_stays_as_it_is(folders: Path) -> None:
    batch = batch_of(4)
    assert task_of(folders).augment(batch, torch.Generator()) is batch


def test_smoothing_by_hand_and_only_once(folders: Path) -> None:
    task = task_of(folders, label_smoothing=0.3)
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    log_p = logits.log_softmax(1)[0]
    expected = -(0.8 * log_p[0] + 0.1 * log_p[1] + 0.1 * log_p[2])
    assert task.loss(logits, {"target": torch.tensor([0])}).item() == pytest.approx(expected.item())
    mixed = torch.tensor([[0.8, 0.1, 0.1]])
    assert task.loss(logits, {"target": mixed}).item() == pytest.approx(expected.item())


def test_auxiliary_classifiers_count_in_training(folders: Path) -> None:
    model = torchvision.models.googlenet(weights=None, aux_logits=True, init_weights=False, num_classes=3)
    task = task_of(folders)
    output = model.train()(torch.rand(2, 3, 64, 64))
    batch = {"target": torch.tensor([0, 2])}
    main, *others = (nn.functional.cross_entropy(part, batch["target"]) for part in output)
    assert task.loss(output, batch).item() == pytest.approx((main + 0.3 * sum(others)).item(), rel=1e-5)


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "head"),
    [
        (lambda: timm.create_model("resnet10t"), "fc"),
        (lambda: timm.create_model("mobilenetv3_small_050"), "classifier"),
        (lambda: torchvision.models.resnet18(weights=None), "fc"),
        (lambda: torchvision.models.squeezenet1_1(weights=None), "classifier.1"),
        (lambda: torchvision.models.mobilenet_v3_small(weights=None), "classifier.3"),
        (lambda: zoo.create("resnet20_cifar"), "linear"),
    ],
    ids=["timm-resnet", "timm-mobilenet", "resnet", "squeezenet", "mobilenet", "zoo"],
)
def test_the_head_follows_the_classes(folders: Path, model: Any, head: str) -> None:
    net = model().train()
    names = [name for name, _ in net.named_parameters()]
    others = {name: value.clone() for name, value in net.state_dict().items() if not name.startswith(head)}
    task = task_of(folders, input_size=(3, 64, 64))
    bound = task.bind(net)
    assert bound is net
    assert [name for name, _ in net.named_parameters()] == names
    assert net.training
    assert all(module.training for module in net.modules())
    assert net.eval()(torch.rand(2, 3, 64, 64)).shape == (2, 3)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in others.items())
    weight = net.get_submodule(head).weight.clone()
    torch.manual_seed(5)  # the new head follows from the task's seed
    again = model()
    task_of(folders, input_size=(3, 64, 64)).bind(again)
    assert torch.equal(again.get_submodule(head).weight, weight)
    task.bind(net)
    assert torch.equal(net.get_submodule(head).weight, weight)  # nothing is reset where the classes agree


def test_a_new_head_of_timm_takes_over_dtype_and_mode(folders: Path) -> None:
    model = timm.create_model("resnet10t").double().eval()
    model.layer1.train()
    task_of(folders, input_size=(3, 64, 64)).bind(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert (model.fc.training, model.layer1.training) == (False, True)


def test_auxiliary_heads_follow_too(folders: Path) -> None:
    model = torchvision.models.googlenet(weights=None, aux_logits=True, init_weights=False)
    task_of(folders, input_size=(3, 64, 64)).bind(model)
    assert [part.shape[1] for part in model.train()(torch.rand(2, 3, 64, 64))] == [3, 3, 3]


@pytest.mark.parametrize("name", ["test_resnet", "torchvision/squeezenet1_1"])
def test_a_model_that_was_given_a_size_is_trained_and_judged_at_it(folders: Path, tmp_path: Path, name: str) -> None:
    """A folder converted at 64 pixels was fine-tuned at its library's 176, and its original judged there, at chance level."""
    model = surgeon.open_model(name, weights="random", num_classes=3, input_size=(3, 64, 64))
    surgeon.save(model, tmp_path / "run")
    loaded = surgeon.load(tmp_path / "run")
    recipe = get_recipe(loaded)
    assert recipe is not None
    assert recipe.base is not None
    for given in (model, loaded, restore(recipe.base)):
        task = task_of(folders)
        task.bind(given)
        assert task.format().size == (3, 64, 64)
    (sized := task_of(folders, input_size=(3, 48, 48))).bind(loaded)
    assert sized.format().size == (3, 48, 48)
    (owned := task_of(folders)).bind(surgeon.open_model(name, weights="random", num_classes=3))
    assert owned.format().size == {"test_resnet": (3, 160, 160)}.get(name, (3, 224, 224))
    notes = dry_run(loaded, task_of(folders, train_limit=2), FinetuneConfig(batch_size=2, epochs=1)).notes
    assert any("inputs are 3x64x64, as recorded with the model" in note for note in notes)
    assert any("train_limit=2" in note for note in notes)


def test_models_that_do_not_fit_are_refused(folders: Path) -> None:
    with pytest.raises(InputError, match="is it a classifier"):
        task_of(folders, input_size=(3, 32, 32)).bind(nn.Conv2d(3, 3, 3))
    with pytest.raises(InputError, match="does not run"):
        task_of(folders, input_size=(3, 32, 32)).bind(timm.create_model("vit_tiny_patch16_224"))
    net = nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softmax(1))
    converted, _ = surgeon.convert(net, layers="0", type="pafu", input_size=(3, 16, 16))
    with pytest.raises(InputError, match="0 was converted"):
        task_of(folders, input_size=(3, 32, 32)).bind(converted)


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_by_hand(cifar: Path) -> None:
    task = task_of(cifar)
    logits = torch.zeros(4, 10)
    target = torch.tensor([0, 1, 2, 3])
    logits[0, 0] = 5
    logits[1] = torch.arange(10.0, 0, -1)  # second
    logits[2, 3:9] = torch.arange(1.0, 7.0)  # seventh
    logits[3] = torch.tensor([9.0, 8, 7, 6, 0, 0, 0, 0, 0, 0])  # fourth
    metrics = task.metrics()
    task.update(metrics, logits, {"target": target})
    assert metrics["top1"].compute().item() == 0.25
    assert metrics["top5"].compute().item() == 0.75
    expected = nn.functional.cross_entropy(logits, target).item()
    assert metrics["loss"].compute().item() == pytest.approx(expected)


def test_few_classes_have_no_top5(folders: Path) -> None:
    task = task_of(folders)
    metrics = task.metrics()
    task.update(metrics, torch.rand(4, 3), {"target": torch.tensor([0, 1, 2, 0])})
    assert sorted(metrics) == ["loss", "top1"]


def test_distillation_is_the_divergence_of_softened_classes(folders: Path) -> None:
    a, b = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.0, 1.0, 3.0]])
    p, q = (b / 4).softmax(1), (a / 4).softmax(1)
    expected = 16 * (p * (p / q).log()).sum()
    assert task_of(folders).distillation_loss(a, b).item() == pytest.approx(expected.item(), rel=1e-5)
