"""Update of the gains from measured values: a Gaussian posterior over the table's entries, and draws from it.

The value of a placement is modeled as b + s·(its summed table gain) + Σ over replaced layers of (stage effect + type effect + own
effect) + noise, every effect Gaussian around 0 (b and s broadly). The model is linear, so the posterior is exact. A draw of the
effects is a gain table, whose optimum under the budgets is the next proposal (Thompson sampling). The spreads of the effects and
of the noise maximize the marginal likelihood on a small grid.
"""

from collections.abc import Sequence

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular

from surgeon.search.gains.gain import GainTable
from surgeon.search.placement.problem import Floats, Ints
from surgeon.search.space import Space

_SPREADS = (0.03, 0.1, 0.3, 1.0)  # of one layer's own effect, for values with a standard deviation of 1
_NOISES = (0.03, 0.1, 0.3, 0.6)
_BROAD = 3.0


class Posterior:
    """Posterior over the gains of a space, given placements (n, L) and their values (n,), higher being better."""

    def __init__(self, space: Space, gains: GainTable, placements: Sequence[Ints], values: Sequence[float]) -> None:
        self.space = space
        self._effects = _features(space, gains)  # (L, O, D): features added by a layer's option
        chosen = np.array(placements, dtype=np.int64).reshape(len(values), len(space.layers))
        x = self._effects[np.arange(chosen.shape[1]), chosen].sum(axis=1)
        y = np.asarray(values, dtype=np.float64)
        self._scale = float(y.std()) or 1.0
        target = (y - y.mean()) / self._scale
        design = np.concatenate([np.ones((len(y), 1)), x], axis=1)
        groups = design.shape[1] - 2 - len(space.layers) * len(space.options)
        best: tuple[float, Floats, float] | None = None
        for spread in _SPREADS:
            variance = np.concatenate(
                [[_BROAD**2, _BROAD**2], np.full(groups, spread**2), np.full(design.shape[1] - 2 - groups, spread**2)]
            )
            kernel = (design * variance) @ design.T
            for noise in _NOISES:
                evidence = _evidence(kernel + noise**2 * np.eye(len(y)), target)
                if best is None or evidence > best[0]:
                    best = (evidence, variance, noise)
        assert best is not None
        _, variance, self.noise = best
        precision = design.T @ design / self.noise**2 + np.diag(1 / variance)
        self._factor = np.linalg.cholesky(precision)
        self._mean = cho_solve((self._factor, True), design.T @ target / self.noise**2)

    def draw(self, rng: np.random.Generator, spread: float = 1.0) -> Floats:
        """Gains (L, O): the posterior mean plus `spread` times a draw from its uncertainty, in the units of the values."""
        step = solve_triangular(self._factor, rng.standard_normal(len(self._mean)), lower=True, trans="T")
        weights = (self._mean + spread * step)[1:]
        gains: Floats = np.where(self.space.allowed, self._effects @ weights, 0.0) * self._scale
        gains[:, 0] = 0.0
        return gains


def _features(space: Space, gains: GainTable) -> Floats:
    """(L, O, 1 + stages + types + L·(O - 1)): table gain, stage, type, and own effect; all zero for "keep"."""
    layers, options = space.allowed.shape
    stages = sorted({stage or "" for stage in space.stages})
    types = sorted(set(space.types[1:]))
    top = np.abs(gains.gain).max() or 1.0
    effects = np.zeros((layers, options, 1 + len(stages) + len(types) + layers * (options - 1)))
    own = 1 + len(stages) + len(types)
    for i in range(layers):
        for j in range(1, options):
            effects[i, j, 0] = gains.gain[i, j] / top
            effects[i, j, 1 + stages.index(space.stages[i] or "")] = 1.0
            effects[i, j, 1 + len(stages) + types.index(space.types[j])] = 1.0
            effects[i, j, own + i * (options - 1) + j - 1] = 1.0
    return effects


def _evidence(covariance: Floats, target: Floats) -> float:
    """Log marginal likelihood, up to a constant."""
    factor = cho_factor(covariance, lower=True)
    return float(-0.5 * target @ cho_solve(factor, target) - np.log(np.diag(factor[0])).sum())
