"""Writing a folder: what is there is replaced only by force, and whatever stops the writing leaves nothing half-written."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm

from surgeon.errors import CheckpointError
from surgeon.models import folder
from surgeon.models.checkpoint import load, save
from surgeon.records.recipe import Recipe, Rule
from tests.support.forks import Fork
from tests.support.tiny_runs import contents, environment, tiny


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tiny(), tmp_path / "run")
    return tmp_path / "run"


# --- writing ------------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_replaced_only_by_force(saved: Path) -> None:
    before = contents(saved)
    with pytest.raises(CheckpointError, match=r"exists.*force=True"):
        save(tiny(), saved)
    assert contents(saved) == before
    save(tiny(num_classes=3), saved, force=True)
    back: Any = load(saved)
    assert back.fc.out_features == 3
    assert [path.name for path in saved.parent.iterdir()] == ["run"]


def test_force_leaves_alone_what_surgeon_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="not written by surgeon"):
        save(tiny(), tmp_path / "home", force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="not a folder"):
        save(tiny(), tmp_path / "file", force=True)
    (tmp_path / "link").symlink_to(tmp_path / "home")
    with pytest.raises(CheckpointError, match="not a folder"):
        save(tiny(), tmp_path / "link", force=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    save(tiny(), tmp_path / "empty", force=True)
    load(tmp_path / "empty")


STEPS = ["checkpoint.save_file", "checkpoint.write", "folder.sync", "folder._take_place"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    ("failure", "seen"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), CheckpointError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_whatever_stops_the_writing_leaves_things_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, forced: bool, failure: BaseException, seen: Any
) -> None:
    if forced:
        save(tiny(), tmp_path / "run")
    before = contents(tmp_path / "run") if forced else {}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise failure

    monkeypatch.setattr(f"surgeon.models.{step}", fail)
    with pytest.raises(seen) as caught:
        save(tiny(num_classes=3), tmp_path / "run", force=True)
    if seen is CheckpointError:
        assert str(tmp_path / "run") in str(caught.value)
        assert "No space left on device" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == (["run"] if forced else [])
    assert (contents(tmp_path / "run") if forced else {}) == before


def test_the_old_folder_returns_if_the_new_one_cannot_take_its_place(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(saved)
    rename = Path.rename

    def fail(self: Path, target: Any) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(tiny(), saved, force=True)
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["run"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot write"):
        save(tiny(), tmp_path / "file" / "run")


# A disk of one megabyte at $1, seen only by the command behind it, which anybody may mount whom the kernel gives a namespace.
SMALL_DISK = (
    *("unshare", "--mount", "--map-root-user", "sh", "-c"),
    *('mount -t tmpfs -o size=1m tmpfs "$1" && shift && exec "$@"', "sh"),
)


def why_no_small_disk() -> str | None:
    """The reason why none can be mounted here."""
    if shutil.which("unshare") is None:
        return "mounting a small disk for one process needs Linux's unshare, which is not here"
    done = subprocess.run([*SMALL_DISK, os.path.realpath("/tmp"), "true"], capture_output=True, text=True, check=False)
    return f"this kernel lets no process mount a disk of its own: {done.stderr.strip()}" if done.returncode else None


NO_SMALL_DISK = why_no_small_disk()


@pytest.mark.long
@pytest.mark.skipif(NO_SMALL_DISK is not None, reason=NO_SMALL_DISK or "")
def test_a_really_full_disk(tmp_path: Path) -> None:
    code = (
        "import os, sys, timm, surgeon\n"
        "try:\n"
        "    surgeon.save(timm.create_model('test_resnet'), sys.argv[1] + '/run')\n"
        "finally:\n"
        "    print(os.listdir(sys.argv[1]))\n"
    )
    command = [*SMALL_DISK, str(tmp_path), sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 1
    assert "CheckpointError" in done.stderr, done.stderr
    assert "No space left on device" in done.stderr, done.stderr
    assert done.stdout.strip() == "[]"


def save_small_files_only(arguments: Sequence[str]) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
    with pytest.raises(CheckpointError, match="cannot write"):
        save(timm.create_model("test_resnet"), arguments[0])


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    child = Fork(save_small_files_only, [str(tmp_path / "run")])
    _, error = child.communicate()
    assert child.returncode == 0, error
    assert list(tmp_path.iterdir()) == []


def save_slowly(arguments: Sequence[str]) -> int:
    def slow(path: Path) -> None:
        print("writing", flush=True)
        time.sleep(60)

    folder.sync = slow
    try:
        save(timm.create_model("test_resnet"), arguments[0], force=True)
    except KeyboardInterrupt:
        return 130
    return 0


def interrupted(path: Path, number: signal.Signals) -> int | None:
    """The exit code of a process that was sent a signal while it wrote the folder, after the weights."""
    child = Fork(save_slowly, [str(path)])
    assert child.stdout.readline() == "writing\n"
    child.send_signal(number)
    child.communicate(30)
    return child.returncode


def test_ctrl_c_in_the_middle_of_writing_leaves_nothing(tmp_path: Path) -> None:
    assert interrupted(tmp_path / "run", signal.SIGINT) == 130
    assert list(tmp_path.iterdir()) == []


def test_a_kill_in_the_middle_of_writing_leaves_no_folder_of_that_name(saved: Path) -> None:
    before = contents(saved)
    assert interrupted(saved, signal.SIGKILL) == -signal.SIGKILL
    assert contents(saved) == before
    left = [path.name for path in saved.parent.iterdir() if path != saved]
    assert len(left) == 1
    assert left[0].startswith(".run.partial-")
    save(tiny(), saved, force=True)
    assert [path.name for path in saved.parent.iterdir()] == ["run"], "the next run cleans up"


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    from surgeon.util.machine import machine

    other = tmp_path / f".run.partial-{machine()}-{os.getppid()}-0"
    other.mkdir()
    save(tiny(), tmp_path / "run")
    assert other.is_dir()


def test_rules_of_hand_written_recipes_do_not_load_as_models(saved: Path) -> None:
    recipe = Recipe(rules=(Rule(layers="stage4", type="pafu"),))
    (saved / "recipe.json").write_text(recipe.to_json())
    with pytest.raises(CheckpointError, match="not that of a saved model"):
        load(saved)
