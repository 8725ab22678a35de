"""The record of a training in a fine-tuned folder: whether a run may be resumed with these options, and whether two networks
were trained equally. Nothing heavy is imported."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon.errors import ConfigError, called, offered
from surgeon.records.recipe import BaseModel, Recipe
from surgeon.util.files import check_fields, read_object
from surgeon.util.outputs import FORCE, RUN, SUMMARY, TRIAL, WEIGHTS, is_surgeon_folder
from surgeon.util.tables import counted

_RUN_FIELDS = {"config": {"batch_size": int, "accumulate": int}, "data": {"train": {"samples": int}}}

# Options that may differ when a run is resumed: none of them changes the weights that a step leads to.
_FREE = ("max_time", "workers", "log_every")
# Neither do these, but they change what is kept or when the run ends: a note reports that.
_TOLD = ("eval_batch_size", "eval_every", "patience", "checkpoint_every", "max_rollbacks", "device")
_BEFORE = {
    "fan_in_lr": False,
    "new_head": False,
}  # what options that came later amount to in runs that do not record them
_PLACES = ("data", "train", "val")  # options that locate the data


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The differences of two records, also inside their objects: the innermost name, and "NAME was OLD and is NEW"."""
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differing(old, new)
        elif old != new:
            was, is_ = (repr(side[key]) if key in side else "not given" for side in (before, now))
            yield key, f"{key} was {was} and is {is_}"


def check_same_options(old: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Notes on options that may differ between a run and its resumption, by their records; `ConfigError` names the others."""
    named = ("model", "task")
    changed = [told for _, told in differing({key: old[key] for key in named}, {key: now[key] for key in named})]
    notes = []
    moved = _PLACES if "data" in old else ()  # the data themselves say more than their path
    for part, free in (("options", moved), ("config", _FREE)):
        before = {key: value for key, value in _BEFORE.items() if key in now[part]} | old[part]
        for key, told in differing(before, now[part]):
            if key in free:
                continue
            flag = f"--{key.replace('_', '-')}"
            if part == "config" and offered(flag):
                told = told.replace(key, called(flag, key), 1)
            if part == "config" and key in _TOLD:
                notes.append(f"resumed with another option: {told}")
            else:
                changed.append(told)
    if changed:
        raise ConfigError(
            f"a run must be resumed with the options it started with, but {'; '.join(changed)}. "
            f"To train its result on, begin another run{called(': its folder as MODEL, and another -o', '')}"
        )
    return notes


def check_resumed(
    output: Path, *, model: str | None, task: str | None, config: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Raise `ConfigError` if these options contradict those of the run in a folder; what is not among them counts as the same.

    Texts among the task's `options` are left to the task, which may read them as something else.
    """
    old = read_object(output / RUN)
    recorded, settings = old.get("options"), old.get("config")
    if not (isinstance(recorded, dict) and isinstance(settings, dict) and {"model", "task"} <= set(old)):
        return  # what reads all of it says more
    now = {"model": model or old["model"], "task": task or old["task"]}
    check_same_options(old, now | {"options": recorded | _comparable(options), "config": settings | dict(config)})


def check_same_trial(old: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `ConfigError`, naming the differences, if the settings of a trial are not those recorded of the trial to resume."""
    changed = [told for _, told in differing(old, now)]
    if changed:
        another = called("another -o", "another output")
        raise ConfigError(
            f"a trial must be resumed with the options it started with, but {'; '.join(changed)}. "
            f"{called(*FORCE)} replaces it, and with {another} both are kept"
        )


def check_resumed_trial(output: Path, settings: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if these settings contradict those of the trial in a folder; what is not among them counts as the same.

    That holds inside their groups, too. The task's `options` are compared as those of a run.
    """
    old = read_object(output / TRIAL).get("identity")
    if not isinstance(old, dict):
        return  # what reads all of it says more
    now = {**settings, "task options": _comparable(options)}
    groups = {key: value for key, value in now.items() if isinstance(value, Mapping)}
    if all(isinstance(old.get(key, {}), dict) for key in groups):
        check_same_trial(old, {**old, **now, **{key: {**old.get(key, {}), **value} for key, value in groups.items()}})


def _comparable(options: Mapping[str, Any]) -> dict[str, Any]:
    """A task's options as they are recorded, without texts: the task may read them as something else."""
    given = {key: value for key, value in options.items() if not isinstance(value, str | Path)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}


@dataclass(frozen=True)
class Training:
    """One training: optimizer steps, samples per step, the fingerprint of the training data, and the steps before it."""

    steps: int
    batch: int
    data: dict[str, Any]
    earlier: int = 0

    def told(self) -> str:
        """In words: "300 steps of 32 from 800 samples (after 100 steps before)"."""
        before = f" (after {counted(self.earlier, 'step')} before)" if self.earlier else ""
        return f"{counted(self.steps, 'step')} of {self.batch} from {counted(self.data['samples'], 'sample')}{before}"


def unequal_training(name: str, recipe: Recipe | None, other: str, beside: Recipe | None) -> str | None:
    """Why the difference of two networks is not that of their structure alone, None if they were trained equally.

    `name` and `other` are their names or folders, with the recipe if known. A folder that was not trained itself counts as the one
    that it was converted from. Raises `CheckpointError` for records that cannot be read.
    """
    mine, its = _folder(name, recipe), _folder(other, beside)
    if mine == its:
        return None
    first, second = _trained(mine, recipe), _trained(its, beside)
    started = original_folder(recipe.base) if recipe is not None and recipe.base is not None else None
    if first and (not second or (started is not None and _same(started, Path(other)))):
        return _longer(name, other, converted=recipe is not None and bool(recipe.rules))
    if second and not first:
        return _longer(other, name, converted=beside is not None and bool(beside.rules))
    if not first:
        return None
    a, b = _read(mine), _read(its)
    if a is None or b is None:
        return f"how long {name if a is None else other} was trained is not recorded: it may be unequal to the other"
    if a == b:
        return None
    data = "; on other samples" if a.told() == b.told() else ""
    return f"trained unequally, {name} for {a.told()}, {other} for {b.told()}{data}: the change is not the conversion's alone"


def trainings(name: str, recipe: Recipe | None) -> Iterator[dict[str, Any]]:
    """The records of the trainings of a network's weights, the latest first: its own, and those of what it started from.

    `name` is its name or folder, with the recipe if known. Raises `CheckpointError` for records that cannot be read.
    """
    folders: list[tuple[Path, Recipe | None]] = [(Path(name), recipe)]
    for folder, known in folders:  # grows
        if known is None and is_surgeon_folder(folder):
            known = Recipe.read(folder)
        before = [] if known is None or known.base is None else [original_folder(known.base)]
        if _trained(folder, None):
            record = read_object(folder / RUN)
            before.insert(0, Path(str(record.get("model"))))
            yield record
        seen = {one.resolve() for one, _ in folders}
        folders += [(one, None) for one in before if one is not None and one.is_dir() and one.resolve() not in seen]


def original_folder(base: BaseModel) -> Path | None:
    """The surgeon folder whose weights a base model has, if it was converted from one."""
    file = Path(base.weights.path) if base.weights.kind == "file" and base.weights.path else None
    return None if file is None or file.name != WEIGHTS else file.parent


def _longer(name: str, other: str, *, converted: bool) -> str:
    more = ": only --original with a plain run that was trained as long shows what the conversion brings"
    return f"{name} was trained longer than {other}{more if converted else ''}"


def _folder(name: str, recipe: Recipe | None) -> Path:
    """The folder of the training whose weights a network has, resolved; the name itself if there is none."""
    path = Path(name)
    if not (path / RUN).is_file() and recipe is not None and recipe.base is not None:
        path = original_folder(recipe.base) or path
    return path.resolve()


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _trained(folder: Path, recipe: Recipe | None) -> bool:
    summary = folder / SUMMARY
    if summary.is_file() and read_object(summary).get("kept_step") == 0:
        return False  # the kept weights are those of the start
    return (folder / RUN).is_file() or (recipe is not None and recipe.task is not None)


def _read(folder: Path) -> Training | None:
    """The training recorded in a folder; None if there is none, or it is incomplete."""
    record, summary = folder / RUN, folder / SUMMARY
    if not (record.is_file() and summary.is_file()):
        return None
    run, end = read_object(record), read_object(summary)
    check_fields(run, _RUN_FIELDS, str(record))
    end = {"earlier_steps": 0, **end}  # earlier versions did not record them
    check_fields(end, {"steps": int, "earlier_steps": int}, str(summary))
    config = run["config"]
    batch = config["batch_size"] * config["accumulate"]
    return Training(end["steps"], batch, run["data"]["train"], end["earlier_steps"])
