"""Whole runs of fine-tuning on tiny tasks: what moves when, what is kept, what goes wrong and how it is told."""

import json
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.errors import ConfigError
from surgeon.layers import PAFUConfig, regularization
from surgeon.zoo.finetune import dry_run, finetune
from surgeon.zoo.finetune.evaluation import recalibrate
from surgeon.zoo.finetune.loop import Interrupted, Run
from surgeon.zoo.finetune.state import read_tree
from tests.support.training.runs import QUICK, Watch, equal, interrupt_at, weights, with_
from tests.support.training.tasks import classification, converted, make_restorer, regression

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


@pytest.mark.long
def test_workers_and_evaluations_do_not_change_the_weights() -> None:
    plain = weights(finetune(converted("pafu"), regression(), with_(keep="last", recalibrate=0)).model)
    changed = with_(keep="last", recalibrate=0, workers=2, eval_every="1", log_every=3)
    assert equal(plain, weights(finetune(converted("pafu"), regression(), changed).model))


def test_accumulation_equals_a_big_batch() -> None:
    model = converted("acda", norms=False, norm=None)
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


def test_the_regularizer_is_in_the_loss() -> None:
    def similarity(weight: float) -> float:
        model = converted("pafu", **PAFUConfig.paper)
        model = finetune(model, regression(), with_(regularization=weight, epochs=10, keep="last")).model
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


def test_a_run_that_is_all_warm_up_says_so() -> None:
    told = "warmup='5' is as long as the run of 4 steps: only the last has the full rate"
    for warmup, expected in (("5", [told]), ("3", [])):
        found = finetune(make_restorer(), regression(), with_(epochs=None, max_steps=4, warmup=warmup))
        assert [note for note in found.summary.notes if "full rate" in note] == expected


@pytest.mark.parametrize("amp", ["no", "bf16"])
def test_a_forward_of_the_object_alone_stays(amp: str) -> None:
    model = converted("pafu")
    vars(model)["forward"] = types.MethodType(_doubled, model)
    found = finetune(model, regression(), with_(max_steps=1, lr=1e-9, amp=amp, recalibrate=0)).model
    x = regression().dataset("val")[0]["input"][None]
    assert torch.allclose(found(x), 2 * type(model).forward(found, x))
    assert model.forward.__self__ is model


def _doubled(self: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = 2 * type(self).forward(self, x)
    return found
