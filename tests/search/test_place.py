"""Placements: never over budget, as good as brute force, different where they must be; and the solver's silence."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon.errors import ConfigError
from surgeon.search.placement.draw import random_placement, repair
from surgeon.search.placement.place import Cut, closest, diverse, front, gain_of, nearest, optimum, smallest
from surgeon.search.placement.problem import FREE, Ints, Problem
from surgeon.search.sampling.tuners import DecoderSampler
from tests.support.search.toys import toy_gains, toy_problem, toy_space, toy_table

SMALL = toy_space(5)
ALL = [np.array(p) for p in itertools.product(range(4), repeat=5) if all(SMALL.allowed[i, j] for i, j in enumerate(p))]
seeds = st.integers(0, 10_000)
shares = st.floats(-0.3, 1.0)


def within(problem: Problem, placement: Ints) -> bool:
    """The budgets by plain sums, one layer at a time in Python integers."""
    for row, name in enumerate(problem.names):
        total = int(problem.base[row])
        for layer, option in enumerate(placement):
            total += int(problem.rows[layer, option, row])
        if problem.limit(name) is not None and total > (problem.limit(name) or 0):
            return False
    replaced = sum(int(option) != 0 for option in placement)
    return problem.max_layers is None or replaced <= problem.max_layers


@given(seeds, shares, st.none() | st.integers(1, 5))
@settings(max_examples=25)
def test_the_optimum_is_that_of_brute_force(seed: int, share: float, most: int | None) -> None:
    problem, gains = toy_problem(SMALL, seed, share, most), toy_gains(SMALL, seed)
    feasible = [p for p in ALL if within(problem, p)]
    found = optimum(problem, gains)
    if not feasible:
        assert found is None
        return
    assert found is not None
    assert within(problem, found)
    assert gain_of(gains, found) == pytest.approx(max(gain_of(gains, p) for p in feasible), rel=1e-5, abs=1e-6)


@given(seeds, shares)
@settings(max_examples=10)
def test_diverse_optima_are_the_best_ones_in_order(seed: int, share: float) -> None:
    problem, gains = toy_problem(SMALL, seed, share), toy_gains(SMALL, seed)
    ranked = sorted((gain_of(gains, p) for p in ALL if within(problem, p)), reverse=True)
    found = diverse(problem, gains, 4)
    assert len({tuple(p) for p in found}) == len(found) == min(4, len(ranked))
    assert [gain_of(gains, p) for p in found] == pytest.approx(ranked[: len(found)], rel=1e-5, abs=1e-5)


def test_diverse_optima_keep_their_distance() -> None:
    problem, gains = toy_problem(SMALL, share=1.5), toy_gains(SMALL)
    found = diverse(problem, gains, 6, distance=3)
    assert len(found) >= 3
    assert all((a != b).sum() >= 3 for a, b in itertools.combinations(found, 2))
    values = [gain_of(gains, p) for p in found]
    assert values == sorted(values, reverse=True)


@given(seeds, shares, st.none() | st.integers(1, 6), st.integers(0, 10**6))
@settings(max_examples=40)
def test_random_and_repaired_placements_are_within_the_budgets(
    seed: int, share: float, most: int | None, draw: int
) -> None:
    space = toy_space(9)
    problem, gains = toy_problem(space, seed, share, most), toy_gains(space, seed)
    rng = np.random.default_rng(draw)
    wild = np.array([rng.choice(np.flatnonzero(row)) for row in space.allowed])
    drawn, mended = random_placement(problem, rng), repair(problem, wild, gains)
    if drawn is None or mended is None:
        assert optimum(problem, gains) is None
        return
    space.check(drawn)
    space.check(mended)
    assert within(problem, drawn)
    assert within(problem, mended)
    assert not within(problem, wild) or np.array_equal(mended, wild)


def test_random_placements_are_of_all_sizes_and_seeded() -> None:
    space = toy_space(12)
    problem = toy_problem(space, share=3.0)
    rng = np.random.default_rng(1)
    sizes = [int((p != 0).sum()) for p in (random_placement(problem, rng) for _ in range(300)) if p is not None]
    assert len(sizes) == 300
    assert min(np.bincount(sizes, minlength=13)[1:]) >= 8
    again = [random_placement(problem, np.random.default_rng(7)) for _ in range(2)]
    assert np.array_equal(again[0], again[1])


@given(seeds, shares, st.lists(st.floats(0, 1), min_size=8, max_size=8))
@settings(max_examples=20)
def test_whatever_the_weights_a_decoded_placement_is_within_the_budgets(
    seed: int, share: float, unit: list[float]
) -> None:
    space = toy_space(9)
    problem = toy_problem(space, seed, share)
    sampler = DecoderSampler(space, problem, toy_table(space, seed))
    names = ["stage:stage1", "stage:stage2", "type:acda", "type:pafu", "type:sekg"]
    weights = {name: 4 * u - 2 for name, u in zip(names, unit, strict=False)}
    weights |= {"exponent": 2 * unit[5], "optimism": 2 * unit[6] - 1, "use": 0.3 + 0.7 * unit[7]}
    found = sampler.decode(problem, weights)
    if found is None:
        assert optimum(problem, toy_gains(space, seed)) is None
        return
    space.check(found)
    assert within(problem, found)


def test_cuts_and_the_least_number_of_layers() -> None:
    problem, gains = toy_problem(SMALL, share=1.5), toy_gains(SMALL)
    best = optimum(problem, gains)
    assert best is not None
    other = optimum(problem, gains, cuts=[Cut(best, 2)])
    assert other is not None
    assert (other != best).sum() >= 2
    forced = optimum(problem, -np.abs(gains), at_least=2)
    assert forced is not None
    assert (forced != 0).sum() == 2
    assert optimum(problem, gains, at_least=6) is None


def test_the_front_rises_with_the_budget() -> None:
    problem, gains = toy_problem(SMALL, share=0.8), toy_gains(SMALL)
    points = front(problem, gains, "params", 6)
    assert len(points) >= 3
    assert all(a.cost < b.cost and a.gain < b.gain for a, b in itertools.pairwise(points))
    for point in points:
        best = max(gain_of(gains, p) for p in ALL if within(problem.limited({"params": point.cost}), p))
        assert point.gain == pytest.approx(best, rel=1e-5)


@given(seeds)
@settings(max_examples=10)
def test_the_nearest_budgets_can_be_met(seed: int) -> None:
    problem = toy_problem(SMALL, seed, share=-0.6)
    numbers = nearest(problem)
    assert set(numbers) == {"flops", "params", "memory"}
    met = problem.limited(numbers)
    assert any(within(met, p) for p in ALL)
    least = {name: min(problem.costs(p)[name] for p in ALL) for name in numbers}
    assert {name: smallest(problem, name) for name in numbers} == least


def test_the_closest_feasible_placement() -> None:
    problem = toy_problem(SMALL, share=0.1)
    wild = np.array([1, 1, 2, 1, 3])
    found = closest(problem, wild)
    assert found is not None
    fewest = min(int((p != wild).sum()) for p in ALL if within(problem, p))
    assert int((found != wild).sum()) == fewest


def test_a_problem_checks_itself() -> None:
    problem = toy_problem(SMALL)
    with pytest.raises(ConfigError, match="'memroy'"):
        problem.limited({"memroy": 3})
    with pytest.raises(ConfigError, match="finite"):
        optimum(problem, np.full(problem.shape, np.nan))
    assert problem.limited({"memory": None}).limit("memory") is None
    assert (problem.limited({"flops": None}).limits[problem.of("flops")] == FREE).all()
    assert problem.used(0.0).feasible(np.zeros(5, dtype=int))[0]


def test_the_solver_writes_nothing_to_stdout(root: Path) -> None:
    """HiGHS has a print left in it, which `--json` would not survive."""
    code = (
        "import ctypes\nfrom surgeon.search.placement import solver\nprint('before', end=' ')\n"
        "def noisy(*args, **kwargs): ctypes.CDLL(None).printf(b'tmpSolver.run();\\n')\n"
        "solver.milp = noisy\nsolver._quiet_milp()\nprint('after')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout == "before after\n"
