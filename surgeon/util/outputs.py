"""Checks of output paths, made before any work and before heavy libraries are loaded."""

from pathlib import Path
from typing import Any, Literal

from surgeon.errors import CheckpointError, ConfigError, called

RECIPE = "recipe.json"  # marks a surgeon folder
WEIGHTS = "model.safetensors"  # of a surgeon folder
RUN = Path("training", "run.json")  # the record of a run of fine-tuning in its folder
SUMMARY = Path("training", "summary.json")  # what came of it, once it is complete
TRIAL = "try.json"  # the record of `surgeon try`
SEARCH = "search.json"  # marks the folder of a search
EXPORTS = {".onnx": "onnx", ".pt2": "torch"}  # formats of exported files by suffix
STUDY = "study.jsonl"  # the trials of a search in its folder
FORCE = ("--force", "force=True")
RESUME = ("--resume", "resume=True")
WAYS = "continue it ({}) or replace it ({})"


def check_no_search(path: str | Path) -> None:
    """Raise `CheckpointError` if there is a search in a folder already."""
    if Path(path, STUDY).is_file():
        raise CheckpointError(f"there is already a search in {path}: continue it ({called(*RESUME)}) or choose another")


def is_surgeon_folder(path: str | Path) -> bool:
    """Whether a path is a folder that contains a model written by surgeon."""
    return Path(path, RECIPE).is_file()


def check_output(path: str | Path, *, force: bool = False) -> None:
    """Raise `CheckpointError` unless a surgeon folder may be written at `path`."""
    path = Path(path)
    if not path.exists() and not path.is_symlink():
        return
    _check_replaceable(path, ours=is_surgeon_folder(path), why=f" (it has no {RECIPE})", force=force)
    if not force:
        raise CheckpointError(f"the output {path} exists; {_another()}, or replace it with {called(*FORCE)}")


def _another() -> str:
    return f"choose another{called(' with -o', '')}"


def _check_replaceable(path: Path, *, ours: bool, why: str, force: bool) -> None:
    """Raise `CheckpointError` if an existing output is nothing that `force` replaces: a file, or a folder of others."""
    if not path.is_dir() or path.is_symlink():
        told = f"{called(*FORCE)} replaces only folders" if force else _another()
        raise CheckpointError(f"the output {path} exists and is not a folder: {told}")
    if any(path.iterdir()) and not ours:
        told = f"{called(*FORCE)} leaves it alone" if force else _another()
        raise CheckpointError(f"the output {path} exists and was not written by surgeon{why}: {told}")


def check_run_output(output: Path, *, resume: bool, force: bool) -> None:
    """Raise unless a fine-tuning run may be started or resumed in a folder.

    `ConfigError` for both flags at once, `CheckpointError` for an existing or missing run.
    """
    if resume and force:
        raise ConfigError(f"{called(*RESUME)} continues a run, {called(*FORCE)} replaces it: give only one of them")
    there = (output / RUN).is_file()
    if resume:
        if not there:
            raise CheckpointError(
                f"no run to resume in {output}: it has no {RUN}; without {called(*RESUME)} one is started"
            )
        return
    if not output.exists() and not output.is_symlink():
        return
    _check_replaceable(output, ours=there or is_surgeon_folder(output), why="", force=force)
    if not force:
        hint = WAYS.format(called(*RESUME), called(*FORCE)) if there else f"or use {called(*FORCE)}"
        raise CheckpointError(f"the output {output} exists; {_another()}, {hint}")


def check_trial_output(output: Path, *, resume: bool, force: bool) -> None:
    """Like `check_run_output`, for `surgeon try`."""
    if resume and force:
        raise ConfigError(f"{called(*RESUME)} continues a trial, {called(*FORCE)} replaces it: give only one of them")
    there = (output / TRIAL).is_file()
    if resume:
        if not there:
            raise CheckpointError(f"no trial to resume in {output}: it has no {TRIAL}")
    elif output.exists() or output.is_symlink():
        if not force:
            hint = WAYS.format(called(*RESUME), called(*FORCE)) if there else "choose another"
            raise CheckpointError(f"the output {output} exists; {hint}")
        if output.is_symlink() or not there:
            raise CheckpointError(
                f"the output {output} was not written by surgeon try: {called(*FORCE)} leaves it alone"
            )


def check_file_output(path: str | Path, *, force: bool = False) -> None:
    """Raise `ConfigError` unless a file may be written at `path`."""
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file")
    if path.exists() and not force:
        raise ConfigError(f"{path} exists; choose another{called(' with -o', '')}, or replace it with {called(*FORCE)}")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ConfigError(f"cannot write {path}: {above} is not a folder")


def export_format(given: str | None, path: str | Path) -> Literal["onnx", "torch"]:
    """The requested format of an exported file, otherwise that of its suffix; raises `ConfigError` if neither or both say."""
    named = EXPORTS.get(Path(path).suffix)
    found: Any = given or named
    if given in EXPORTS.values() and named not in (given, None):
        told = called(f"--format {given}", f"format={given!r}")
        raise ConfigError(
            f"{told} contradicts the name {Path(path).name}, which is of a file for {named}: leave it out"
        )
    if found is None:
        option = called("--format onnx or torch", "format='onnx' or format='torch'")
        raise ConfigError(
            f"cannot tell the format from {Path(path).name}: use {option}, or a name ending in .onnx or .pt2"
        )
    known: Literal["onnx", "torch"] = found  # other given formats are refused with the rest of the target
    return known
