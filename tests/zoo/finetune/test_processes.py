"""Runs in processes of their own: killed at any moment and taken up again; two processes together."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.training.driver import losses, outcome


def driver(root: Path, *arguments: str, processes: int = 1) -> str:
    """What the driver prints; its stderr is in the error where it fails."""
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    command = [sys.executable, "-P", *launch, "-m", "tests.support.training.driver", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill(root: Path, folder: Path, moments: int, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(driver(root, "kill", str(folder), str(moments), str(seed)))
    return found


def test_killed_at_random_moments(root: Path, tmp_path: Path) -> None:
    found = kill(root, tmp_path, 2, 11)
    assert found["killed"] >= 2
    assert all(found["equal"])


@pytest.mark.slow
def test_killed_at_twenty_random_moments(root: Path, tmp_path: Path) -> None:
    found = kill(root, tmp_path, 20, 12)
    assert found["killed"] >= 20
    assert all(found["equal"])


def test_two_processes_learn_as_one(root: Path, tmp_path: Path) -> None:
    driver(root, "train", str(tmp_path / "one"))
    driver(root, "train", str(tmp_path / "two"), processes=2)
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
