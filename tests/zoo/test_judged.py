"""`surgeon evaluate` trains nothing: all of an undivided folder judges, except for what a training used of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from surgeon.cli import main
from surgeon.zoo.tasks import create_task, task_class
from surgeon.zoo.tasks.data.files import FolderConfig
from surgeon.zoo.tasks.data.judged import judged
from tests.support.training.task_data import CASES, Case, photo

FOLDERS = {case.task: case for case in CASES if issubclass(task_class(case.task).config_class, FolderConfig)}
TRAIN = [
    "--task-option",
    "patch=16",
    "--max-steps",
    "1",
    "--keep",
    "last",
    "--batch-size",
    "2",
    "--device",
    "cpu",
    "--quiet",
]
NET = ["zoo/dncnn_color", "--model-args", "depth=3", "width=4"]


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def record(task: str, folder: Path, **options: Any) -> tuple[str, dict[str, Any]]:
    given = {"data": None, "train": str(folder), "val": None, "val_fraction": 0.5, "val_seed": 3}
    return "run", {"task": task, "options": given | options}


@pytest.mark.parametrize("case", FOLDERS.values(), ids=FOLDERS)
def test_all_of_an_undivided_folder_judges_or_what_training_left(case: Case, tmp_path: Path) -> None:
    options = case.data(tmp_path) | case.options
    folder = options.pop("data") / "train"
    task = create_task(case.task, data=folder, **options)
    count = 12 if case.task == "classification" else 4

    whole, notes = judged(task, [], [record(case.task, tmp_path / "val"), record(case.task, tmp_path / "gone")])
    assert len(whole.dataset("val")) == count
    assert notes == [
        f"{folder} has no train/ and val/, and nothing is trained here: {count} of its {count} images are judged"
    ]

    (tmp_path / "link").symlink_to(folder)
    part, notes = judged(task, [], [record(case.task, tmp_path / "link")])
    assert len(part.dataset("val")) == count // 2
    left = f"{count // 2} of its {count} images were left out of training and are judged"
    assert notes == [f"run was trained on the rest of {folder}: {left}"]
    trained = create_task(case.task, train=folder, val_fraction=0.5, val_seed=3, **options)
    one, other = part.dataset("val")[0]["input"], trained.dataset("val")[0]["input"]
    assert one.shape == other.shape
    assert bool((one == other).all())


def images(folder: Path, count: int = 10) -> Path:
    for index in range(count):
        photo(folder / f"{index}.png", 20, 20, index)
    return folder


def test_given_options_win_and_images_of_a_training_are_told(tmp_path: Path) -> None:
    folder = images(tmp_path / "photos")
    past = record("denoising", folder)
    known = f"run was trained on images of {folder} that are judged"
    task, notes = judged(create_task("denoising", data=folder, val_fraction=0.2), ["val_fraction"], [past])
    assert len(task.dataset("val")) == 2
    assert notes[0].startswith(
        f"val_fraction=0.2 of {folder}, which has no train/ and val/: 2 of its 10 images are judged"
    )
    assert f"val={folder} judges by all of it" in notes[0]
    assert notes[1:] == [known]
    task, notes = judged(create_task("denoising", val=folder), ["val"], [past])
    assert (len(task.dataset("val")), notes) == (10, [known])
    same = create_task("denoising", data=folder, val_fraction=0.5, val_seed=3)
    assert len(judged(same, ["val_fraction"], [past])[1]) == 1  # the very part that training left
    task, notes = judged(create_task("denoising", data=folder, val_limit=3), [], [])
    assert len(task.dataset("val")) == 3
    assert notes[0].endswith("3 of its 10 images are judged")
    # other divisions of the folder: another task's, that of an original, none
    assert judged(create_task("demosaicking", data=folder), [], [past])[1][1:] == [known]
    _, notes = judged(
        create_task("denoising", data=folder), [], [past, ("base", record("denoising", folder, val_seed=4)[1])]
    )
    assert notes[1:] == [f"base was trained on images of {folder} that are judged"]
    assert judged(create_task("denoising", data=folder), [], [record("denoising", folder, val=str(tmp_path))])[1][
        1:
    ] == [known]


def test_sets_that_bring_their_splits_are_left_alone(tmp_path: Path) -> None:
    images(tmp_path / "photos/train")
    images(tmp_path / "photos/val", 2)
    task = create_task("denoising", data=tmp_path / "photos")
    assert judged(task, [], [record("denoising", tmp_path / "photos/train")]) == (task, [])
    (tmp_path / "cifar-10-batches-py").mkdir()
    task = create_task("classification", data=tmp_path)
    assert judged(task, [], []) == (task, [])
    assert judged(create_task("sad"), [], [])[1] == []


def test_a_run_and_what_it_was_converted_from_are_judged_by_what_training_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images(tmp_path / "photos")
    images(tmp_path / "others", 4)
    assert main(["finetune", *NET, "--task", "denoising", "--data", "photos", *TRAIN, "-o", "plain"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "epochs of 9 samples" in told
    assert "note: photos has no train/ and val/: images drawn at random from it judge" in told
    assert main(["convert", "plain", "--type", "acda", "--layers", "body.0", "--quiet", "-o", "run"]) == 0
    capsys.readouterr()

    def evaluate(model: str, data: str, *more: str) -> tuple[int, str]:
        given = ["evaluate", model, "--task", "denoising", "--data", data, "--device", "cpu", "--json", "--quiet"]
        assert main([*given, *more]) == 0
        out, error = capsys.readouterr()
        samples: int = json.loads(out)["samples"]
        assert {line.removeprefix("surgeon: ") for line in error.splitlines()} <= set(json.loads(out)["notes"])
        return samples, error

    for model in ("plain", "run"):
        samples, error = evaluate(model, "photos")
        assert samples == 1
        assert f"surgeon: {model} was trained on the rest of photos: 1 of its 10 images were left out" in error
    samples, error = evaluate("run", "others")
    assert samples == 4
    assert "others has no train/ and val/, and nothing is trained here: 4 of its 4 images are judged" in error
    samples, error = evaluate("plain", "photos", "--original", "none", "--task-option", "val_fraction=0.3")
    assert samples == 3
