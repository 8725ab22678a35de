"""Training that goes on: with classes by name, with other data, with the same data elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgeon.errors import ConfigError, DataError, InputError
from surgeon.models.checkpoint import load, save
from surgeon.records.recipe import BaseModel, Recipe, Weights, get_recipe
from surgeon.zoo.evaluate import evaluate
from surgeon.zoo.finetune import finetune
from surgeon.zoo.finetune.loop import Interrupted
from surgeon.zoo.tasks import Task, create_task
from surgeon.zoo.tasks.data.fingerprint import changes, fingerprint
from tests.support.training.runs import SHORT, equal, interrupt_at, interrupted, weights, with_
from tests.support.training.task_data import picture
from tests.support.training.tasks import make_restorer


def classes_folder(root: Path, names: tuple[str, ...], splits: tuple[str, ...] = ("train", "val")) -> Path:
    """Three pictures a class, the same for the same name."""
    for split in splits:
        for name in names:
            for index in range(3):
                picture(root / split / name / f"{index}.png", sum(map(ord, name)) + index, 8)
    return root


def classification(root: Path, **options: Any) -> Task:
    return create_task("classification", data=root, input_size=(3, 8, 8), **options)


def classifier(classes: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)).eval()


# --- T5: names of classes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    root = classes_folder(tmp_path_factory.mktemp("data"), ("ant", "bee", "cow"))
    return finetune(classifier(), classification(root), with_(max_steps=2)).model


def test_a_fine_tuned_model_knows_its_classes_and_its_folder_does(tuned: nn.Module, tmp_path: Path) -> None:
    """T5: names are kept in the recipe."""
    base = BaseModel(source="factory", name="tests:none", input_size=(3, 8, 8), weights=Weights(kind="given"))
    save(tuned, tmp_path / "run", base=base)
    assert Recipe.read(tmp_path / "run").classes == ("ant", "bee", "cow")
    recipe = get_recipe(load(tmp_path / "run", base=classifier()))
    assert recipe is not None
    assert recipe.classes == ("ant", "bee", "cow")


def test_as_many_classes_of_other_names_are_refused(tuned: nn.Module, tmp_path: Path) -> None:
    """T5: same number of classes, other names; for evaluation and for a further fine-tuning."""
    task = classification(classes_folder(tmp_path, ("ant", "bee", "dog")))
    with pytest.raises(
        InputError, match=r"trained on the classes ant, bee, cow, and the data have others: dog; new_head=true"
    ):
        task.bind(tuned)
    with pytest.raises(InputError, match="have others: dog"):
        finetune(tuned, task, with_(max_steps=1))


def test_a_missing_class_leaves_the_trained_head_and_its_order(tuned: nn.Module, tmp_path: Path) -> None:
    """T5: on fewer classes the trained head is replaced by a random one with a note."""
    task = classification(classes_folder(tmp_path, ("bee", "cow")))
    before = weights(tuned)
    bound = task.bind(tuned)
    assert equal(before, weights(bound))
    targets = {int(task.dataset("val")[i]["target"]) for i in range(6)}
    assert targets == {1, 2}
    assert 0 <= evaluate(bound, task)["top1"] <= 1


def test_a_new_head_can_be_asked_for(tuned: nn.Module, tmp_path: Path) -> None:
    """T5: other classes on purpose."""
    import copy

    task = classification(classes_folder(tmp_path, ("ant", "bee", "dog")), new_head=True)
    result = finetune(copy.deepcopy(tuned), task, with_(max_steps=1))
    recipe = get_recipe(result.model)
    assert recipe is not None
    assert recipe.classes == ("ant", "bee", "dog")


# --- T6, T13: what may change between two sittings -------------------------------------------------------------------


def pictures(root: Path, count: int = 8) -> Path:
    for split in ("train", "val"):
        for index in range(count):
            picture(root / split / f"{index}.png", index, 24)
    return root


def denoising(root: Path) -> Task:
    return create_task("denoising", data=root, patch=16)


def remove(root: Path) -> None:
    (root / "train/3.png").unlink()


def add(root: Path) -> None:
    picture(root / "val/new.png", 99, 24)


def replace(root: Path) -> None:
    """Of the same size in bytes."""
    file = root / "train/3.png"
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)


def rename(root: Path) -> None:
    (root / "train/3.png").rename(root / "train/33.png")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (remove, r"train had 8 samples and are 7, 8 files and are 7"),
        (add, r"val had 8 samples and are 9"),
        (replace, "train: contents of files are others"),
        (rename, "train: names or order of the files are others"),
    ],
)
def test_changed_data_are_told_from_the_ones_a_run_began_with(tmp_path: Path, change: Any, told: str) -> None:
    """T6: pictures removed, added, replaced, renamed."""
    before = fingerprint(denoising(pictures(tmp_path)))
    change(tmp_path)
    (line,) = changes(before, fingerprint(denoising(tmp_path)))
    assert line.startswith(told)


def test_renamed_classes_are_told(tmp_path: Path) -> None:
    """T6: classes renamed."""
    before = fingerprint(classification(classes_folder(tmp_path, ("ant", "bee"))))
    for split in ("train", "val"):
        (tmp_path / split / "bee").rename(tmp_path / split / "dog")
    assert changes(before, fingerprint(classification(tmp_path)))[:2] == ["classes gone: bee", "classes new: dog"]


def test_made_data_have_a_fingerprint() -> None:
    """T6: tasks without files."""
    task = create_task("sad", images=3, val_images=2)
    found = fingerprint(task)
    assert (found["train"]["samples"], found["val"]["samples"]) == (3, 2)
    assert changes(found, fingerprint(create_task("sad", images=3, val_images=2))) == []


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T6: `finetune --resume` goes on, its total of steps and rate jump."""
    root = pictures(tmp_path / "data")
    model = interrupted(monkeypatch, denoising(root), tmp_path / "run")
    remove(root)
    with pytest.raises(
        DataError, match=r"the data differ from those that the run in .* started with: train had 8 samples and are 7"
    ):
        finetune(model, denoising(root), SHORT, tmp_path / "run", resume=True)


def test_a_run_goes_on_with_its_data_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T13: `--resume` with data at another path (same content), other options that change no step; the weights are the same."""
    root = pictures(tmp_path / "data")
    whole = finetune(make_restorer(), denoising(root), with_(SHORT, keep="last")).model
    config = with_(SHORT, keep="last")
    with monkeypatch.context() as patched:
        interrupt_at(patched, 3)
        with pytest.raises(Interrupted):
            finetune(make_restorer(), denoising(root), config, tmp_path / "run")
    root.rename(tmp_path / "moved")
    other = with_(
        config, eval_batch_size=2, max_rollbacks=1, device="cpu", patience=9, eval_every="3", checkpoint_every="4"
    )
    result = finetune(make_restorer(), denoising(tmp_path / "moved"), other, tmp_path / "run", resume=True)
    assert equal(weights(result.model), weights(whole))
    assert "resumed with another option: eval_every was '4' and is '3'" in result.summary.notes


def test_a_run_from_before_an_option_goes_on_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record without `fan_in_lr` means False: with today's default the run would change its rates halfway."""
    root = pictures(tmp_path / "data")
    config = with_(SHORT, fan_in_lr=False)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 3)
        with pytest.raises(Interrupted):
            finetune(make_restorer(), denoising(root), config, tmp_path / "run")
    path = tmp_path / "run/training/run.json"
    record = json.loads(path.read_text())
    del record["config"]["fan_in_lr"]
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="fan_in_lr was False and is True"):
        finetune(make_restorer(), denoising(root), with_(SHORT, fan_in_lr=True), tmp_path / "run", resume=True)
    finetune(make_restorer(), denoising(root), config, tmp_path / "run", resume=True)


def test_a_search_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    """T6: `search --resume` compares new trials with an original measured on other pictures."""
    from surgeon.search.evaluate.training import ShortConfig, TrainingEvaluator
    from surgeon.search.space import Space
    from surgeon.search.study.identity import as_stored, differences

    def identity() -> dict[str, Any]:
        space = Space.__new__(Space)  # only passed on
        return as_stored(TrainingEvaluator(make_restorer(), denoising(tmp_path), space, ShortConfig()).identity())

    pictures(tmp_path)
    before = identity()
    assert not list(differences(before, identity()))
    remove(tmp_path)
    assert any(
        line.startswith("data.train.samples is 8 in the study and 7") for line in differences(before, identity())
    )
