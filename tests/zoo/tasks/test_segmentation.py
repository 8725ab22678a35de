"""Segmentation: pairs, pieces, heads of torchvision's models, metrics, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

import surgeon
from surgeon.errors import ConfigError, DataError, InputError
from surgeon.records.recipe import BaseModel, Recipe, Rule, Trained, Weights, set_recipe
from surgeon.zoo.tasks import create_task
from surgeon.zoo.tasks.segmentation import Segmentation
from tests.support.training.task_data import masks, photo, save_mask


def task_of(**options: Any) -> Segmentation:
    task = create_task("segmentation", **options)
    assert isinstance(task, Segmentation)
    return task


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    return masks(tmp_path)


# --- data -------------------------------------------------------------------------------------------------------------


def test_masks_are_read_as_they_are_stored(options: dict[str, Any], tmp_path: Path) -> None:
    array = np.arange(36 * 41).reshape(36, 41) % 3
    palette = Image.fromarray(array.astype(np.uint8))
    palette.putpalette([200, 10, 10, 0, 0, 255, 9, 9, 9])
    assert palette.mode == "P"
    palette.save(tmp_path / "val/masks/1.png")
    task = task_of(**options)
    task.check()
    assert torch.equal(task.dataset("val")[1]["target"], torch.from_numpy(array))
    assert task.classes == 3


def test_pieces_of_picture_and_mask_belong_together(tmp_path: Path) -> None:
    """Masks say what is bright; after scaling, cutting and mirroring they still do."""
    for split in ("train", "val"):
        array = np.zeros((60, 60), dtype=np.uint8)
        array[20:50, 10:30] = 1
        save_mask(tmp_path / split / "labels/a.png", array)
        path = photo(tmp_path / split / "images/a.png", 60, 60)
        Image.fromarray(array * 255).convert("RGB").save(path)
    task = task_of(data=tmp_path, input_size=(3, 64, 64), mean=(0, 0, 0), std=(1, 1, 1))
    train = task.dataset("train")
    padded = 0
    for draw in range(20):
        sample = train[draw]
        known = sample["target"] != 255
        agree = ((sample["input"][0] > 0.5) == (sample["target"] == 1))[known]
        assert agree.float().mean() > 0.95
        assert (sample["input"][:, ~known] == 0).all()
        padded += int((~known).any())
    assert 0 < padded < 20
    plain = task_of(data=tmp_path, input_size=(3, 60, 60), augment=False, mean=(0, 0, 0), std=(1, 1, 1))
    assert torch.equal(plain.dataset("train")[3]["target"], plain.dataset("val")[0]["target"])


def test_problems_are_named(options: dict[str, Any], tmp_path: Path) -> None:
    task_of(**options).check()
    (tmp_path / "train/masks/2.png").rename(tmp_path / "train/masks/7.png")
    with pytest.raises(DataError, match=r"images/2\.png has no mask") as caught:
        task_of(**options).check()
    assert "masks/7.png has no image" in str(caught.value)
    (tmp_path / "train/masks/7.png").rename(tmp_path / "train/masks/2.png")

    save_mask(tmp_path / "train/masks/2.png", np.zeros((30, 42)))
    with pytest.raises(DataError, match=r"images/2\.png is 42x36, its mask .*masks/2\.png is 42x30"):
        task_of(**options).check()
    save_mask(tmp_path / "train/masks/2.png", np.full((36, 42), 9))
    with pytest.raises(DataError, match=r"masks/2\.png has label 9, outside 0 to 2 \(ignore_index=255\)"):
        task_of(**options, classes=3).check()
    photo(tmp_path / "train/masks/2.png", 42, 36)
    with pytest.raises(DataError, match="has mode RGB; a mask has one channel"):
        task_of(**options).check()
    (tmp_path / "train/masks/2.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot read the image .*masks/2\.png"):
        task_of(**options).check()
    with pytest.raises(DataError, match="must contain images/"):
        task_of(data=tmp_path / "train/images").check()


def test_splits_below_images_and_masks_and_which_of_two_folders(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As YOLO and mmsegmentation lay them out. They were one set, divided at random, with the validation images in training."""
    for split, count in (("train", 3), ("val", 2)):
        for index in range(count):
            photo(tmp_path / "images" / split / f"{split}{index}.png", 8, 8)
            save_mask(tmp_path / "masks" / split / f"{split}{index}.png", np.eye(8))
            save_mask(tmp_path / "annotations" / split / f"{split}{index}.png", np.eye(8))
    task = create_task("segmentation", data=tmp_path)
    task.check()
    assert [len(task.dataset(split)) for split in ("train", "val")] == [3, 2]
    assert f"the masks are those of {tmp_path}/masks/val, not of {tmp_path}/annotations/val" in caplog.text
    shutil.rmtree(tmp_path / "masks")
    assert len(create_task("segmentation", val=tmp_path / "images/val").dataset("val")) == 2


def test_masks_with_one_class_are_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        photo(tmp_path / split / "images/a.png", 8, 8)
        save_mask(tmp_path / split / "masks/a.png", np.full((8, 8), 255))
    with pytest.raises(DataError, match="two classes"):
        task_of(data=tmp_path).check()


@pytest.mark.parametrize(
    "wrong", [{"classes": 1}, {"scale_min": 3}, {"multiple": 0}, {"input_size": (1, 8, 8)}, {"mean": (0.5,)}]
)
def test_wrong_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        task_of(**wrong)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        ("fcn_resnet50", ["classifier.4", "aux_classifier.4"]),
        ("deeplabv3_mobilenet_v3_large", ["classifier.4", "aux_classifier.4"]),
        ("lraspp_mobilenet_v3_large", ["classifier.low_classifier", "classifier.high_classifier"]),
    ],
)
def test_heads_of_torchvision_follow_the_classes(options: dict[str, Any], model: str, heads: list[str]) -> None:
    extra = {} if "lraspp" in model else {"aux_loss": True}
    net = torchvision.models.get_model(model, weights=None, weights_backbone=None, num_classes=21, **extra)
    others = {n: v.clone() for n, v in net.state_dict().items() if not n.startswith(tuple(heads))}
    task = task_of(**options)
    assert task.bind(net) is net
    assert all(net.get_submodule(name).out_channels == 3 for name in heads)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in others.items())
    batch = task.collate([task.dataset("train")[draw] for draw in range(2)])
    output = task.forward(net.train(), batch)
    assert {value.shape[1] for value in output.values()} == {3}
    loss = task.loss(output, batch)
    parts = [task.loss(output[key], batch).item() for key in output]
    assert loss.item() == pytest.approx(parts[0] + 0.4 * sum(parts[1:]), rel=1e-5)
    loss.backward()


def test_outputs_in_other_forms(options: dict[str, Any]) -> None:
    task = task_of(**options)
    batch = task.collate([task.dataset("val")[0]])
    logits, half = torch.randn(1, 3, 36, 40), torch.randn(1, 3, 18, 20)
    expected = task.loss(logits, batch) + 0.4 * task.loss(half, batch)
    assert task.loss((logits, half), batch).item() == pytest.approx(expected.item(), rel=1e-6)
    big = nn.functional.interpolate(half, (36, 40), mode="bilinear", align_corners=False)
    assert task.loss(half, batch).item() == pytest.approx(task.loss(big, batch).item(), rel=1e-6)


def test_a_new_head_is_told_however_memory_is_used_again(options: dict[str, Any]) -> None:
    """Its parameters may get the identity of those that are gone: an untrained head went unnoticed."""
    for _ in range(20):
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
        _, told = task_of(**options).fitted(model)
        assert told == (
            "new, untrained parameters to fit the task: 2.weight, 2.bias (3 outputs instead of 2; ignore_index=LABEL leaves a "
            "label of the masks out)"
        )
        assert task_of(**options).fitted(model)[1] is None


def test_models_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    task = task_of(**options)
    with pytest.raises(InputError, match="not logits"):
        task.bind(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    with pytest.raises(InputError, match="no last convolution with 3 outputs"):
        task_of(**options, classes=5).bind(nn.ReLU())
    net = nn.Sequential(nn.Conv2d(3, 7, 3, padding=1))
    converted, _ = surgeon.convert(net, layers="0", type="pafu", input_size=(3, 16, 16))
    with pytest.raises(InputError, match="0 was converted"):
        task.bind(converted)


# --- loss and metrics -------------------------------------------------------------------------------------------------


def test_every_picture_counts_the_same_however_much_of_it_is_void(options: dict[str, Any]) -> None:
    task = task_of(**options)
    logits = torch.zeros(2, 3, 4, 4)
    logits[1, 0] = 2.0
    target = torch.zeros(2, 4, 4, dtype=torch.long)
    target[1] = 255
    target[1, 0, 0] = 1
    first, second = np.log(3), -(0 - np.log(np.exp(2) + 2))
    loss = task.loss(logits, {"input": torch.zeros(2, 3, 4, 4), "target": target})
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-5)
    target[1] = 255
    assert task.loss(logits, {"input": torch.zeros(2, 3, 4, 4), "target": target}).item() == pytest.approx(
        first / 2, rel=1e-5
    )


def one_hot(labels: Tensor) -> Tensor:
    return nn.functional.one_hot(labels, 4).permute(0, 3, 1, 2).float()


def test_metrics_by_hand(options: dict[str, Any]) -> None:
    task = task_of(**options, classes=4)
    target = torch.tensor([[[0, 0, 1, 1], [255, 255, 2, 2]]])
    guess = torch.tensor([[[0, 1, 1, 1], [3, 0, 2, 0]]])
    metrics = task.metrics()
    task.update(metrics, one_hot(guess), {"target": target})
    # class 0: 1 of {0,0} and one wrong elsewhere: 1/3; 1: 2/3; 2: 1/2; 3 occurs only where nothing is counted
    assert metrics["miou"].compute().item() == pytest.approx((1 / 3 + 2 / 3 + 1 / 2) / 3)
    assert metrics["pixel_accuracy"].compute().item() == pytest.approx(4 / 6)


def test_miou_is_that_of_the_whole_set_not_the_mean_over_pictures(options: dict[str, Any]) -> None:
    task = task_of(**options, classes=4)
    metrics = task.metrics()
    guesses, targets = torch.tensor([[[0, 0]], [[0, 1]]]), torch.tensor([[[0, 1]], [[1, 1]]])
    for guess, target in zip(guesses, targets, strict=True):
        task.update(metrics, one_hot(guess[None]), {"target": target[None]})
    assert metrics["miou"].compute().item() == pytest.approx((1 / 3 + 1 / 3) / 2)


@pytest.mark.parametrize("origin", ["tuned", "converted", "own weights"])
def test_a_trained_head_is_not_thrown_away(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture, origin: str
) -> None:
    """As in CamVid, where an unnamed void made a twelfth class."""

    def network(classes: int) -> nn.Module:
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, classes, 1))
        base = BaseModel(source="factory", name="tests:none", weights=Weights(kind="file", path="w.pth"))
        recipes = {
            "tuned": Recipe(rules=(), task=Trained(name="segmentation")),
            "converted": Recipe(rules=(Rule(layers="0", type="acda"),), base=base),
            "own weights": Recipe(rules=(), base=base),
        }
        set_recipe(net, recipes[origin])
        return net

    two = r"trained head of 2 classes, and the masks also have label 2: ignore_index=2 leaves it out, .*; new_head=true starts"
    with pytest.raises(InputError, match=two):
        task_of(**options).bind(network(2))
    with pytest.raises(InputError, match="the task classes=5: new_head=true starts with an untrained head of 5"):
        task_of(**options, classes=5).bind(network(4))
    assert task_of(**options, new_head=True).bind(network(2))[1].out_channels == 3
    untrained = network(2)
    set_recipe(untrained, Recipe(rules=(Rule(layers="0", type="acda"),)))
    assert task_of(**options).bind(untrained)[1].out_channels == 3
    assert not caplog.messages
    task = task_of(**options)
    assert task.fitted(kept := network(5))[1] is None
    assert (kept[1].out_channels, task.classes) == (5, 5)
    assert "labels up to 2, and the model keeps its trained head of 5 classes" in caplog.text


def test_void_inside_the_classes_is_ignored(tmp_path: Path) -> None:
    """As in CamVid: 11 classes, and 11 for void."""
    for split in ("train", "val"):
        photo(tmp_path / split / "images/a.png", 12, 12)
        save_mask(tmp_path / split / "masks/a.png", np.arange(144).reshape(12, 12) % 12)
    task = task_of(data=tmp_path, ignore_index=11)
    task.check()
    assert task.classes == 11
    assert task_of(data=tmp_path).classes == 12
