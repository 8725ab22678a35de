"""A search with several workers: databases, jobs, and a worker that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from surgeon.cli import main
from surgeon.commands.search import jobs
from surgeon.search.study.database import StudyDatabase
from surgeon.search.study.folder import read_search
from surgeon.zoo.finetune.loop import Run
from tests.support import forks
from tests.support.forks import Fork
from tests.support.places import ROOT
from tests.support.search.servers import free_port
from tests.support.search.tasks import FACTORY, FOUR, RANDOM, SHORT, SPACE, document, search_arguments

pytestmark = pytest.mark.usefixtures("tiny_tasks")

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


@pytest.mark.long
def test_a_search_in_a_database_is_begun_joined_and_read(database: str, capsys: Capture, tmp_path: Path) -> None:
    shared = ["--storage", database, "--no-pruning", "--sampler", "random"]
    assert main(search_arguments("r50", "--trials", "2", *shared)) == 0
    assert "other machines join with --join r50" in capsys.readouterr().err
    assert not Path("r50/study.jsonl").exists()
    assert main(search_arguments("r50", "--trials", "3", *shared)) == 2  # it exists
    assert "continue it (--join r50)" in capsys.readouterr().err
    join = ["search", FACTORY, "--task", "tiny-regression", *SPACE, *SHORT, "--trials", "4", *shared]
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")  # as if on another machine
    assert main([*join, "--join", "nobody"]) == 2
    assert "Existing studies: r50" in capsys.readouterr().err
    assert not Path("runs").exists()
    assert main([*join, "--join", "r50", "--max-flops", "+300%"]) == 2
    assert "--max-flops is " in capsys.readouterr().err
    assert not Path("runs").exists()
    assert main([*join, "--join", "r50", "--quiet"]) == 0
    capsys.readouterr()
    found = read_search("runs/r50")
    assert sum(one.counts for one in found.records) == 4
    assert len({one.worker for one in found.records if one.counts}) == 2
    assert main(["study", "status", "runs/r50", "--json"]) == 0
    assert document(capsys)["trials"]["complete"] == 4
    os.chdir(tmp_path)
    assert main(["study", "best", "r50", "--json"]) == 0  # the first machine sees all trials
    assert document(capsys)[0]["value"] == min(found.value(one) or 1e9 for one in found.ranked())
    assert main(search_arguments("r50", "--trials", "4", "--resume")) == 2
    assert "pass its --storage" in capsys.readouterr().err
    assert main(search_arguments("r50", "--trials", "5", *shared, "--resume", "--quiet")) == 0
    assert "tester" not in Path("r50/search.json").read_text()


def test_passwords_are_not_written_down(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    study = StudyDatabase("postgresql://me:secret@127.0.0.1:1/x", "s")
    assert study.address == {"url": "postgresql+psycopg://me@127.0.0.1:1/x", "name": "s"}
    assert "secret" not in str(study)


def test_a_database_that_cannot_be_reached_is_one_error(capsys: Capture) -> None:
    pytest.importorskip("psycopg")
    url = f"postgresql://me:secret@127.0.0.1:{free_port()}/x"
    for more in ([], ["--join", "x"]):
        assert main(search_arguments("s", "--quiet", "--storage", url, *more)) == 2
        out, error = capsys.readouterr()
        assert "cannot reach the database postgresql+psycopg://me:***@127.0.0.1" in error
        assert error.count("\n") == 1
        assert out == ""
        assert not Path("s").exists()


def test_jobs_are_workers_of_one_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(jobs, "multiprocessing", SimpleNamespace(get_context=lambda method: forks.context()))
    train, boards, deadline = Run.train, tmp_path / "s" / "tensorboard", time.monotonic() + 60

    def both(run: Run) -> None:  # after a trial of its own, this one waits for one of the other
        while boards.is_dir() and len(list(boards.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        train(run)

    monkeypatch.setattr(Run, "train", both)
    assert main(search_arguments(tmp_path / "s", *RANDOM, "--trials", "5", "--jobs", "2", "--json")) == 0
    _check_jobs(tmp_path / "s", 5, document(capsys))


@pytest.mark.slow  # an interpreter of its own for each worker: the second takes seconds to start
def test_jobs_are_interpreters(tmp_path: Path) -> None:
    more = [*RANDOM, "--trials", "26", "--jobs", "2", "--json", "--steps", "60"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tests.support.search.tasks", *search_arguments(tmp_path / "s", *more)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    _check_jobs(tmp_path / "s", 26, json.loads(done.stdout))


def _check_jobs(folder: Path, trials: int, told: Any) -> None:
    found = read_search(folder)
    assert sum(one.counts for one in found.records) == trials
    assert len({one.hash for one in found.records if one.counts}) == trials
    assert told["workers"] == 0
    names = {one.worker for one in found.records if one.worker is not None}
    assert len(names) == 2
    boards = {path.name for path in (folder / "tensorboard").iterdir()}
    assert boards == {name.rsplit("-", 1)[0] for name in names}  # host and process


def test_a_killed_search_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    worker = Fork(main, search_arguments(broken, *FOUR))
    for line in worker.stderr:
        if "trial 1:" in line:
            break
    time.sleep(0.1)  # into the next training
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    before = read_search(broken)
    done = [one for one in before.records if one.state == "complete"]
    assert len(done) >= 2
    states = [one.state for one in before.records]
    assert states.count("interrupted") <= 1
    assert "running" not in states, "its worker is dead"
    again = Fork(main, search_arguments(broken, *FOUR, "--resume"))
    _, error = again.communicate()
    assert again.returncode == 0, error
    assert main(search_arguments(whole, *FOUR, "--quiet")) == 0
    expected = [(one.number, one.hash, one.values) for one in read_search(whole).records]
    assert [(one.number, one.hash, one.values) for one in read_search(broken).records] == expected
    assert sum(one.attempts - 1 for one in read_search(broken).records if one.attempts) <= 1
