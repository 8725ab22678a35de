"""Checkpoints of a training run: one safetensors file each, verified by a digest, written atomically. No pickles.

A checkpoint is a tree of dictionaries, lists, numbers, strings and tensors. It does not contain random numbers, sample order,
rates or temperatures: they follow from the seed and the step (`batches.py`, `schedule.py`).
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from surgeon.errors import CheckpointError
from surgeon.util.files import check_fields, parse_json, read_text, sync, told

logger = logging.getLogger(__name__)

_STEP = re.compile(r"(step|best)-([0-9]{9})\.safetensors")
_KEPT = 2  # newest checkpoints, and as many regular ones


@dataclass
class TrainingProgress:
    """Progress of a run; together with the tensors it makes up a checkpoint."""

    step: int = 0
    seconds: float = 0.0  # of training, over all sessions
    elapsed: float = 0.0  # total seconds, including evaluations, over all sessions
    best: float | None = None
    best_loss: float | None = None  # that decides at a tie; None: the task does not measure it
    best_step: int | None = None
    stale: int = 0  # evaluations since the best
    rollbacks: int = 0
    lr_factor: float = 1.0
    stopped: str | None = None  # why the run has ended: "steps", "time", "patience"
    start: dict[str, Any] = field(default_factory=dict)  # what was measured before training
    last: dict[str, float] = field(default_factory=dict)  # metrics of the newest evaluation

    def best_metrics(self, primary: str) -> dict[str, float]:
        """Metrics of the best weights, for `improved`: the primary one and, if measured, the loss."""
        values = {"loss": self.best_loss, primary: self.best}
        return {name: value for name, value in values.items() if value is not None}


# Schema of the progress in a checkpoint, for `check_fields`.
_NUMBER, _NONE = (int, float), type(None)
_PROGRESS: dict[str, Any] = {
    **dict.fromkeys(("step", "stale", "rollbacks"), int),
    **dict.fromkeys(("seconds", "elapsed", "lr_factor"), _NUMBER),
    **dict.fromkeys(("best", "best_loss"), (*_NUMBER, _NONE)),
    "best_step": (int, _NONE),
    "stopped": (str, _NONE),
    "start": {"*": dict},
    "last": {"*": _NUMBER},
}
_MEASURED: dict[str, Any] = {
    "metrics": {"*": _NUMBER},
    "parameters": int,
    "flops": (*_NUMBER, _NONE),
    "seconds": _NUMBER,
}


# --- one file -----------------------------------------------------------------------------------------------------


def write_tree(file: Path, tree: Any) -> None:
    """Write a tree under a temporary name, sync it, and rename it. Raises `CheckpointError`."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_pack(tree, "", tensors))
    tensors = _unshared(tensors)
    temporary = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata={"tree": text, "sha256": _digest(text, tensors)})
        sync(temporary)
        temporary.replace(file)
        sync(file.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {file}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_tree(file: Path) -> Any:
    """Read a file written by `write_tree`; raises `CheckpointError` for anything else, even a single changed bit."""
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            names = content.keys()
            tensors = {name: content.get_tensor(name) for name in names}
        text = metadata["tree"]
        if _digest(text, tensors) != metadata["sha256"]:
            raise CheckpointError(f"{file} is damaged: its SHA-256 does not match its content")
        return _unpack(parse_json(text, str(file)), tensors)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} is damaged or not a checkpoint ({type(error).__name__}: {error})") from error


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically."""
    temporary = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(file)
        sync(file.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {file}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON values; tensors and types that JSON lacks (tuples, non-string keys) become one-key dictionaries."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {"tensor": path}
    if isinstance(value, dict):
        items = [[key, _pack(inner, f"{path}/{key}", tensors)] for key, inner in value.items()]
        return {"dict": items}
    if isinstance(value, list | tuple):
        inner = [_pack(part, f"{path}/{i}", tensors) for i, part in enumerate(value)]
        return {"tuple": inner} if isinstance(value, tuple) else inner
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}  # not in JSON
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    raise CheckpointError(
        f"{path} in the state of the run is a {type(value).__name__}, which a checkpoint cannot store"
    )


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "float":
        return float(inner)
    if kind == "dtype" and isinstance(getattr(torch, inner), torch.dtype):
        return getattr(torch, inner)
    if kind == "tuple":
        return tuple(_unpack(part, tensors) for part in inner)
    if kind != "dict":
        raise ValueError(f"it contains a {told(kind)}")
    return {key: _unpack(part, tensors) for key, part in inner}


def storable(value: Any) -> Any:
    """A value after a round trip through a checkpoint; raises `CheckpointError` if it cannot be stored."""
    tensors: dict[str, Tensor] = {}
    return _unpack(json.loads(json.dumps(_pack(value, "", tensors))), tensors)


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, sharing no memory: as required by safetensors."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        value = tensor.to("cpu").contiguous()
        shares = value.numel() and value.untyped_storage().data_ptr() in seen
        if shares or value.untyped_storage().nbytes() != value.numel() * value.element_size():
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        result[name] = value
    return result


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- all files of a run -------------------------------------------------------------------------------------------


class Store:
    """The checkpoints in a folder: full ones in `step-….safetensors`, the weights to keep in `best-….safetensors`.

    Keeps the newest two, the newest two of the regular cadence (rollback targets), and the best weights they refer to.
    """

    def __init__(self, folder: Path, every: int, *, keeps_best: bool = True) -> None:
        self.folder, self.every, self.keeps_best = folder, every, keeps_best

    def create(self) -> None:
        """Create the folder, and remove partial files of a killed process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*.partial-*"):
            left.unlink(missing_ok=True)

    def save(self, tree: dict[str, Any], progress: TrainingProgress) -> None:
        """Write the checkpoint of a step, and remove those no longer needed."""
        write_tree(self.path("step", progress.step), tree | {"progress": vars(progress)})
        steps = self.steps()
        keep = {*steps[-_KEPT:], *[step for step in steps if step % self.every == 0][-_KEPT:]}
        for step in steps:
            if step not in keep:
                self.path("step", step).unlink(missing_ok=True)
        oldest = self._best_of(min(keep))
        for step in self.steps("best"):
            if step != progress.best_step and (oldest is None or step < oldest):
                self.path("best", step).unlink(missing_ok=True)

    def save_best(self, weights: dict[str, Tensor], step: int) -> None:
        """Save weights that are better than all before."""
        write_tree(self.path("best", step), {"weights": weights})

    def best(self, step: int) -> dict[str, Tensor]:
        """The weights that were the best at this step."""
        tree = read_tree(self.path("best", step))
        check_fields(tree, {"weights": {"*": Tensor}}, str(self.path("best", step)))
        weights: dict[str, Tensor] = tree["weights"]
        return weights

    def newest(self, regular: bool = False) -> tuple[dict[str, Any], TrainingProgress] | None:
        """The newest readable checkpoint; damaged ones are logged and skipped. None if there is none.

        Raises `CheckpointError` if there are checkpoints and all are damaged.
        """
        steps = self.steps()
        if regular:  # there may be none after a change of the cadence
            steps = [step for step in steps if step % self.every == 0] or steps
        first: CheckpointError | None = None
        for step in reversed(steps):
            try:
                tree, progress = self._read(step)
                if self.keeps_best and progress.best_step is not None:
                    self.best(progress.best_step)
            except CheckpointError as error:
                logger.warning("%s: using the previous checkpoint", error)
                first = first or error
                continue
            return tree, progress
        if steps:
            raise CheckpointError(f"every checkpoint in {self.folder} is damaged; start over with --force. {first}")
        return None

    def _read(self, step: int) -> tuple[dict[str, Any], TrainingProgress]:
        """The checkpoint of a step; raises `CheckpointError` that names the field if no run can have written it."""
        file = self.path("step", step)
        tree = read_tree(file)
        check_fields(tree, {"progress": dict}, str(file))
        values = tree.pop("progress")
        where = f"{file}: progress"
        values.setdefault("elapsed", values.get("seconds"))  # of runs that did not count evaluations
        values.setdefault("best_loss", None)  # of runs in which a tie kept the earlier weights
        unknown = sorted(str(key) for key in set(values) ^ set(vars(TrainingProgress())))
        if unknown:
            raise CheckpointError(f"{where} is missing, or should not have, {', '.join(unknown)}")
        check_fields(values, _PROGRESS, where)
        for key in ("step", "best_step", "stale", "rollbacks", "seconds", "elapsed"):
            if values[key] is not None and not values[key] >= 0:
                raise CheckpointError(f"{where}: {key} must not be negative, got {told(values[key])}")
        if values["step"] != step or (values["best_step"] or 0) > step:
            raise CheckpointError(
                f"{where}: step {values['step']}, best_step {values['best_step']} in a file of step {step}"
            )
        for name, measures in values["start"].items():
            check_fields(measures, _MEASURED, f"{where}: start: {name}")
            if set(measures) != set(_MEASURED):
                raise CheckpointError(
                    f"{where}: start: {name} must have {', '.join(_MEASURED)}, got {told(sorted(measures))}"
                )
        return tree, TrainingProgress(**values)

    def drop_after(self, step: int) -> None:
        """Remove what a run that was rolled back to `step` will redo."""
        for kind in ("step", "best"):
            for later in self.steps(kind):
                if later > step:
                    self.path(kind, later).unlink(missing_ok=True)

    def steps(self, kind: str = "step") -> list[int]:
        """Steps that have a file, ascending."""
        found = (_STEP.fullmatch(file.name) for file in self.folder.iterdir())
        return sorted(int(match[2]) for match in found if match is not None and match[1] == kind)

    def path(self, kind: str, step: int) -> Path:
        """Path of a checkpoint."""
        return self.folder / f"{kind}-{step:09d}.safetensors"

    def _best_of(self, step: int) -> int | None:
        """The step of the best weights that a step's checkpoint refers to; None if there is none or it cannot be read."""
        with contextlib.suppress(CheckpointError, OSError, SafetensorError, KeyError, ValueError):
            with safe_open(self.path("step", step), framework="pt") as content:
                tree = _unpack(json.loads(content.metadata()["tree"]), _Nothing())
            best: int | None = tree["progress"]["best_step"]
            return best
        return None


class _Nothing(dict[str, Tensor]):
    """Replaces the tensors when only the rest of a tree is needed."""

    def __missing__(self, name: str) -> Tensor:
        return torch.empty(0)


# --- the log ------------------------------------------------------------------------------------------------------


class Log:
    """`log.jsonl`: one row per line. Resuming drops rows after the resumed step: they will be written again."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def cut(self, step: int) -> None:
        """Keep the rows up to a step."""
        rows = [row for row in read_log(self.file) if row.get("step", 0) <= step]
        write_text(self.file, "".join(map(_line, rows)))

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(_line(row))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(finite(row), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """JSON values with NaN and infinity replaced by null."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_log(file: Path) -> Iterator[dict[str, Any]]:
    """The rows; a line truncated by a kill is skipped. Raises `CheckpointError` for any other malformed row."""
    if not file.is_file():
        return
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        except RecursionError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step", 0), int):
            raise CheckpointError(
                f"{file}, line {number}: expected an object with the number of a step, got {told(line)}"
            )
        yield row
