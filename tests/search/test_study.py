"""The operation of a search: every mode, duplicates, refusals, and what a `kill -9` must not cost."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import timm
from optuna.storages import JournalStorage

from surgeon.errors import ConfigError, TrainingError
from surgeon.search.budget import Budgets
from surgeon.search.evaluate.evaluator import OutOfMemoryError, TableEvaluator
from surgeon.search.gains.gain import GainTable, uniform_gains
from surgeon.search.gate import Gate
from surgeon.search.placement.place import gain_of, optimum
from surgeon.search.placement.problem import InfeasibleError, Ints
from surgeon.search.run import MAX_ATTEMPTS, Search, SearchConfig
from surgeon.search.sampling.tuners import NAMES
from surgeon.search.space import SpaceConfig
from surgeon.search.study.journal import Lease, StudyError, StudyJournal, file_lock, is_alive
from surgeon.search.study.study import OtherStudyError
from surgeon.search.study.study_file import StudyFile
from tests.support.places import ROOT
from tests.support.search.records import proposals, read
from tests.support.search.toys import toy_gains, toy_problem, toy_search, toy_space

# --- in one process -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", NAMES)
def test_every_mode_searches_within_the_budgets(mode: str, tmp_path: Path) -> None:
    search = toy_search(tmp_path / "s.jsonl", sampler=mode, trials=16)
    search.open()
    outcome = search.run()
    assert (outcome.stopped, outcome.evaluated) == ("trials", 16)
    records = search.file.records()
    problem, true = search.problem, toy_gains(search.space)
    for one in records:
        placement = search.space.placement(one.placement)
        assert problem.feasible(placement)[0]
        assert one.hash == search.space.hash_of(placement)
        assert one.values == pytest.approx((gain_of(true, placement),))
    sources = Counter(one.source for one in records)
    assert sources["original"] == 1
    assert sources["optimum"] == 4
    assert sources[mode] + sources["unseen"] >= 7
    calls = (tmp_path / "calls.txt").read_text().split()
    assert len(calls) == len(set(calls)) == 16  # nothing was evaluated twice
    best = optimum(problem, true)
    assert best is not None
    assert outcome.best is not None
    assert outcome.best.values is not None
    assert outcome.best.values[0] <= gain_of(true, best) + 1e-9
    assert outcome.best.values[0] == max(one.values[0] for one in records if one.values)


def test_an_exhausted_space_ends_the_search(tmp_path: Path) -> None:
    problem = toy_problem(toy_space(), share=0.4, max_layers=1)
    search = toy_search(tmp_path / "s.jsonl", sampler="random", trials=500, problem=problem)
    search.open()
    outcome = search.run()
    assert outcome.stopped == "exhausted"
    for _ in range(2):  # resuming does not add to it
        again = toy_search(tmp_path / "s.jsonl", sampler="random", trials=500, problem=problem)
        again.open(resume=True)
        assert (again.run().stopped, again.file.ended) == ("exhausted", "every placement within the budgets was tried")
        assert Counter(one.state for one in again.file.view()) == {"complete": outcome.evaluated, "unused": 1}
    space, layers = search.space, search.problem.shape[0]
    singles = [
        np.eye(layers, dtype=np.int64)[i] * j for i in range(layers) for j in np.flatnonzero(space.allowed[i])[1:]
    ]
    assert outcome.evaluated == 1 + sum(bool(problem.feasible(p)[0]) for p in singles)


def test_what_is_proposed_again_is_replaced_by_something_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = toy_search(tmp_path / "s.jsonl", sampler="decoder", trials=14)
    gains = search.sampler.gains.gain
    monkeypatch.setattr(search.sampler, "decode", lambda problem, weights: optimum(problem, gains))
    search.open()
    search.run()
    records = search.file.records()
    assert [one.source for one in records[8:]] == ["unseen"] * 6  # the table's optimum is among the first trials
    assert len({one.hash for one in records}) == 14
    calls = (tmp_path / "calls.txt").read_text().split()
    assert len(calls) == len(set(calls)) == 14


def test_a_pruner_ends_what_is_not_promising(tmp_path: Path) -> None:
    pruner = optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=0)
    search = toy_search(tmp_path / "s.jsonl", sampler="random", trials=14, pruner=pruner)
    search.open()
    search.run()
    states = Counter(one.state for one in search.file.records())
    assert states["pruned"] >= 2
    assert states["complete"] >= 3
    assert search.file.best() in [one for one in search.file.records() if one.state == "complete"]


def test_another_study_is_refused_with_the_difference(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    search = toy_search(path, trials=9)
    search.open()
    search.run()
    before = path.read_bytes()
    with pytest.raises(StudyError, match="--resume"):
        toy_search(path, trials=9).open()
    with pytest.raises(OtherStudyError, match="seed is 0 in the study and 1 here"):
        toy_search(path, seed=1).open(resume=True)
    other = toy_search(path)
    other._identity["space"]["layers"][0] = "layer99"
    other._identity["model"] = "resnet50"
    with pytest.raises(OtherStudyError, match=r'model is "toy".*"resnet50".*without layer0 and with layer99'):
        other.open(resume=True)
    tight = toy_search(path, problem=toy_problem(toy_space(), share=0.3))
    with pytest.raises(OtherStudyError, match=r"budgets\.flops"):
        tight.open(resume=True)
    with pytest.raises(StudyError, match="no study"):
        toy_search(tmp_path / "none.jsonl").open(resume=True)
    assert path.read_bytes() == before
    (tmp_path / "text.jsonl").write_text("this is no journal\n")
    with pytest.raises(StudyError, match=r"cannot read the study .*text\.jsonl"):
        toy_search(tmp_path / "text.jsonl").open()


def test_a_study_goes_on_with_more_trials(tmp_path: Path) -> None:
    for trials, evaluated in ((9, 9), (9, 0), (12, 3)):
        search = toy_search(tmp_path / "s.jsonl", trials=trials)
        search.open(resume=trials > 9 or evaluated == 0)
        assert search.run().evaluated == evaluated


def test_ctrl_c_leaves_the_trial_open_and_it_is_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    search = toy_search(path, sampler="decoder", trials=12, pause=0.05)
    search.open()
    before = signal.getsignal(signal.SIGINT)
    timer = threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    outcome = search.run()
    timer.cancel()
    assert outcome.stopped == "interrupted"
    assert signal.getsignal(signal.SIGINT) is before
    assert not list(search.file.folder.iterdir())  # the lease is given back
    states = Counter(one.state for one in search.file.records())
    assert states["running"] <= 1
    again = toy_search(path, sampler="decoder", trials=12)
    again.open(resume=True)
    assert again.run().stopped == "trials"
    whole = toy_search(tmp_path / "whole" / "s.jsonl", sampler="decoder", trials=12)
    whole.file.path.parent.mkdir()
    whole.open()
    whole.run()
    assert proposals(again.file.records()) == proposals(whole.file.records())


def test_time_is_a_limit(tmp_path: Path) -> None:
    search = toy_search(tmp_path / "s.jsonl", trials=500, pause=0.05, max_time=0.5)
    search.open()
    started = time.monotonic()
    assert search.run().stopped == "time"
    assert time.monotonic() - started < 5
    with pytest.raises(ConfigError, match="--max-time"):
        toy_search(tmp_path / "t.jsonl", max_time=0.0)


class Failing(TableEvaluator):
    """Runs out of memory, or diverges, where the placement has more layers than it likes."""

    error: type[Exception] = OutOfMemoryError
    most = 1

    def evaluate(self, placement: Ints, report: Any, rung: int) -> float:
        if (placement != 0).sum() > self.most:
            raise self.error
        return float((placement != 0).sum())


def failing(path: Path, error: type[Exception]) -> Search:
    search = toy_search(path, sampler="random", trials=12)
    evaluator = Failing(search.space, {}, name="failing")
    evaluator.error = error
    search.evaluator = evaluator
    search.open()
    return search


def test_out_of_memory_is_written_down_and_the_search_goes_on(tmp_path: Path) -> None:
    search = failing(tmp_path / "s.jsonl", OutOfMemoryError)
    assert search.run().evaluated == 12
    refused = [one for one in search.file.records() if one.state == "refused"]
    assert refused
    assert all(one.attributes["refused"] == ["out of memory at run time"] for one in refused)
    assert len({one.hash for one in refused}) == len(refused)


def test_training_that_fails_is_written_down_and_bugs_are_raised(tmp_path: Path) -> None:
    search = failing(tmp_path / "s.jsonl", TrainingError)
    with pytest.raises(TrainingError):  # three in a row
        search.run()
    failed = [one for one in search.file.records() if one.state == "failed"]
    assert len(failed) >= MAX_ATTEMPTS
    assert all("TrainingError" in one.attributes["error"] for one in failed)
    broken = failing(tmp_path / "t.jsonl", ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        broken.run()
    assert not [one for one in broken.file.records() if one.state == "running"]


def test_a_table_of_values_from_a_file(tmp_path: Path) -> None:
    space = toy_space(2)
    rows = [{"placement": {}, "curve": [0.1, 0.2]}, {"placement": {"layer0": "sekg"}, "curve": [0.3]}]
    rows[1]["placement"] = {"layer1": "sekg"}
    (tmp_path / "t.json").write_text(json.dumps({"rows": rows}))
    table = TableEvaluator.read(tmp_path / "t.json", space)
    assert table.evaluate(np.array([0, 3]), lambda step, value: None, 0) == 0.3
    with pytest.raises(ConfigError, match="no value"):
        table.evaluate(np.array([1, 1]), lambda step, value: None, 0)
    (tmp_path / "u.json").write_text('{"rows": [{"placement": {"layer7": "sekg"}, "curve": [1]}]}')
    with pytest.raises(ConfigError, match="layer7"):
        TableEvaluator.read(tmp_path / "u.json", space)


def test_budgets_that_nothing_meets(tmp_path: Path) -> None:
    problem = toy_problem(toy_space()).limited({"flops": 1})
    search = toy_search(tmp_path / "s.jsonl", problem=problem)
    with pytest.raises(InfeasibleError):
        search.open()
    assert not (tmp_path / "s.jsonl").exists()


def test_gain_tables_must_have_what_the_space_allows(tmp_path: Path) -> None:
    search = toy_search(tmp_path / "s.jsonl")
    short = search.sampler.gains
    smaller = GainTable(
        layers=short.layers[1:], options=short.options, gain=short.gain[1:], error=short.error[1:], estimator="x"
    )
    with pytest.raises(ConfigError, match="no entry for layer0"):
        smaller.for_space(search.space)


class Small(TableEvaluator):
    """A device with less memory than the gate believes; what it is asked is kept."""

    def __init__(self, gate: Gate, needed: int) -> None:
        super().__init__(gate.space, {}, name="small")
        self.gate, self.needed, self.asked = gate, needed, list[int]()

    def evaluate(self, placement: Ints, report: Any, rung: int) -> float:
        found = self.gate.trace(placement)
        self.asked.append(found.peak_bytes)
        if found.peak_bytes > self.needed:
            raise OutOfMemoryError(None)
        return float((placement != 0).sum())


@pytest.mark.long
def test_the_gate_stands_before_every_evaluation_and_learns(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet")
    config = SpaceConfig(types=("pafu", "sekg"), group_sizes=(4,))

    def begin(resume: bool, flops: str = "+60%") -> tuple[Search, Gate, Small]:
        gate = Gate(model, config, Budgets.parse(flops=flops, memory="+40%"), batch_size=64, input_size=64)
        evaluator = Small(gate, int(gate.original.peak_bytes * 1.3))
        settings = SearchConfig(trials=7 if resume else 6, sampler="random")
        search = Search(StudyFile(tmp_path / "s"), gate.space, uniform_gains(gate.space), evaluator, gate, settings)
        search.open(resume=resume)
        return search, gate, evaluator

    search, gate, evaluator = begin(False)
    search.run()
    records = search.file.records()
    short = [
        one for one in records if one.state == "refused" and one.attributes["refused"] == ["out of memory at run time"]
    ]
    assert short
    for one in records:
        if "traced" in one.attributes:
            assert one.attributes["traced"]["flops"] <= 1.6 * gate.original.flops
    learned = search.file.calibration
    assert learned is not None
    assert len(learned.events) == len(short) == sum(peak > evaluator.needed for peak in evaluator.asked)
    failed = [peak for peak in evaluator.asked if peak > evaluator.needed]
    assert all(later < earlier for earlier, later in itertools.pairwise(failed))  # as much was never asked for again
    again, fresh, _ = begin(True)
    again.run()
    assert fresh.calibration.memory == (again.file.calibration or learned).memory
    assert fresh.calibration.memory is not None
    with pytest.raises(OtherStudyError, match=r'budgets\.flops is "\+60%" in the study and "\+70%" here\. Repeat'):
        begin(True, "+70%")


# --- the file -----------------------------------------------------------------------------------------------------


def test_a_torn_line_is_cut_off_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    search = toy_search(path, trials=8)
    search.open()
    search.run()
    records = proposals(read(path))
    with path.open("ab") as file:
        file.write(b'{"op_code": 5, "worker_id": "dead", "par')
    assert proposals(read(path)) == records
    again = toy_search(path, trials=9)
    again.open(resume=True)
    again.run()
    assert proposals(read(path))[: len(records)] == records
    assert sum(one.counts for one in read(path)) == 9


def test_what_is_written_together_appears_together(tmp_path: Path) -> None:
    journal = StudyJournal(tmp_path / "j")
    storage = JournalStorage(journal)
    study = optuna.create_study(storage=storage, study_name="x")
    size = journal.path.stat().st_size
    with journal.exclusive():
        study.set_user_attr("a", 1)
        with journal.exclusive():  # reentrant
            study.set_user_attr("b", 2)
        assert study.user_attrs == {"a": 1, "b": 2}
        assert journal.path.stat().st_size == size
    assert optuna.load_study(study_name="x", storage=JournalStorage(StudyJournal(journal.path))).user_attrs == {
        "a": 1,
        "b": 2,
    }
    study.set_user_attr("c", 3)
    assert study.user_attrs["c"] == 3


def test_leases_end_with_their_process(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom surgeon.search.study.journal import Lease\n"
        "lease = Lease(Path(sys.argv[1]), 'other')\nprint('held', flush=True)\ntime.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    assert is_alive(tmp_path, "other")
    with pytest.raises(StudyError, match="already running"):
        Lease(tmp_path, "other")
    child.kill()
    child.wait()
    child.stdout.close()
    assert not is_alive(tmp_path, "other")
    with Lease(tmp_path, "mine"):
        assert is_alive(tmp_path, "mine")
    assert not is_alive(tmp_path, "mine")
    with file_lock(tmp_path / "lock"), file_lock(tmp_path / "lock"):
        pass
