"""Whole runs of fine-tuning on tiny tasks: what moves when, what is kept, what goes wrong and how it is told."""

import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.errors import CheckpointError, ConfigError, DataError, TrainingError
from surgeon.layers import regularization
from surgeon.zoo.finetune import FinetuneConfig, dry_run, finetune
from surgeon.zoo.finetune.evaluation import recalibrate
from surgeon.zoo.finetune.loop import Interrupted, Run, Trainer
from surgeon.zoo.finetune.state import read_log, read_tree
from surgeon.zoo.tasks import Batch
from tests.finetune_tasks import TinyRegression, classification, converted, make_restorer, regression

QUICK = FinetuneConfig(
    epochs=4, batch_size=4, lr=1e-2, log_every=1, eval_every="4", checkpoint_every="5", recalibrate=2
)


def with_(config: FinetuneConfig = QUICK, **changes: Any) -> FinetuneConfig:
    return dataclasses.replace(config, **changes)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows(folder: Path, key: str) -> list[dict[str, Any]]:
    return [row for row in read_log(folder / "training" / "log.jsonl") if key in row]


class Watch:
    """The parameters before and after every optimizer step of the runs that follow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moved: list[set[str]] = []
        step = Run._step

        def watched(run: Run, *args: Any) -> Any:
            before = {name: p.detach().clone() for name, p in run.trainer.model.named_parameters()}
            result = step(run, *args)
            after = dict(run.trainer.model.named_parameters())
            self.moved.append({name for name in before if not torch.equal(before[name], after[name])})
            return result

        monkeypatch.setattr(Run, "_step", watched)


# --- learning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["acda", "pafu", "sekg"])
def test_training_helps_and_leaves_the_callers_model_alone(kind: str, tmp_path: Path) -> None:
    model = converted(kind)
    before, state = weights(model), torch.get_rng_state()
    result = finetune(model, regression(), with_(epochs=20), tmp_path / "run", original=make_restorer())
    assert equal(weights(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    summary = result.summary
    assert summary.original is not None
    assert summary.start.metrics["mse"] == pytest.approx(summary.original.metrics["mse"], rel=1e-4)
    assert result.metrics["mse"] < 0.5 * summary.start.metrics["mse"]
    assert summary.result.parameters > summary.original.parameters
    assert not result.model.training
    loaded = surgeon.load(tmp_path / "run", base=make_restorer())
    assert equal(weights(loaded), weights(result.model))
    told = summary.to_text()
    assert all(word in told for word in ("original", "at the start", "fine-tuned", "mse", "60 steps, 20.00 epochs"))
    assert json.loads((tmp_path / "run" / "training" / "summary.json").read_text()) == summary.to_dict()


def test_classification_higher_is_better(tmp_path: Path) -> None:
    model = nn.Sequential(make_restorer(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    result = finetune(model, classification(samples=30), with_(epochs=10), tmp_path / "run")
    assert result.metrics["top1"] > max(result.summary.start.metrics["top1"], 0.6)
    assert any((tmp_path / "run" / "training" / "tensorboard").iterdir())


def test_nothing_is_left_without_an_output() -> None:
    result = finetune(converted("acda"), regression(), QUICK)
    assert result.output is None
    assert result.metrics["mse"] < result.summary.start.metrics["mse"]


def test_runs_repeat_bit_for_bit_and_seeds_matter() -> None:
    first, again, other = (
        weights(finetune(converted("pafu"), regression(), with_(seed=seed)).model) for seed in (1, 1, 2)
    )
    assert equal(first, again)
    assert not equal(first, other)


def test_workers_and_evaluations_do_not_change_the_weights() -> None:
    plain = weights(finetune(converted("pafu"), regression(), with_(keep="last", recalibrate=0)).model)
    changed = with_(keep="last", recalibrate=0, workers=2, eval_every="1", log_every=3)
    assert equal(plain, weights(finetune(converted("pafu"), regression(), changed).model))


def test_accumulation_equals_a_big_batch() -> None:
    model = converted("acda", norm=False)
    settings = {"keep": "last", "opt": "sgd", "eval_every": "50"}
    big = finetune(model, regression(), with_(batch_size=8, accumulate=1, **settings)).model
    parts = finetune(model, regression(), with_(batch_size=2, accumulate=4, **settings)).model
    for (name, a), b in zip(big.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("opt", ["sgd", "lamb", "adafactor"])
def test_optimizers_of_timm_survive_a_stop(opt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_(opt=opt, lr=1e-3)
    whole = weights(finetune(converted("pafu"), regression(), config, tmp_path / "whole").model)
    interrupt_at(monkeypatch, 7)
    with pytest.raises(Interrupted):
        finetune(converted("pafu"), regression(), config, tmp_path / "run")
    monkeypatch.undo()
    resumed = finetune(converted("pafu"), regression(), config, tmp_path / "run", resume=True)
    assert equal(weights(resumed.model), whole)


# --- phases -------------------------------------------------------------------------------------------------------


def test_the_first_phase_moves_only_new_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    finetune(converted("acda"), regression(), with_(new_first="5", weight_decay=0.1))
    new = {"middle." + name for name, _ in converted("acda").get_submodule("middle").new_parameters()}
    assert set.union(*watch.moved[:5]) == new
    assert {"first.weight", "middle.coeff", "norm.weight"} < watch.moved[5]


def test_selectors_take_turns_one_to_three(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    finetune(converted("pafu"), regression(), with_(alternate=3, weight_decay=0.1))
    for step, moved in enumerate(watch.moved):
        selecting = {name for name in moved if ".selector." in name}
        assert moved == selecting if step % 4 == 0 else not selecting
        assert moved
    assert "middle.kernel" in watch.moved[1]


def test_frozen_norms_keep_their_statistics() -> None:
    model = make_restorer()
    kept = model.get_buffer("norm.running_mean").clone()
    frozen = finetune(model, regression(), with_(freeze_bn=True)).model
    assert torch.equal(frozen.get_buffer("norm.running_mean"), kept)
    assert not torch.equal(frozen.get_parameter("norm.weight"), model.get_parameter("norm.weight"))
    free = finetune(model, regression(), with_(freeze_bn=False)).model
    assert not torch.equal(free.get_buffer("norm.running_mean"), kept)


def test_recalibrated_statistics_are_those_of_the_data() -> None:
    model, task = make_restorer(), regression()
    model.get_buffer("norm.running_mean").fill_(9.0)
    batches = [task.collate([task.dataset("train")[i] for i in range(k, k + 4)]) for k in (0, 4, 8)]
    recalibrate(model, task, iter(batches), 2, task.forward)
    with torch.no_grad():
        features = [model.get_submodule("first")(batch["input"]) for batch in batches[:2]]
    mean = torch.stack([f.mean(dim=(0, 2, 3)) for f in features]).mean(dim=0)
    torch.testing.assert_close(model.get_buffer("norm.running_mean"), mean)
    assert not any(module.training for module in model.modules())
    assert model.get_submodule("norm").momentum == 0.1


def test_recalibration_is_kept_where_it_helps() -> None:
    task = regression()
    good = finetune(make_restorer(), task, with_(epochs=20)).model
    config = with_(epochs=1, lr=1e-9, recalibrate=9, max_steps=1)
    with torch.no_grad():
        good.get_buffer("norm.running_mean").add_(1.0)
    mended = finetune(good, task, config)
    assert mended.summary.recalibrated
    assert mended.metrics["mse"] < 0.5 * mended.summary.start.metrics["mse"]
    assert not finetune(good, task, with_(config, recalibrate=0)).summary.recalibrated


def test_the_average_is_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    raw: list[dict[str, Tensor]] = []
    end = Run.train

    def noted(run: Run) -> None:
        end(run)
        raw.append(weights(run.trainer.model))

    monkeypatch.setattr(Run, "train", noted)
    result = finetune(converted("acda"), regression(), with_(ema=0.99, keep="last", recalibrate=0))
    assert not equal(weights(result.model), raw[0])
    plain = finetune(converted("acda"), regression(), with_(keep="last", recalibrate=0))
    assert equal(weights(plain.model), raw[0])


def test_distillation_pulls_to_the_original() -> None:
    original = make_restorer()
    x = torch.rand(4, 3, 8, 8)

    def distance(distill: float) -> float:
        config = with_(distill=distill, epochs=15, keep="last", freeze_bn=True)
        model = finetune(converted("acda"), regression(), config, original=original).model
        with torch.no_grad():
            return float((model(x) - original(x)).square().mean())

    assert distance(100.0) < 0.2 * distance(0.0)
    with pytest.raises(ConfigError, match="distill needs the original network"):
        finetune(converted("acda"), regression(), with_(distill=1.0))


def test_the_regulariser_is_in_the_loss() -> None:
    def similarity(weight: float) -> float:
        model = finetune(converted("pafu"), regression(), with_(regularization=weight, epochs=10, keep="last")).model
        return float(regularization(model).detach())

    assert similarity(1.0) < 0.5 * similarity(0.0)


def test_mixed_precision_and_memory_format() -> None:
    result = finetune(converted("pafu"), regression(), with_(amp="bf16", channels_last=True, epochs=10))
    assert result.metrics["mse"] < result.summary.start.metrics["mse"]
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert "forward" not in vars(result.model)  # Accelerate's wrapper is gone
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        finetune(converted("pafu"), regression(), with_(amp="fp16", device="cpu"))


def test_gradient_checkpointing_gives_the_same_or_says_why_not() -> None:
    import timm

    model = timm.create_model("test_resnet", num_classes=10).eval()
    settings = {"max_steps": 2, "keep": "last", "freeze_bn": True}
    plain = finetune(model, classification(samples=8), with_(**settings)).model
    saving = finetune(model, classification(samples=8), with_(checkpointing=True, **settings)).model
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="Restorer has no set_grad_checkpointing"):
        finetune(make_restorer(), regression(), with_(checkpointing=True))


# --- ends ---------------------------------------------------------------------------------------------------------


class Worse(TinyRegression):
    """Its metric gets worse from the third evaluation on, whatever is learnt."""

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


def test_out_of_time_and_then_more_time(tmp_path: Path) -> None:
    short = with_(max_time=1e-6)
    result = finetune(converted("pafu"), regression(), short, tmp_path / "run")
    assert result.summary.stopped == "time"
    assert result.summary.steps == 2
    more = finetune(converted("pafu"), regression(), QUICK, tmp_path / "run", resume=True)
    assert more.summary.stopped == "steps"
    whole = finetune(converted("pafu"), regression(), QUICK, tmp_path / "whole")
    assert equal(weights(more.model), weights(whole.model))


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """Have the process signalled in the middle of a step."""
    backward = Trainer.backward

    def signalled(trainer: Trainer, index: int, batches: Iterator[Batch]) -> Tensor:
        if index == step:
            os.kill(os.getpid(), number)
        return backward(trainer, index, batches)

    monkeypatch.setattr(Trainer, "backward", signalled)


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
    with pytest.raises(TrainingError, match=r"step 6: the loss is nan, after 2 returns .* Lower --lr"):
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


def test_a_corrupted_newest_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    whole = finetune(converted("pafu"), regression(), QUICK, tmp_path / "whole")
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
    with pytest.raises(ConfigError, match=r"the weights of model are not those that the run in .* began with"):
        finetune(other, regression(), QUICK, tmp_path / "run", resume=True)
    finetune(converted("pafu"), regression(), with_(log_every=7, workers=1), tmp_path / "run", resume=True)


def test_outputs_that_may_not_be_touched(tmp_path: Path) -> None:
    model, task = converted("pafu"), regression()
    with pytest.raises(CheckpointError, match="no run to take up again in"):
        finetune(model, task, QUICK, tmp_path / "none", resume=True)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="exists; choose another"):
        finetune(model, task, QUICK, mine)
    with pytest.raises(CheckpointError, match="not written by surgeon: --force leaves it alone"):
        finetune(model, task, QUICK, mine, force=True)
    assert [file.name for file in mine.iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="give one of them"):
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


def test_bad_data_stop_a_run_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="image 3 of the training set"):
        finetune(converted("pafu"), regression(broken=True), QUICK, tmp_path / "run")
    assert not list(tmp_path.iterdir())


# --- the rest -----------------------------------------------------------------------------------------------------


def test_checkpoints_hold_no_pickles(tmp_path: Path) -> None:
    finetune(converted("pafu"), regression(), with_(ema=0.9), tmp_path / "run")
    folder = tmp_path / "run" / "training" / "checkpoints"
    assert {file.suffix for file in folder.iterdir()} == {".safetensors"}
    tree = read_tree(folder / "step-000000012.safetensors")
    assert set(tree) == {"model", "ema", "optimizer", "scaler", "progress"}
    assert tree["progress"]["step"] == 12


def test_dry_run_tells_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = converted("pafu")
    before = weights(model)
    found = dry_run(model, regression(), with_(accumulate=2))
    assert equal(weights(model), before)
    assert (found.steps, found.train_samples, found.val_samples) == (6, 12, 5)
    assert sum(group["parameters"] for group in found.groups) == sum(p.numel() for p in model.parameters())
    assert found.cost is not None
    assert found.cost.batch_size == 4
    assert found.cost.peak_bytes > 0
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_scalars_pictures_and_options(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    finetune(converted("pafu"), regression(), QUICK, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "training" / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    wanted = {"train/loss", "train/lr_new", "train/lr_other", "train/temperature", "val/mse", "final/mse"}
    assert wanted <= set(tags["scalars"])
    assert tags["images"] == ["val/samples"]
    assert len(events.Scalars("train/loss")) == 12
