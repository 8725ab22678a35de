"""Budgets as people write them, the gate before every training, and what is learned from a run that did not fit."""

from typing import Any

import numpy as np
import pytest
import timm

from surgeon.costs import cost
from surgeon.errors import ConfigError
from surgeon.search.budget import Budgets, Calibration, as_budget
from surgeon.search.gate import Gate
from surgeon.search.placement.draw import random_placement
from surgeon.search.placement.place import optimum
from surgeon.search.placement.problem import InfeasibleError
from surgeon.search.space import SpaceConfig
from surgeon.util.bounds import Bound, parse_bound

CONFIG = SpaceConfig(types=("acda", "pafu", "sekg"), atoms=(4,), scales=(1,), group_sizes=(4,))
STEP: dict[str, Any] = {"batch_size": 4, "input_size": 64}


@pytest.fixture(scope="module")
def model() -> Any:
    return timm.create_model("test_resnet")


def gate(model: Any, **budgets: Any) -> Gate:
    return Gate(model, CONFIG, Budgets.parse(**budgets), **STEP)


@pytest.mark.parametrize(
    ("text", "resource", "bound"),
    [
        ("4.5G", "flops", Bound("4.5G", 4.5e9, False)),
        ("+10%", "flops", Bound("+10%", 1.1, True)),
        (" - 5 % ", "params", Bound("- 5 %", 0.95, True)),
        ("8GiB", "memory", Bound("8GiB", 8 * 2**30, False)),
        ("8kB", "memory", Bound("8kB", 8e3, False)),
        ("8000000", "memory", Bound("8000000", 8e6, False)),
        ("20ms", "latency", Bound("20ms", 0.02, False)),
    ],
)
def test_budgets_are_read(text: str, resource: str, bound: Bound) -> None:
    assert parse_bound(text, resource) == bound


@pytest.mark.parametrize(
    ("text", "resource", "words"),
    [
        ("4,5G", "flops", ["--max-flops", "4,5G", "4.5G"]),
        ("10%", "flops", ["--max-flops", "+10%"]),
        ("-100%", "params", ["--max-params", "-100%"]),
        ("8 apples", "memory", ["--max-memory", "8GiB"]),
        ("0", "memory", ["--max-memory", "positive"]),
        ("8", "memory", ["--max-memory", "8 bytes", "8GiB"]),
        ("50", "flops", ["--max-flops", "'50' would be only 50; for 50M, write the unit"]),
        ("200MB", "flops", ["--max-flops", "'200MB' is a number of bytes"]),
        ("1GiB", "params", ["--max-params", "'1GiB' is a number of bytes"]),
        (" 8000 ", "memory", ["--max-memory", "8000 bytes", "8000MiB"]),
        ("-3G", "flops", ["--max-flops", "-3G"]),
        ("20", "latency", ["--max-latency", "20ms"]),
        ("", "flops", ["--max-flops"]),
    ],
)
def test_what_cannot_be_read(text: str, resource: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_bound(text, resource)
    assert all(word in str(caught.value) for word in words), caught.value


def test_other_wrong_budgets() -> None:
    with pytest.raises(ConfigError, match="--memory-mode"):
        Budgets.parse(mode="both")
    with pytest.raises(ConfigError, match="--max-layers"):
        Budgets.parse(max_layers=0)
    with pytest.raises(ConfigError, match="margin"):
        Calibration(margin=0.5)


@pytest.mark.parametrize(
    ("resource", "value"), [("flops", 8178368512), ("params", 25557), ("memory", 123456789), ("flops", 7)]
)
def test_numbers_told_can_be_typed_and_are_enough(resource: str, value: int) -> None:
    bound = parse_bound(as_budget(resource, value), resource)
    assert value <= bound.value <= value * 1.01 + 2**20


def test_relative_limits_are_the_originals(model: Any) -> None:
    found = gate(model, flops="+10%", memory="+20%")
    original = cost(model, **STEP)
    assert found.problem.limit("flops") == int(original.flops * 1.1)
    assert found.problem.limit("params") is None
    reserve = sum(original.reserve.values())
    limit = found.budgets.memory_limit(original, Calibration())
    assert limit == pytest.approx((original.peak_bytes * 1.05 + reserve) * 1.2, abs=2)
    assert found.problem.feasible([0] * len(found.space.layers))[0]


def test_the_gate_agrees_with_the_table_and_holds_what_is_over(model: Any) -> None:
    found = gate(model, flops="+30%", params="+60%", memory="+10%")
    rng = np.random.default_rng(0)
    for _ in range(5):
        placement = random_placement(found.problem, rng)
        assert placement is not None
        verdict = found.check(placement)
        assert verdict.fits, verdict.reasons
        assert {name: verdict.traced[name] for name in ("flops", "params")} == {
            name: verdict.predicted[name] for name in ("flops", "params")
        }
        assert verdict.error < 0.02  # of 10 MiB; of real models it is under 0.005 (benchmarks/placement.py)
    full = np.array([int(np.flatnonzero(row)[-1]) for row in found.space.allowed])
    over = gate(model, params="+1%").check(full)
    assert not over.fits
    assert "--max-params" in over.reasons[0]


def test_a_whole_trace_can_refuse_what_the_table_lets_pass(model: Any) -> None:
    found = gate(model, memory="+5%")
    placement = random_placement(found.problem, np.random.default_rng(3))
    assert placement is not None
    verdict = found.check(placement)  # its workspaces are larger than the original's
    assert not verdict.fits
    assert "by a whole trace" in verdict.reasons[0]
    assert verdict.traced["needed"] > (found.budgets.memory_limit(found.original, found.calibration) or 0)
    before = found.problem.limit("memory") or 0
    learned = found.refused(verdict)
    assert 0 < learned.reserve <= verdict.traced["reserve"]
    assert (found.problem.limit("memory") or 0) < before
    for _ in range(20):
        found.refused(verdict)
    assert not found.problem.feasible(placement)[0]  # the table refuses it in the end
    assert found.problem.feasible(np.zeros_like(placement))[0]  # and never the original, which fits


def test_memory_that_was_short_is_not_asked_for_again(model: Any) -> None:
    for memory in (None, 10**9):
        found = gate(model, memory="+30%")
        placement = optimum(found.problem, np.where(found.space.allowed, 1.0, 0.0))
        assert placement is not None
        assert found.check(placement).fits
        before = found.calibration
        after = found.out_of_memory(placement, memory)
        assert after != before
        assert len(after.events) == 1
        assert not found.check(placement).fits
        assert Calibration.from_dict(after.to_dict()) == after


def test_out_of_memory_without_a_budget_makes_one(model: Any) -> None:
    found = gate(model)
    placement = optimum(found.problem, np.where(found.space.allowed, 1.0, 0.0))
    assert placement is not None
    found.out_of_memory(placement, None)
    assert found.problem.limit("memory") is not None
    assert not found.check(placement).fits


def test_infeasible_budgets_end_at_once_with_numbers_that_work(model: Any) -> None:
    tight = gate(model, flops="-20%", memory="-30%")
    with pytest.raises(InfeasibleError) as caught:
        tight.check_feasible()
    message = str(caught.value)
    assert caught.value.exit_code == 1
    assert " (--max-flops -20%, --max-memory -30%); the nearest" in message  # as they were given
    told = message.split("nearest budgets that one placement meets are ")[1].split(";")[0]
    numbers = dict(part.split(" ") for part in told.split(", "))
    again = gate(model, flops=numbers["--max-flops"], memory=numbers["--max-memory"])
    again.check_feasible()
    assert optimum(again.problem, np.zeros(again.problem.shape)) is not None


def test_multiply_accumulates_are_hinted_at(model: Any) -> None:
    macs = str(cost(model, **STEP).macs)
    with pytest.raises(InfeasibleError, match="counts as 2 FLOPs"):
        gate(model, flops=macs).check_feasible()


def test_latency_is_measured_last(model: Any) -> None:
    found = gate(model, latency="0.001us")
    one = np.zeros(len(found.space.layers), dtype=np.int64)
    one[-1] = int(np.flatnonzero(found.space.allowed[-1])[-1])
    verdict = found.check(one)
    assert not verdict.fits
    assert verdict.latency is not None
    assert verdict.latency > 0
    assert "--max-latency" in verdict.reasons[0]
    assert gate(model, latency="1000s").check(one).fits
