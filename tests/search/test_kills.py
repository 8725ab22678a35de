"""Workers of a search that are killed at any moment: nothing that was completed is lost, nothing is proposed otherwise."""

import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from surgeon.search.run import MAX_ATTEMPTS
from tests.support.search.records import proposals, read
from tests.support.search.toys import toy_problem, toy_search, toy_space
from tests.support.search.workers import finish, kill_midway, worker

# --- kill -9 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["decoder", pytest.param("posterior", marks=pytest.mark.slow)])
def test_a_killed_search_goes_on_as_if_nothing_had_happened(mode: str, tmp_path: Path) -> None:
    path, moments = tmp_path / "s.jsonl", random.Random(5)
    completed: list[Any] = []
    for kill in range(2):
        kill_midway(worker(path, mode, 14, 0.08, "resume" if kill else "new"), moments.uniform(0.05, 0.6))
        now = [one for one in proposals(read(path)) if one[2] is not None]
        assert now[: len(completed)] == completed  # nothing completed is lost
        completed = now
    assert finish(worker(path, mode, 14, 0.0, "resume")) == "trials"
    whole = toy_search(tmp_path / "whole.jsonl", sampler=mode, trials=14, seed=3)
    whole.open()
    whole.run()
    killed = read(path)
    assert proposals(killed) == proposals(whole.file.records())
    assert sum(one.attempts - 1 for one in killed) <= 2  # at most one redone a kill
    assert {one.state for one in killed} == {"complete"}


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path: Path) -> None:
    path, moments = tmp_path / "s.jsonl", random.Random(11)
    toy_search(path, sampler="decoder", trials=30, seed=3).open()
    completed: list[Any] = []
    for _ in range(20):
        kill_midway(worker(path, "decoder", 30, 0.1, "resume"), moments.uniform(0.0, 0.5))
        now = [one for one in proposals(read(path)) if one[2] is not None]
        assert now[: len(completed)] == completed
        completed = now
    assert finish(worker(path, "decoder", 30, 0.0, "resume")) == "trials"
    whole = toy_search(tmp_path / "whole.jsonl", sampler="decoder", trials=30, seed=3)
    whole.open()
    whole.run()
    killed = read(path)
    assert proposals(killed) == proposals(whole.file.records())
    assert sum(one.attempts - 1 for one in killed if one.attempts) <= 20


def test_two_workers_share_a_study_and_one_may_die(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    toy_search(path, sampler="decoder", trials=18, seed=3).open()
    first, second = children = [worker(path, "decoder", 18, 0.15, "wait") for _ in range(2)]
    for child in children:
        assert child.stdout.readline() == "open\n"
    (tmp_path / "go").touch()  # both at once, however long they took to start
    time.sleep(0.6)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    assert finish(first) == "trials"
    records = read(path)
    assert sum(one.counts for one in records) == 18
    assert {one.state for one in records} == {"complete"}
    evaluated = Counter(one.hash for one in records if one.counts)
    assert set(evaluated.values()) == {1}
    calls = Counter((tmp_path / "calls.txt").read_text().split())
    assert sum(calls.values()) - len(calls) <= 1  # at most the one in flight was begun twice
    assert len({one.worker for one in records}) == 2


@pytest.mark.slow
def test_twenty_kills_of_one_of_two_workers(tmp_path: Path) -> None:
    path, moments = tmp_path / "s.jsonl", random.Random(13)
    share = 1.0  # thousands of placements: more than two workers get through
    toy_search(path, sampler="random", trials=2000, seed=3, problem=toy_problem(toy_space(), share=share)).open()
    steady = worker(path, "random", 2000, 0.2, "resume", share)
    completed: dict[int, Any] = {}
    for _ in range(20):
        kill_midway(worker(path, "random", 2000, 0.2, "resume", share), moments.uniform(0.0, 0.8))
        now = {one[0]: one for one in proposals(read(path)) if one[2] is not None}
        assert {number: now[number] for number in completed} == completed  # nothing completed is lost
        completed = now
    steady.send_signal(signal.SIGINT)
    assert finish(steady) == "interrupted"
    left = [one for one in read(path) if one.state == "running"]
    assert len(left) <= 2  # what both had in hand; all that was orphaned before was taken up
    done = sum(one.counts for one in read(path)) + len(left)
    assert finish(worker(path, "random", done, 0.0, "resume", share)) == "trials"
    records = [one for one in read(path) if one.state != "waiting"]
    assert {one.state for one in records} == {"complete"}
    assert set(Counter(one.hash for one in records if one.counts).values()) == {1}
    assert sum(one.attempts - 1 for one in records) <= 22  # at most one redone a kill
    calls = Counter((tmp_path / "calls.txt").read_text().split())
    assert set(calls) == {one.hash for one in records}
    assert sum(calls.values()) - len(calls) <= 22


def test_a_trial_that_kills_its_workers_is_given_up(tmp_path: Path) -> None:
    search = toy_search(tmp_path / "s.jsonl", trials=8)
    search.open()
    with search.file.working():
        trial = search.file.study.ask()
        search.file.claim(trial, attempts=MAX_ATTEMPTS)
    again = toy_search(tmp_path / "s.jsonl", trials=8)
    again.open(resume=True)
    again.run()
    dead = again.file.records()[0]
    assert dead.state == "failed"
    assert "died" in dead.attributes["error"]
