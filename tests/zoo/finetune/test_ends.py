"""How a run of finetune ends: early, out of time, interrupted, set back after NaN, or refused before it begins."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surgeon.errors import CheckpointError, ConfigError, DataError, TrainingError
from surgeon.zoo.evaluate import evaluate as measure
from surgeon.zoo.finetune import FinetuneResult, finetune, loop, run
from surgeon.zoo.finetune.evaluation import Evaluation, evaluate
from surgeon.zoo.finetune.folder import RunFolder
from surgeon.zoo.finetune.loop import Interrupted, Run
from surgeon.zoo.tasks import Batch
from tests.support.tiny_runs import contents
from tests.support.training.runs import QUICK, Watch, equal, interrupt_at, rows, weights, with_
from tests.support.training.tasks import TinyRegression, classification, converted, make_restorer, regression


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    """A run that nothing stops."""
    return finetune(converted("pafu"), regression(), QUICK, tmp_path_factory.mktemp("whole") / "run")


# --- ends ---------------------------------------------------------------------------------------------------------


class Worse(TinyRegression):
    """Its metric gets worse from the third evaluation on, whatever is learned."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.count = 0

    def update(self, metrics: Any, output: Any, batch: Batch) -> None:
        self.count += 1
        metrics["mse"].update(torch.tensor(float(abs(self.count - 3) + 1)))


def test_early_stopping_keeps_the_best() -> None:
    task = Worse(regression().config)
    config = with_(epochs=100, eval_every="3", eval_batch_size=5, patience=2, recalibrate=0)
    summary = finetune(make_restorer(), task, config).summary
    assert summary.stopped == "patience"
    assert summary.kept_step == 6  # evaluations after 0, 3, 6, 9 and 12 steps: 3, 2, 1, 2, 3
    assert summary.steps == 12


def test_a_run_that_makes_worse_gives_back_the_start() -> None:
    task = regression()
    model = finetune(make_restorer(), task, with_(epochs=10)).model
    config = with_(lr=3.0, clip=None, max_rollbacks=0, recalibrate=0)
    result = finetune(model, task, config)
    assert result.summary.kept_step == 0
    assert result.metrics == result.summary.start.metrics
    again = finetune(model, task, with_(config, recalibrate=9))
    assert (again.summary.kept_step, again.summary.recalibrated) == (0, False), "new statistics are no training"
    assert equal(weights(again.model), weights(result.model))
    assert "kept: the weights of step 0, the start; no later ones are better" in again.summary.to_text()


def test_the_last_weights_are_judged_with_statistics_of_their_own() -> None:
    task, model = regression(), make_restorer()
    norm = model.get_submodule("norm")
    assert isinstance(norm, torch.nn.BatchNorm2d)
    norm.momentum = 0.0  # they lag behind as far as can be
    config = with_(epochs=20, lr=0.05)
    blind = finetune(model, task, with_(config, recalibrate=0))
    found = finetune(model, task, with_(config, recalibrate=9))
    assert found.summary.recalibrated
    assert found.summary.kept_step == found.summary.steps != blind.summary.kept_step
    assert found.metrics["mse"] < blind.metrics["mse"]
    assert measure(found.model, task, batch_size=4)["mse"] == pytest.approx(found.metrics["mse"]), (
        "of the weights returned"
    )


def test_out_of_time_and_then_more_time(whole: FinetuneResult, tmp_path: Path) -> None:
    short = with_(max_time=1e-6)
    result = finetune(converted("pafu"), regression(), short, tmp_path / "run")
    assert result.summary.stopped == "time"
    assert result.summary.steps == 1
    more = finetune(converted("pafu"), regression(), QUICK, tmp_path / "run", resume=True)
    assert more.summary.stopped == "steps"
    assert equal(weights(more.model), weights(whole.model))


def test_the_time_is_for_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was spent before the run counts, and the evaluation at the end is left its time."""
    late = finetune(converted("pafu"), regression(), with_(max_time=3600), began=time.monotonic() - 3600)
    assert (late.summary.stopped, late.summary.steps) == ("time", 1)
    assert "s of the 3600 s were training" in late.summary.notes[-1]

    def slow(*args: Any, **options: Any) -> Evaluation:
        return replace(evaluate(*args, **options), seconds=1800.0)

    monkeypatch.setattr(loop, "evaluate", slow)
    monkeypatch.setattr(run, "evaluate", slow)
    assert finetune(make_restorer(), regression(), with_(max_time=3600)).summary.stopped == "time"  # two, for BatchNorm
    enough = finetune(make_restorer(), regression(), with_(max_time=3600, recalibrate=0))
    assert enough.summary.stopped == "steps"


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_taken_up_again(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_(ema=0.9, workers=int(number == signal.SIGINT))
    whole = finetune(converted("pafu"), regression(), config, tmp_path / "whole")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    interrupt_at(monkeypatch, 7, number)
    with pytest.raises(Interrupted, match="interrupted after step 8"):
        finetune(converted("pafu"), regression(), config, tmp_path / "run")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not (tmp_path / "run" / "recipe.json").exists()
    monkeypatch.undo()
    resumed = finetune(converted("pafu"), regression(), config, tmp_path / "run", resume=True)
    assert equal(weights(resumed.model), weights(whole.model))
    losses = [[(row["step"], row["loss"]) for row in rows(tmp_path / name, "loss")] for name in ("whole", "run")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("moment", ["step", "evaluation"])
def test_interrupted_at_the_very_end(
    moment: str, whole: FinetuneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who trains one network after the other must not go on with the next."""
    last = whole.summary.steps
    if moment == "step":
        interrupt_at(monkeypatch, last - 1)
    else:
        measure = Run.evaluate

        def signalled(run: Run) -> Any:
            if run.progress.step == last:
                os.kill(os.getpid(), signal.SIGINT)
            return measure(run)

        monkeypatch.setattr(Run, "evaluate", signalled)
    with pytest.raises(Interrupted, match=f"interrupted after step {last}"):
        finetune(converted("pafu"), regression(), QUICK, tmp_path / "run")
    monkeypatch.undo()
    resumed = finetune(converted("pafu"), regression(), QUICK, tmp_path / "run", resume=True)
    assert equal(weights(resumed.model), weights(whole.model))


def test_a_complete_run_is_only_finished_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = finetune(converted("pafu"), regression(), QUICK, tmp_path / "run")
    watch = Watch(monkeypatch)
    again = finetune(converted("pafu"), regression(), QUICK, tmp_path / "run", resume=True)
    assert watch.moved == []
    assert equal(weights(again.model), weights(first.model))


# --- what goes wrong ----------------------------------------------------------------------------------------------


class Poisoned(TinyRegression):
    """The loss is NaN for `times` calls from the one numbered `at` on."""

    at = 8
    times = 1
    seen = 0
    calls = 0

    def loss(self, output: Any, batch: Batch) -> Tensor:
        loss = super().loss(output, batch)
        self.calls += 1
        if self.calls >= self.at and self.seen < self.times:
            self.seen += 1
            return loss * float("nan")
        return loss


def test_nan_sets_the_run_back_with_lower_rates(tmp_path: Path) -> None:
    task = Poisoned(regression().config)
    result = finetune(converted("pafu"), task, with_(sched="constant", warmup="0"), tmp_path / "run")
    assert result.summary.rollbacks == 1
    assert result.summary.steps == 12
    (event,) = rows(tmp_path / "run", "failed")
    assert (event["step"], event["failed"], event["lr_factor"]) == (5, 8, 0.5)
    assert "the loss is nan" in event["reason"]
    rates = {row["step"]: row["lr_other"] for row in rows(tmp_path / "run", "loss")}
    assert (rates[5], rates[6], rates[12]) == (1e-2, 5e-3, 5e-3)
    assert list(rates) == list(range(1, 13))
    assert all(bool(torch.isfinite(value).all()) for value in weights(result.model).values())


def test_nan_at_every_turn_is_an_error(tmp_path: Path) -> None:
    task = Poisoned(regression().config)
    task.times = 100
    with pytest.raises(TrainingError, match=r"step 6: the loss is nan, after 2 rollbacks .* Lower --lr"):
        finetune(converted("pafu"), task, with_(max_rollbacks=2), tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_bad_gradients_are_seen_too() -> None:
    class Steep(Poisoned):
        def loss(self, output: Any, batch: Batch) -> Tensor:
            self.calls += 1
            if self.calls == 4:
                return TinyRegression.loss(self, output, batch) + (output - output.detach()).abs().sqrt().sum()
            return TinyRegression.loss(self, output, batch)

    summary = finetune(converted("acda"), Steep(regression().config), QUICK).summary
    assert summary.rollbacks == 1


def test_a_corrupted_newest_checkpoint(
    whole: FinetuneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    interrupt_at(monkeypatch, 10)
    with pytest.raises(Interrupted):
        finetune(converted("pafu"), regression(), QUICK, tmp_path / "run")
    monkeypatch.undo()
    newest = tmp_path / "run" / "training" / "checkpoints" / "step-000000011.safetensors"
    content = bytearray(newest.read_bytes())
    content[-3] ^= 4
    newest.write_bytes(content)
    resumed = finetune(converted("pafu"), regression(), QUICK, tmp_path / "run", resume=True)
    assert "step-000000011.safetensors is damaged" in caplog.text
    assert equal(weights(resumed.model), weights(whole.model))


def test_changed_options_are_named(tmp_path: Path) -> None:
    finetune(converted("pafu"), regression(), QUICK, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"batch_size was 4 and is 6; lr was 0\.01 and is 0\.5"):
        finetune(converted("pafu"), regression(), with_(batch_size=6, lr=0.5), tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match=r"noise was 0\.1 and is 0\.3"):
        finetune(converted("pafu"), regression(noise=0.3), QUICK, tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match="task was 'tiny-regression' and is 'tiny-classification'"):
        finetune(converted("pafu"), classification(), QUICK, tmp_path / "run", resume=True)
    other = converted("pafu")
    with torch.no_grad():
        other.get_parameter("first.bias").add_(1)
    with pytest.raises(ConfigError, match=r"the weights of model differ from those that the run in .* started with"):
        finetune(other, regression(), QUICK, tmp_path / "run", resume=True)
    finetune(converted("pafu"), regression(), with_(log_every=7, workers=1), tmp_path / "run", resume=True)


def test_outputs_that_may_not_be_touched(tmp_path: Path) -> None:
    model, task = converted("pafu"), regression()
    with pytest.raises(CheckpointError, match="no run to resume in"):
        finetune(model, task, QUICK, tmp_path / "none", resume=True)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="not written by surgeon: choose another"):
        finetune(model, task, QUICK, mine)
    with pytest.raises(CheckpointError, match="not written by surgeon: force=True leaves it alone"):
        finetune(model, task, QUICK, mine, force=True)
    assert [file.name for file in mine.iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="give only one of them"):
        finetune(model, task, QUICK, mine, force=True, resume=True)
    with pytest.raises(ConfigError, match="without an output"):
        finetune(model, task, QUICK, force=True)


def test_force_replaces_a_run(tmp_path: Path) -> None:
    model, task = converted("pafu"), regression()
    finetune(model, task, QUICK, tmp_path / "run")
    result = finetune(model, task, with_(max_steps=3), tmp_path / "run", force=True)
    assert result.summary.steps == 3
    assert max(row["step"] for row in rows(tmp_path / "run", "loss")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError("boom")])
def test_a_replaced_run_comes_back_if_the_new_one_does_not_begin(
    stop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune(converted("pafu"), regression(), with_(max_steps=3), tmp_path / "run")
    before = contents(tmp_path / "run")

    def fails(run: Run) -> Any:
        raise stop

    monkeypatch.setattr(Run, "evaluate", fails)
    with pytest.raises(type(stop) if isinstance(stop, Exception) else stop):
        finetune(converted("pafu"), regression(), QUICK, tmp_path / "run", force=True)
    assert contents(tmp_path / "run") == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_replaced_run_survives_killed_ones(tmp_path: Path) -> None:
    """What was replaced is the last run with a checkpoint, not what a killed run left in its place."""
    folder = RunFolder(tmp_path / "run")
    folder.create({"number": 1})
    folder.settle()
    for number in (2, 3):  # killed before their first checkpoints
        folder.create({"number": number})
    folder.discard()
    assert folder.record.read_text() == '{\n  "number": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_bad_data_stop_a_run_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="image 3 of the training set"):
        finetune(converted("pafu"), regression(broken=True), QUICK, tmp_path / "run")
    assert not list(tmp_path.iterdir())
