"""`surgeon try`: what it says of time, before its runs and after them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surgeon.cli import main
from surgeon.zoo.trial.run import Trial
from surgeon.zoo.trial.speed import Speed, rounds, told_times
from tests.support.search.tasks import FACTORY

QUICK = ["--task", "tiny-regression", "--type", "pafu", "--layers", "all", "--option", "group_size=2"]
QUICK += ["--steps", "4", "--batch-size", "4", "--device", "cpu", "-o", "out"]

Try = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def attempt(tiny_tasks: None, capsys: pytest.CaptureFixture[str]) -> Try:
    def run(*more: str) -> tuple[dict[str, Any], str]:
        main(["try", FACTORY, *QUICK, "--json", *more])
        out, told = capsys.readouterr()
        return json.loads(out), told

    return run


def in_turn(before: list[float], after: list[float]) -> dict[str, list[float]]:
    return {"original": before, "converted": after}


def test_the_factor_of_time_is_that_of_steps_in_turn(attempt: Try, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the runs, at different moments: whichever had the busier machine would look slower."""
    times = [[0.4, 0.5, 0.45], [0.5, 0.6, 0.54]]
    monkeypatch.setattr("surgeon.zoo.trial.run.paced", lambda networks, task, config, *, rounds: times)
    found, told = attempt("--seeds", "1", "--lr", "0.01")
    assert found["factors"]["step_seconds"] == pytest.approx(1.2)
    assert "x1.2 time a step" in found["answer"]
    assert "a step of the converted network takes about 540 ms" in told
    monkeypatch.setattr("surgeon.zoo.trial.run.paced", lambda *args, **options: pytest.fail("timed again"))
    assert attempt("--seeds", "1", "--lr", "0.01", "--resume")[0]["factors"] == found["factors"]


def test_the_record_has_the_steps_that_were_timed_in_turn(attempt: Try) -> None:
    found, _ = attempt("--seeds", "1", "--lr", "0.01")
    assert found["factors"]["step_seconds"] > 0
    pace = json.loads(Path("out/try.json").read_text(encoding="utf-8"))["pace"]
    assert len(pace["original"]) == len(pace["converted"]) >= 3


@pytest.mark.parametrize(
    ("pace", "trained", "told"),
    [
        (in_turn([0.4] * 4, [0.5] * 4), in_turn([0.4, 0.5], [0.5, 0.6]), []),
        (in_turn([0.435] * 4, [0.548] * 4), in_turn([1.0], [0.66]), ["in the runs a step took x0.66 the time"]),
        (in_turn([0.4] * 4, [0.5] * 4), in_turn([1, 1], [1.9, 2.1]), ["in the runs a step took x1.9 to x2.1 the time"]),
        (in_turn([0.4] * 4, [0.2, 0.3, 0.8, 0.9]), in_turn([1], [1.2]), ["the time of a step is rough"]),
        (in_turn([], []), in_turn([1.0], [0.66]), []),
    ],
)
def test_times_that_contradict_each_other_are_told(
    pace: dict[str, list[float]], trained: dict[str, list[float]], told: list[str]
) -> None:
    notes = told_times(pace, trained)
    assert len(notes) == len(told)
    assert all(note.startswith(start) for note, start in zip(notes, told, strict=True))


def test_slow_steps_are_timed_three_times() -> None:
    assert [rounds(step) for step in (0.0, 1.0, 5.0, 60.0)] == [15, 10, 3, 3]


def test_rates_without_time_are_told_and_what_tries_them(attempt: Try, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Trial.expected
    monkeypatch.setattr(Trial, "expected", lambda trial, runs: 1e6 if len(trial.scores) == 4 else expected(trial, runs))
    found, _ = attempt("--lr", "1e-4", "3e-4", "1e-3")
    assert list(found["swept"]["original"]) == ["0.0001", "0.0003"]
    (note,) = [note for note in found["notes"] if "the time is up" in note]
    assert re.search(r"--resume --max-time \S+ tries rate 0.001, which had no time, and trains more seeds$", note)
    edges = [note for note in found["notes"] if "at the edge" in note]
    at_edge = [arm for arm, rate in found["rates"].items() if rate == 1e-4]  # one beyond 3e-4 was planned
    assert len(edges) == bool(at_edge)
    assert all(f"{arm}, 0.0001," in edges[0] for arm in at_edge)
    monkeypatch.setattr(Trial, "expected", expected)
    found, _ = attempt("--lr", "1e-4", "3e-4", "1e-3", "--resume", "--seeds", "1")
    assert list(found["swept"]["original"]) == ["0.0001", "0.0003", "0.001"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--max-time", "30m"], r"this gives about 3 seeds$"),
        (["--max-time", "2m"], r"this gives about 2 seeds, and an answer takes 3: --max-time [45]m$"),
        (["--max-time", "30m", "--seeds", "2"], r"this gives about 2 seeds, and an answer takes 3: --seeds 3$"),
    ],
)
def test_what_the_time_gives_is_said_before_the_first_run(
    more: list[str], told: str, attempt: Try, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trial, "_measure", lambda trial: Speed(step=10.0, sample=0.0, run=10.0))
    monkeypatch.setattr(Trial, "_one", lambda trial, *run: False)
    _, error = attempt("--lr", "0.01", "--seeds", "3", *more)
    (plan,) = [line for line in error.splitlines() if "plan: " in line]
    assert re.search(told, plan), plan


def test_scores_are_told_with_the_samples_that_they_are_of(attempt: Try) -> None:
    """The network as it was is judged before the first run if that is cheap."""
    found, told = attempt("--lr", "0.01", "0.1", "--seeds", "1")
    choose, judge = found["samples"]["choose"], found["samples"]["judge"]
    start = f"surgeon: untrained: mse {found['start']:.4g} (on {judge} samples for judging)\n"
    assert told.index(start) < told.index("surgeon: run 1: ")
    scores = re.findall(r"step 4/4: .*", told)
    assert len(scores) == 4
    assert all(line.endswith(f" (on {choose} samples for choosing rates)") for line in scores)
    (note,) = [note for note in found["notes"] if "at the edge" in note]
    assert note.startswith("the best rates of original, ")
    assert " and converted, " in note


def test_a_network_whose_judging_is_not_cheap_is_judged_last(attempt: Try, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "_measure", lambda trial: Speed(step=0.01, sample=16.0, run=0.1))
    found, told = attempt("--lr", "0.01", "--seeds", "1", "--max-time", "2m")
    assert found["start"] > 0
    assert "untrained: " not in told


def test_how_many_samples_judge_is_said_before_the_first_run(attempt: Try, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "_measure", lambda trial: Speed(step=0.01, sample=16.0, run=0.1))
    monkeypatch.setattr(Trial, "_one", lambda trial, *run: False)
    _, error = attempt("--lr", "0.01", "--seeds", "3", "--max-time", "2m")
    assert re.search(r"; 1 sample of \d+ judges, --max-time \d+m takes \d+; this gives about 3 seeds", error), error
