"""Runs in processes of their own: killed at any moment and taken up again; two processes together."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.forks import Fork
from tests.support.search.servers import free_port
from tests.support.training.driver import losses, main, outcome


def finish(process: Fork) -> str:
    """What it prints; its stderr is in the error where it fails."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


def kill(folder: Path, moments: int, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(finish(Fork(main, ["kill", str(folder), str(moments), str(seed)])))
    return found


def test_killed_at_random_moments(tmp_path: Path) -> None:
    found = kill(tmp_path, 2, 11)
    assert found["killed"] >= 2
    assert all(found["equal"])


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    found = kill(tmp_path, 20, 12)
    assert found["killed"] >= 20
    assert all(found["equal"])


def test_two_processes_learn_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(Fork(main, ["train", str(tmp_path / "one")]))
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in ("0", "1"):  # the environment in which torchrun starts them
        for name, value in (together | {"RANK": rank, "LOCAL_RANK": rank}).items():
            monkeypatch.setenv(name, value)
        processes.append(Fork(main, ["train", str(tmp_path / "two")]))
    for process in processes:
        finish(process)
    assert_one(tmp_path)


@pytest.mark.slow
def test_torchrun_starts_them(root: Path, tmp_path: Path) -> None:
    finish(Fork(main, ["train", str(tmp_path / "one")]))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-P", *launch, "-m", "tests.support.training.driver", "train", str(tmp_path / "two")]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    assert_one(tmp_path)


def assert_one(tmp_path: Path) -> None:
    """The run `two` was that of two processes, and learned what `one` did."""
    record = json.loads((tmp_path / "two" / "training" / "run.json").read_text())
    assert record["processes"] == 2
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 9
    assert [step for step, _ in one] == [step for step, _ in two]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-5)
    ends = [outcome(tmp_path / name) for name in ("one", "two")]
    assert ends[0]["metrics"] == pytest.approx(ends[1]["metrics"], rel=1e-5)
    for name, values in ends[0]["weights"].items():
        assert ends[1]["weights"][name] == pytest.approx(values, rel=1e-4, abs=1e-6), name
