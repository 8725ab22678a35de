"""Feasible placements without a solver: random ones, and repairs of infeasible ones. Seeded, exact, never over budget."""

import numpy as np

from surgeon.search.placement.place import closest, optimum
from surgeon.search.placement.problem import FREE, Floats, Ints, Problem


def random_placement(problem: Problem, rng: np.random.Generator) -> Ints | None:
    """A feasible placement; None if there is none.

    The number of replaced layers is drawn first, uniformly, so that small and large placements are equally likely; then the layers
    and their options. If over budget, random layers get a random cheaper option until it fits. If not even the unmodified
    model fits, the result is the optimum of random gains.
    """
    layers = problem.shape[0]
    if not problem.feasible(np.zeros(layers, dtype=np.int64))[0]:
        return optimum(problem, np.where(problem.allowed, rng.random(problem.shape), 0.0), gap=0.01)
    able = np.flatnonzero(problem.allowed[:, 1:].any(axis=1))
    most = len(able) if problem.max_layers is None else min(problem.max_layers, len(able))
    count = int(rng.integers(1, most + 1)) if most else 0
    placement = np.zeros(layers, dtype=np.int64)
    for layer in rng.permutation(able)[:count]:
        placement[layer] = rng.choice(np.flatnonzero(problem.allowed[layer, 1:])) + 1
    total = problem.totals(placement)[0]
    order = rng.permutation(np.flatnonzero(placement))
    for layer in order:
        if (total <= problem.limits).all():
            break
        total += _make_cheaper(problem, placement, layer, total, rng)
    for layer in order:  # the cheaper options together are still over budget
        if (total <= problem.limits).all():
            break
        total -= problem.rows[layer, placement[layer]]
        placement[layer] = 0
    return placement


def _make_cheaper(problem: Problem, placement: Ints, layer: int, total: Ints, rng: np.random.Generator) -> Ints:
    """Give a layer a random option at most as far over the limits as its current one; returns the change of the totals."""
    rows = problem.rows[layer]
    over = np.maximum(total - rows[placement[layer]] + rows - problem.limits, 0)
    worse = (over / _scale(problem)).sum(axis=1)
    better = np.flatnonzero(problem.allowed[layer] & (worse < worse[placement[layer]]))
    if not len(better):
        return np.zeros_like(total)
    new = int(rng.choice(better))
    change: Ints = rows[new] - rows[placement[layer]]
    placement[layer] = new
    return change


def repair(problem: Problem, placement: Ints, gains: Floats) -> Ints | None:
    """A feasible placement near an infeasible one; None if there is none.

    Greedy: repeatedly the change of one layer that loses the least gain per unit of excess removed, until nothing is over; leftover
    room is not used. If no single change helps, the feasible placement that differs in the fewest layers.
    """
    result = placement.copy()
    result[~problem.allowed[np.arange(len(result)), result]] = 0
    _drop_to_count(problem, result, gains)
    index = np.arange(len(result))
    scale = _scale(problem)
    total = problem.totals(result)[0]
    while (total > problem.limits).any():
        excess = (np.maximum(total - problem.limits, 0) / scale).sum()
        moved = total - problem.rows[index, result][:, None] + problem.rows  # (L, O, K)
        left = (np.maximum(moved - problem.limits, 0) / scale).sum(axis=2)
        relief = np.where(problem.allowed, excess - left, 0.0)
        if problem.max_layers is not None and (result != 0).sum() >= problem.max_layers:
            relief[result == 0, 1:] = 0.0
        helps = relief > 1e-12 * excess
        if not helps.any():
            return closest(problem, result)
        lost = gains[index, result][:, None] - gains
        # first changes that lose nothing (by relief), then those that lose least per relief
        price = np.where(
            helps, np.where(lost <= 0, -relief, np.maximum(lost, 0) / np.where(helps, relief, 1.0)), np.inf
        )
        layer, option = np.unravel_index(int(np.argmin(price)), price.shape)
        result[layer] = option
        total = problem.totals(result)[0]
    return result


def _drop_to_count(problem: Problem, placement: Ints, gains: Floats) -> None:
    """Keep only the `max_layers` replacements with the highest gains."""
    if problem.max_layers is None:
        return
    replaced = np.flatnonzero(placement)
    order = replaced[np.argsort(-gains[replaced, placement[replaced]], kind="stable")]
    placement[order[problem.max_layers :]] = 0


def _scale(problem: Problem) -> Floats:
    """The unit of excess for each row: its limit, or 1 if it has none."""
    scale: Floats = np.maximum(np.abs(np.where(problem.limits == FREE, 1, problem.limits)), 1).astype(np.float64)
    return scale
