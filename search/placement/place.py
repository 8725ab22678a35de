"""Placements by integer programming: the best under all budgets, several diverse ones, the front over a budget, the nearest."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from surgeon.errors import ConfigError
from surgeon.search.placement.problem import FREE, Floats, Ints, Problem
from surgeon.search.placement.solver import Program, minimize

GAP = 1e-6  # relative, for an optimum's gain


@dataclass(frozen=True)
class Cut:
    """Placements must differ from this one in at least `distance` layers."""

    placement: Ints
    distance: int = 1


@dataclass(frozen=True)
class Point:
    """One placement of a front: its cost in the swept resource, and its gain."""

    placement: Ints
    cost: int
    gain: float


def gain_of(gains: Floats, placement: Ints) -> float:
    """Sum of the gains (L, O) of a placement (L,)."""
    return float(gains[np.arange(len(placement)), placement].sum())


def optimum(
    problem: Problem,
    gains: Floats,
    *,
    cuts: Sequence[Cut] = (),
    at_least: int = 0,
    gap: float = GAP,
    rough: bool = False,
) -> Ints | None:
    """The placement with the highest summed gain within all limits; None if there is none.

    Args:
        gains: (L, O), finite; those of option 0 are the gains of keeping a layer, normally 0.
        cuts: placements to keep a distance from.
        at_least: minimum number of replaced layers.
        gap: allowed relative distance of the gain from the optimum.
        rough: fast, and nearly always within one percent of the optimum; for gains that are rough estimates anyway.
    """
    if gains.shape != problem.shape or not np.isfinite(gains[problem.allowed]).all():
        raise ConfigError(f"gains must be finite numbers {problem.shape}, got {gains.shape}")
    layers, options = _choices(problem, gains, bool(cuts) or at_least > 0)
    values = gains[layers, options] - gains[layers, 0]
    matrix, upper = _fixed_rows(problem, layers, options, cuts, at_least)
    lean = problem.lean()
    pool = np.ascontiguousarray(lean.rows[layers, options].T)
    program = Program(values, matrix, upper, pool, lean.limits - lean.base)
    chosen = program.solve(gap, rough=rough)
    if chosen is None:
        return None
    placement = np.zeros(problem.shape[0], dtype=np.int64)
    placement[layers[chosen]] = options[chosen]
    assert problem.feasible(placement)[0]
    return placement


def diverse(problem: Problem, gains: Floats, count: int, *, distance: int = 1, gap: float = GAP) -> list[Ints]:
    """Up to `count` placements, best first, each at least `distance` layers from those before it."""
    found: list[Ints] = []
    while len(found) < count:
        placement = optimum(problem, gains, cuts=[Cut(p, distance) for p in found], gap=gap)
        if placement is None:
            break
        found.append(placement)
    # with a gap, a later program may find a slightly better placement than an earlier one
    return sorted(found, key=lambda placement: -gain_of(gains, placement))


def front(problem: Problem, gains: Floats, resource: str, points: int = 10) -> list[Point]:
    """The Pareto front of gain against one resource, from a sweep of its budget up to its limit (or the optimum's cost)."""
    best = optimum(problem, gains)
    if best is None:
        return []
    top, low = problem.costs(best)[resource], int(problem.base[problem.of(resource)].max())
    found = [Point(best, top, gain_of(gains, best))]
    for limit in np.linspace(low, top, points)[:-1]:
        placement = optimum(problem.limited({resource: int(limit)}), gains)
        if placement is not None:
            found.append(Point(placement, problem.costs(placement)[resource], gain_of(gains, placement)))
    found.sort(key=lambda point: (point.cost, -point.gain))
    kept: list[Point] = []
    for point in found:
        if not kept or point.gain > kept[-1].gain:
            kept.append(point)
    return kept


def closest(problem: Problem, placement: Ints) -> Ints | None:
    """The feasible placement that differs from this one in the fewest layers; None if there is none."""
    agree = np.zeros(problem.shape)
    agree[np.arange(len(placement)), placement] = 1.0
    return optimum(problem, agree)


def nearest(problem: Problem, *, at_least: int = 0) -> dict[str, int]:
    """The required limits: the costs of `nearest_placement`."""
    placement = nearest_placement(problem, at_least=at_least)
    return {name: value for name, value in problem.costs(placement).items() if problem.limit(name) is not None}


def nearest_placement(problem: Problem, *, at_least: int = 0) -> Ints:
    """The placement, with at least `at_least` replaced layers, that exceeds the current limits by the smallest factor.

    The factor is shared by all resources, so one placement meets all of these numbers at once.
    """
    layers, options = np.nonzero(problem.allowed & (np.arange(problem.shape[1]) > 0))
    limited = np.flatnonzero(problem.limits != FREE)
    scale = np.maximum(np.abs(problem.limits[limited]), 1).astype(np.float64)
    fixed, upper = _fixed_rows(problem, layers, options, (), at_least)
    rows = problem.rows[layers, options][:, limited].T / scale[:, None]
    room = (problem.limits - problem.base)[limited] / scale
    matrix = sparse.vstack(
        [
            sparse.hstack([fixed, sparse.csr_matrix((fixed.shape[0], 1))]),
            sparse.hstack([sparse.csr_matrix(rows), sparse.csr_matrix(np.full((len(limited), 1), -1.0))]),
        ]
    ).tocsr()
    n = len(layers)
    cost = np.concatenate([np.full(n, 1e-9), [1.0]])
    integrality = np.concatenate([np.ones(n), [0]]).astype(np.int64)
    bounds = np.concatenate([np.ones(n), [np.inf]])
    solved = minimize(cost, integrality, bounds, matrix, np.concatenate([upper, room]))
    placement = np.zeros(problem.shape[0], dtype=np.int64)
    if solved is not None:
        chosen = solved[:-1] > 0.5
        placement[layers[chosen]] = options[chosen]
    return placement


def smallest(problem: Problem, resource: str) -> int:
    """The lowest cost of any placement in a resource, regardless of the other limits."""
    alone = problem.limited(dict.fromkeys(dict.fromkeys(problem.names)) | {resource: 1})
    return nearest(alone)[resource]


def _choices(problem: Problem, gains: Floats, all_of_them: bool) -> tuple[Ints, Ints]:
    """Variables of the program: (layer, option) pairs that can be part of an optimum."""
    useful = problem.allowed.copy()
    useful[:, 0] = False
    if not all_of_them:
        # an option that neither gains nor saves anything is never better than keeping the layer
        saves = (problem.rows[:, :, problem.limits != FREE] < 0).any(axis=2)
        useful &= (gains > gains[:, :1]) | saves
    layers, options = np.nonzero(useful)
    return layers.astype(np.int64), options.astype(np.int64)


def _fixed_rows(
    problem: Problem, layers: Ints, options: Ints, cuts: Sequence[Cut], at_least: int
) -> tuple[sparse.csr_matrix, Floats]:
    """One option per layer, the number of replaced layers, and the cuts."""
    n = len(layers)
    parts = [sparse.csr_matrix((np.ones(n), (layers, np.arange(n))), shape=(problem.shape[0], n))]
    upper = [1.0] * problem.shape[0]
    if problem.max_layers is not None:
        parts.append(sparse.csr_matrix(np.ones((1, n))))
        upper.append(float(problem.max_layers))
    if at_least:
        parts.append(sparse.csr_matrix(np.full((1, n), -1.0)))
        upper.append(-float(at_least))
    for cut in cuts:
        # layers that agree: those kept in both (1 minus the layer's sum), and those with the same option
        there = cut.placement[layers]
        row = np.where(there == 0, -1.0, (options == there).astype(np.float64))
        parts.append(sparse.csr_matrix(row[None]))
        kept = int((cut.placement == 0).sum())
        upper.append(float(problem.shape[0] - cut.distance - kept))
    return sparse.vstack(parts).tocsr(), np.array(upper)
