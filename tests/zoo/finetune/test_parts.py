"""The parts of fine-tuning: options, groups of parameters, schedule, draws, the summary."""

import json
import math
import random
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import surgeon
from surgeon.errors import ConfigError
from surgeon.layers import layer_types
from surgeon.layers.base import DynamicConv2d
from surgeon.records.recipe import Recipe, Rule
from surgeon.util.parse import parse_span, parse_time
from surgeon.zoo.finetune import FinetuneConfig
from surgeon.zoo.finetune.batches import Draws, seed_everything
from surgeon.zoo.finetune.config import span_steps
from surgeon.zoo.finetune.optimizer import make_optimizer
from surgeon.zoo.finetune.parameters import BASE_FAN_IN, ROLES, group_parameters, optimizer_groups
from surgeon.zoo.finetune.schedule import Rates, RunPlan, Temperature
from surgeon.zoo.finetune.state import TrainingProgress
from surgeon.zoo.finetune.summary import MeasuredNetwork, Summary
from surgeon.zoo.tasks import improved
from tests.support.training.tasks import SIZE, TinyClassification, converted, make_restorer

# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"epochs": 0}, "epochs must be a number > 0, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": True}, "batch_size must be an integer >= 1, got True"),
        ({"lr": math.nan}, "lr must be a number > 0, got nan"),
        ({"lr": -1.0}, "lr must be a number > 0, got -1.0"),
        ({"sched": "plateau"}, "sched must be one of cosine, .*, got 'plateau'"),
        ({"amp": "fp8"}, "amp must be one of no, fp16, bf16, got 'fp8'"),
        ({"ema": 1.0}, "ema, the decay of the average, must be between 0 and 1, got 1.0"),
        ({"warmup": "5 minutes"}, r"warmup: expected steps \(200\), epochs .* got '5 minutes'"),
        ({"warmup": "2.5"}, "warmup: expected steps"),
        ({"eval_every": "0"}, "eval_every must be more than 0"),
        ({"alternate": 0}, "alternate must be an integer >= 1, got 0"),
        (
            {"sched": "multistep"},
            "milestones and the schedule multistep need each other.* sched='multistep', milestones=\\(\\)",
        ),
        ({"milestones": ["50%"]}, "milestones and the schedule multistep need each other, got sched='cosine'"),
        ({"sched": "multistep", "milestones": ["0"]}, "milestones must be more than 0"),
        ({"sched": "step", "decay_every": "often"}, "decay_every: expected steps"),
        ({"decay_every": "10"}, "decay_every requires the schedule step, got sched='cosine'"),
        ({"decay_rate": 0.5}, "decay_rate requires the schedule step, multistep or poly, got sched='cosine'"),
        ({"sched": "step", "decay_rate": 0}, "decay_rate must be a number > 0, got 0"),
        ({"rollback_factor": 1.0}, "rollback_factor must be between 0 and 1, got 1.0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        FinetuneConfig(**options)


def test_config_round_trip() -> None:
    config = FinetuneConfig(epochs=3, ema=0.9, alternate=3, warmup="1ep", sched="multistep", milestones=("10", "50%"))
    assert FinetuneConfig.from_dict(FinetuneConfig().to_dict()) == FinetuneConfig()
    assert FinetuneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match="no option learning_rate; it has epochs"):
        FinetuneConfig.from_dict({"learning_rate": 1})


@pytest.mark.parametrize(
    ("text", "steps"), [("0", 0), ("7", 7), ("2ep", 25), ("0.01ep", 1), ("10%", 20), ("0%", 0), ("0.1%", 1)]
)
def test_spans(text: str, steps: int) -> None:
    assert span_steps(text, steps_per_epoch=12.5, total=200) == steps


def test_times() -> None:
    assert [parse_time(text) for text in (90, "45s", "30m", "1.5h", "2d")] == [90, 45, 1800, 5400, 172800]
    with pytest.raises(ConfigError, match="'30' has no unit: write 30s or 30m"):
        parse_time("30")
    for wrong in ("", "0s", "-3m", "3 weeks"):
        with pytest.raises(ConfigError, match="expected a time"):
            parse_time(wrong)
    assert parse_span("1.5ep") == (1.5, "ep")


# --- groups -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", layer_types())
def test_groups_cover_every_parameter_once(kind: str) -> None:
    model, _ = surgeon.convert(timm.create_model("resnet18"), layers="stage1", type=kind, input_size=64)
    groups = group_parameters(model)
    named = dict(model.named_parameters())
    members = [name for group in groups for name in group.parameters]
    assert sorted(members) == sorted(named)
    assert all(group.parameters[name] is named[name] for group in groups for name in group.parameters)
    new = {
        f"{name}.{local}"
        for name, layer in model.named_modules()
        if isinstance(layer, DynamicConv2d)
        for local, _ in layer.new_parameters()
    }
    assert new == {name for group in groups if group.role != "other" for name in group.parameters}
    assert {group.role for group in groups} == ({"selector", "new", "other"} if kind == "pafu" else {"new", "other"})
    selecting = {name for group in groups if group.role == "selector" for name in group.parameters}
    assert all(".selector." in name for name in selecting)


def test_norms_and_biases_do_not_decay() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.LayerNorm([4, 2, 2]),
        nn.Flatten(),
        nn.Linear(16, 2),
    )
    decaying = {name for group in group_parameters(model) if group.decays for name in group.parameters}
    assert decaying == {"0.weight", "5.weight"}  # LayerNorm's weight has three dimensions


def test_identity_kernels_do_not_decay() -> None:
    dense = group_parameters(converted("sekg"))
    spared = {name for group in dense if not group.decays for name in group.parameters}
    assert "middle.dconv.static" in spared
    decaying = {name for group in dense if group.decays for name in group.parameters}
    assert "middle.kernel" in decaying


def test_a_models_own_exceptions_are_kept() -> None:
    model = timm.create_model("convnextv2_atto")
    model.no_weight_decay = lambda: {"stem.0.weight"}
    spared = {name for group in group_parameters(model) if not group.decays for name in group.parameters}
    assert "stem.0.weight" in spared


def test_frozen_parameters_stay_out_and_nothing_is_an_error() -> None:
    model = make_restorer()
    model.get_submodule("first").requires_grad_(False)
    assert not any(name.startswith("first") for group in group_parameters(model) for name in group.parameters)
    with pytest.raises(ConfigError, match="nothing to train"):
        group_parameters(make_restorer().requires_grad_(False))


def test_groups_tell_the_optimizer() -> None:
    config = FinetuneConfig(new_lr_scale=0.2, weight_decay=0.3, opt="sgd")
    groups = group_parameters(converted("pafu"), config)
    optimizer = make_optimizer(optimizer_groups(groups, config), config)
    for group, setting in zip(groups, optimizer.param_groups, strict=True):
        assert setting["lr_scale"] == pytest.approx((1.0 if group.role == "other" else 0.2) / group.slowed)
        assert setting["weight_decay"] == (0.3 if group.decays else 0.0)
    with pytest.raises(ConfigError, match=r"no optimizer 'adamv'\. Did you mean"):
        make_optimizer(optimizer_groups(groups, config), FinetuneConfig(opt="adamv"))


@pytest.mark.parametrize("kind", ["acda", "pafu", "sekg"])
def test_a_training_loop_of_ones_own_gets_the_groups_of_finetune(kind: str) -> None:
    model, config = converted(kind), FinetuneConfig()
    expected = optimizer_groups(group_parameters(model, config), config)
    found = surgeon.parameter_groups(model, weight_decay=config.weight_decay)
    assert [[id(one) for one in group["params"]] for group in found] == [
        [id(one) for one in group["params"]] for group in expected
    ]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["lr"] == config.lr * theirs["lr_scale"]
        assert (mine["weight_decay"], mine["role"]) == (theirs["weight_decay"], theirs["role"])
    torch.optim.AdamW(found).step()
    exempt = {id(one) for group in found if group["weight_decay"] == 0 for one in group["params"]}
    for make, own in ((torch.optim.AdamW, config.weight_decay), (torch.optim.Adam, 0)):  # an optimizer's own decay
        for group in make(surgeon.parameter_groups(model)).param_groups:
            assert {group["weight_decay"]} == {0 if id(one) in exempt else own for one in group["params"]}
    with pytest.raises(ConfigError, match="lr"):
        surgeon.parameter_groups(model, lr=-1)


def test_the_last_weight_of_a_generator_is_slowed_by_its_inputs() -> None:
    """Adam moves each of its weights by the rate, and with them the code by the rate times their number."""
    assert all(group.slowed == 1 for kind in ("pafu", "sekg") for group in group_parameters(converted(kind)))
    model = converted("acda", hidden=32)
    config = FinetuneConfig(new_lr_scale=0.2)
    groups = {name: group for group in group_parameters(model, config) for name in group.parameters}
    slowed = {name: group.slowed for name, group in groups.items() if group.slowed != 1}
    assert slowed == {"middle.generator.expand.weight": 32 * 9 / BASE_FAN_IN}
    setting = optimizer_groups([groups["middle.generator.expand.weight"]], config)[0]
    assert setting["lr_scale"] == pytest.approx(0.2 * BASE_FAN_IN / (32 * 9))
    assert {group.slowed for group in group_parameters(model, FinetuneConfig(fan_in_lr=False))} == {1}


def test_new_parameters_learn_at_the_rate_of_their_layer_type() -> None:
    """ACDA at the full rate, the others at a tenth, in one model; a number holds for all."""
    rules = (Rule(layers="first", type="pafu"), Rule(layers="middle", type="acda"))
    model, _ = surgeon.convert(make_restorer(), recipe=Recipe(rules=rules))
    own = {name: group for group in group_parameters(model) for name in group.parameters}
    assert {name: group.lr_scale * group.slowed for name, group in own.items() if group.role != "other"} == {
        name: 1.0 if name.startswith("middle") else 0.1 for name, group in own.items() if group.role != "other"
    }
    assert all(group.lr_scale == 1 for group in own.values() if group.role == "other")
    given = group_parameters(model, FinetuneConfig(new_lr_scale=0.3))
    assert {group.lr_scale * group.slowed for group in given if group.role != "other"} == {0.3}


# --- schedule -----------------------------------------------------------------------------------------------------


def _rates(config: FinetuneConfig, samples: int = 100) -> tuple[RunPlan, list[dict[str, float]]]:
    groups = group_parameters(converted("pafu"), config)
    plan = RunPlan.make(config, samples, groups)
    rates = Rates(make_optimizer(optimizer_groups(groups, config), config), config, plan)
    return plan, [rates.set(step) for step in range(plan.total)]


@pytest.mark.parametrize("sched", ["cosine", "poly", "step", "tanh", "constant"])
def test_rates_warm_up_and_new_ones_are_scaled(sched: str) -> None:
    config = FinetuneConfig(epochs=10, batch_size=10, lr=0.5, new_lr_scale=0.1, warmup="20", sched=sched)
    plan, rates = _rates(config)
    assert plan.total == 100
    other = [rate["other"] for rate in rates]
    assert other[0] < other[10] < other[19] <= 0.5
    assert other[20] == pytest.approx(0.5, rel=0.02)
    assert sched == "constant" or other[-1] < 0.1
    assert sched != "constant" or set(other[20:]) == {0.5}
    for rate in rates:
        assert rate["new"] == pytest.approx(0.1 * rate["other"])
        assert rate["selector"] == rate["new"]


def test_rates_fall_step_by_step() -> None:
    """ADFNet halves every 200,000 steps, CIFAR ResNets divide by 10 at two of them: here scaled down."""
    config = FinetuneConfig(
        epochs=None,
        max_steps=40,
        batch_size=10,
        lr=0.8,
        new_lr_scale=0.5,
        warmup="0",
        sched="step",
        decay_rate=0.5,
        decay_every="10",
    )
    _, rates = _rates(config)
    assert [rate["other"] for rate in rates] == pytest.approx([0.8] * 10 + [0.4] * 10 + [0.2] * 10 + [0.1] * 10)
    assert rates[35]["new"] == pytest.approx(0.05)
    by_epochs = FinetuneConfig(epochs=6, batch_size=10, lr=1.0, warmup="0", sched="step", decay_every="2ep")
    _, rates = _rates(by_epochs)
    assert [rate["other"] for rate in rates] == pytest.approx([1.0] * 20 + [0.1] * 20 + [0.01] * 20)


def test_rates_fall_at_milestones() -> None:
    """Spans from the end of the warm-up, in whatever order they are given."""
    config = FinetuneConfig(
        epochs=10, batch_size=10, lr=1.0, warmup="10", sched="multistep", milestones=("60%", "20"), decay_rate=0.1
    )
    plan, rates = _rates(config)
    assert plan.milestones == (20, 60)
    assert [rate["other"] for rate in rates[10:]] == pytest.approx([1.0] * 20 + [0.1] * 40 + [0.01] * 30)


def test_the_power_of_poly() -> None:
    """PSPNet: (1 - step / steps) to the power of 0.9."""
    config = FinetuneConfig(epochs=10, batch_size=10, lr=1.0, warmup="0", sched="poly", decay_rate=0.9)
    _, rates = _rates(config)
    assert [rate["other"] for rate in rates] == pytest.approx([(1 - step / 100) ** 0.9 for step in range(100)])


def test_others_warm_up_after_a_first_phase() -> None:
    config = FinetuneConfig(epochs=10, batch_size=10, lr=0.5, new_first="30", warmup="10", sched="constant")
    plan, rates = _rates(config)
    assert [plan.active(step) for step in (0, 29)] == [{"selector", "new"}] * 2
    assert plan.active(30) == set(ROLES)
    assert rates[30]["other"] == pytest.approx(0.5 / 11)
    assert rates[40]["other"] == rates[60]["other"] == 0.5
    assert rates[30]["new"] == pytest.approx(0.1 * 0.5)


def test_alternate_one_to_three() -> None:
    plan = RunPlan.make(FinetuneConfig(alternate=3), 100, group_parameters(converted("pafu")))
    assert [plan.active(step) == {"selector"} for step in range(8)] == [True, False, False, False] * 2
    assert plan.active(1) == {"new", "other"}


def test_phases_that_cannot_be() -> None:
    plain, acda = group_parameters(make_restorer()), group_parameters(converted("acda"))
    with pytest.raises(ConfigError, match="new_first trains new parameters first, and the model has none"):
        RunPlan.make(FinetuneConfig(new_first="5"), 100, plain)
    with pytest.raises(ConfigError, match=r"new_first \(64 steps\) takes up the whole run \(31 steps\)"):
        RunPlan.make(FinetuneConfig(new_first="64"), 100, acda)
    with pytest.raises(ConfigError, match="alternate trains selectors in turn"):
        RunPlan.make(FinetuneConfig(alternate=3), 100, acda)


def test_the_shorter_of_two_lengths() -> None:
    groups = group_parameters(make_restorer())
    assert RunPlan.make(FinetuneConfig(max_steps=160), 100, groups).total == 160  # as long as asked for
    assert FinetuneConfig.from_dict(FinetuneConfig(max_steps=160).to_dict()) == FinetuneConfig(max_steps=160)
    assert FinetuneConfig().epochs == 10
    assert RunPlan.make(FinetuneConfig(epochs=3, batch_size=10, accumulate=2), 100, groups).total == 15
    assert RunPlan.make(FinetuneConfig(epochs=3, batch_size=10, max_steps=4), 100, groups).total == 4
    assert RunPlan.make(FinetuneConfig(epochs=0.001), 100, groups).total == 1


def test_temperature_falls_to_its_end() -> None:
    model = converted("pafu", temperature=2.0)
    layer: Any = model.get_submodule("middle")
    temperature = Temperature(model, 0.25, 11)
    seen = []
    for step in range(11):
        temperature.set(step)
        seen.append(layer.temperature)
    assert seen[0] == 2.0
    assert seen[5] == pytest.approx(1.0)
    assert seen[-1] == pytest.approx(0.5)
    assert Temperature(converted("acda"), 0.25, 11).set(3) is None


# --- draws --------------------------------------------------------------------------------------------------------


def test_draws_are_permutations_and_start_anywhere() -> None:
    rows = iter(Draws(10, 4, seed=3, start=0))
    flat = [draw for _ in range(5) for draw in next(rows)]
    assert sorted(flat[:10]) == list(range(10))
    assert sorted(flat[10:]) == list(range(10, 20))
    assert [draw % 10 for draw in flat[:10]] != [draw % 10 for draw in flat[10:]]
    later = iter(Draws(10, 4, seed=3, start=3))
    assert next(later) + next(later) == flat[12:20]
    other = iter(Draws(10, 4, seed=4, start=0))
    assert next(other) + next(other) != flat[:8]


def test_processes_share_the_batch() -> None:
    whole = iter(Draws(10, 4, seed=3, start=2))
    parts = [iter(Draws(10, 4, seed=3, start=2, rank=rank, processes=2)) for rank in range(2)]
    for _ in range(4):
        assert next(whole) == next(parts[0]) + next(parts[1])


def test_all_generators_are_seeded() -> None:
    seed_everything(1, "step", 5)
    first = (random.random(), float(np.random.rand()), float(torch.rand(())))
    seed_everything(1, "step", 6)
    second = (random.random(), float(np.random.rand()), float(torch.rand(())))
    seed_everything(1, "step", 5)
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == first
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_the_tiny_images_fit() -> None:
    assert make_restorer()(torch.rand(1, 3, SIZE, SIZE)).shape == (1, 3, SIZE, SIZE)


# --- the summary ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("higher", "start", "end", "worse"),
    [(True, 25.0, 24.5, True), (True, 25.0, 25.0, False), (False, 0.5, 0.7, True), (False, 0.5, 0.4, False)],
)
def test_a_training_that_makes_it_worse_is_told(higher: bool, start: float, end: float, worse: bool) -> None:
    before, after = (
        MeasuredNetwork(metrics={"m": value}, parameters=1, flops=None, seconds=0.0) for value in (start, end)
    )
    facts: dict[str, Any] = {
        "steps": 1,
        "epochs": 1.0,
        "stopped": "steps",
        "kept_step": 1,
        "recalibrated": False,
        "rollbacks": 0,
    }
    summary = Summary(
        task="t",
        primary="m",
        higher_is_better=higher,
        original=None,
        start=before,
        result=after,
        seconds=1.0,
        groups=[],
        **facts,
    )
    assert (f"worse than at the start (m {end:g}, was {start:g})" in summary.to_text()) is worse
    assert "1.00 epochs, 1.0 s" in summary.to_text()
    summary.train_samples, summary.val_samples, summary.keep = 65, 7, "best"
    assert "1.00 epochs of 65 samples, 1.0 s" in summary.to_text()
    assert "is better, on 7 samples, which also choose the step)" in summary.to_text(120)


def test_a_tie_goes_to_the_lower_loss() -> None:
    """On five images top-1 was 1 before and after the training: its weights were thrown away, at a 200th of the loss."""
    start, end = {"top1": 1.0, "loss": 0.6}, {"top1": 1.0, "loss": 0.003}
    assert improved(TinyClassification, end, start)
    assert not improved(TinyClassification, start, end)
    assert not improved(TinyClassification, start, start)
    assert not improved(TinyClassification, {"top1": 0.9, "loss": 0.0}, start)
    assert not improved(TinyClassification, end, {"top1": 1.0}), "a loss that was not kept cannot be beaten"
    progress = TrainingProgress(best=1.0, best_loss=0.6)
    assert progress.best_metrics("top1") == start
