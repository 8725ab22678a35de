"""Which images of a folder judge networks that are not being trained: all of them, or those that their training left out."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgeon.errors import SurgeonError, called
from surgeon.util.tables import counted
from surgeon.zoo.tasks.base import Task
from surgeon.zoo.tasks.data.files import FolderConfig, find_roots
from surgeon.zoo.tasks.data.labeled import find_dataset

_OPTIONS = ("data", "train", "val", "val_fraction", "val_seed")


@dataclass(frozen=True)
class _Past:
    """A training of a network on images of the folder: how it divided the folder, None if otherwise than the task would."""

    name: str
    division: dict[str, Any] | None


def judged(
    task: Task, given: Collection[str], trainings: Iterable[tuple[str, Mapping[str, Any]]]
) -> tuple[Task, list[str]]:
    """The task that judges by all of an undivided folder, or by the part that a training left out; and notes on both.

    `given`: the task's options that were given, of which `val` and `val_fraction` decide. `trainings`: names of networks, each with
    the record (run.json) of a training of its weights; the first that divided the folder counts. Raises `DataError`.
    """
    config = task.config
    if not isinstance(config, FolderConfig) or not _is_folder(task):
        return task, []
    roots, notes = find_roots(task.name, config), []
    folder = roots.val
    assert folder is not None
    past = [one for name, record in trainings if (one := _past(name, record, task.name, folder)) is not None]
    division = _division(config) if roots.divided else None
    if roots.divided:
        own = next((one for one in past if one.division is not None), None)
        total = counted(len(_with(task, data=None, train=None, val=folder, val_limit=None).dataset("val")), "image")
        if {"val", "val_fraction"} & set(given):
            why = f"val_fraction={config.val_fraction:g} of {folder}, which has no train/ and val/"
            end = f"are judged; {called(f'--task-option val={folder}', f'val={folder}')} judges by all of it"
        elif own is not None and own.division is not None:
            why, end = f"{own.name} was trained on the rest of {folder}", "were left out of training and are judged"
            division = own.division
            task = _with(task, data=None, train=folder, **division)
        else:
            why, end = f"{folder} has no train/ and val/, and nothing is trained here", "are judged"
            division = None
            task = _with(task, data=None, train=None, val=folder)
        notes.append(f"{why}: {len(task.dataset('val'))} of its {total} {end}")
    names = dict.fromkeys(one.name for one in past if division is None or one.division != division)
    return task, [*notes, *(f"{name} was trained on images of {folder} that are judged" for name in names)]


def told_division(task: Task) -> list[str]:
    """A note on a folder that is divided at random for training; none if it has splits of its own."""
    config = task.config
    if not isinstance(config, FolderConfig) or not _is_folder(task):
        return []
    roots = find_roots(task.name, config)
    if not roots.divided:
        return []
    option = f"{called('--task-option ', '')}val_fraction={config.val_fraction:g}"
    return [f"{roots.train} has no train/ and val/: images drawn at random from it judge ({option})"]


def _is_folder(task: Task) -> bool:
    """Whether the task's data are images in folders, rather than a set with splits of its own (CIFAR)."""
    config = task.config
    return isinstance(config, FolderConfig) and (
        find_dataset(task.name, config, getattr(config, "dataset", "folder")) == "folder"
    )


def _division(config: FolderConfig) -> dict[str, Any]:
    return {"val_fraction": config.val_fraction, "val_seed": config.val_seed}


def _with(task: Task, **changes: Any) -> Task:
    return type(task)(replace(task.config, **changes), seed=task.seed)


def _past(name: str, record: Mapping[str, Any], task: str, folder: Path) -> _Past | None:
    """A recorded training, None if it was on images elsewhere, or on some that are not there any more."""
    try:
        config = FolderConfig(**{key: record["options"][key] for key in _OPTIONS})
        roots = find_roots(task, config)
    except (KeyError, TypeError, SurgeonError):
        return None
    if roots.train is None:
        return None
    used, here = roots.train.resolve(), folder.resolve()
    if roots.divided and used == here and record.get("task") == task:
        return _Past(name, _division(config))
    return _Past(name, None) if used.is_relative_to(here) or here.is_relative_to(used) else None
