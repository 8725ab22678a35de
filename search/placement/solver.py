"""`scipy.optimize.milp`, silenced, exact on integers, with rows added only as needed."""

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from surgeon.search.placement.problem import Bools, Floats, Ints

_LOCK = threading.Lock()
_CORE = 45  # variables in the first, restricted program
_NODES = 20_000  # a limit independent of the machine's speed, so that results are reproducible
_ROUGH_NODES = 50
_TIGHTEN = 1e-9


@dataclass
class Program:
    """maximize values @ x over x in {0, 1}ⁿ with fixed rows, and pool rows that are added once a solution violates them.

    `matrix @ x <= upper` always; `pool @ x <= room` is checked, in integers, on every solution.
    """

    values: Floats
    matrix: Any  # sparse (rows, n)
    upper: Floats
    pool: Ints  # (K, n)
    room: Ints  # (K,)
    active: list[int] = field(default_factory=list)
    tightened: dict[int, float] = field(default_factory=dict)
    nodes: int = _NODES

    def solve(self, gap: float, *, rough: bool = False) -> Bools | None:
        """The best x, up to the relative `gap`; None if there is none.

        First the linear relaxation with its pool rows, then a small program of the variables left fractional, then the
        whole program without the variables ruled out by its duals. `rough` accepts the small program's answer.
        """
        n = len(self.values)
        if n == 0:
            return np.zeros(0, dtype=np.bool_) if self._holds(np.zeros(0, dtype=np.bool_)) else None
        relaxed = self._relax()
        if relaxed is None:
            return None
        bound, x, reduced = relaxed
        order = np.argsort(np.where((x > 1e-9) & (x < 1 - 1e-9), 0.0, np.abs(reduced)), kind="stable")
        core = np.zeros(n, dtype=np.bool_)
        core[order[:_CORE]] = True
        found = None
        self.nodes = _ROUGH_NODES if rough else _NODES
        if n > _CORE:
            found = self._search(np.where(core, 0.0, np.round(x)), np.where(core, 1.0, np.round(x)), gap)
        if found is None:
            self.nodes = _NODES
            return self._search(np.zeros(n), np.ones(n), gap)
        slack = bound - float(self.values @ found)
        if rough or slack <= gap * max(abs(bound), 1e-12):
            return found
        lower, upper = np.where(-reduced > slack, 1.0, 0.0), np.where(reduced > slack, 0.0, 1.0)
        better = self._search(lower, upper, gap)
        if better is None or self.values @ better < self.values @ found:
            return found
        return better

    def _relax(self) -> tuple[float, Floats, Floats] | None:
        """Bound, solution and reduced costs of the linear relaxation; a variable worth less has a positive reduced cost."""
        while True:
            matrix, upper = self._rows()
            solved = linprog(-self.values, A_ub=matrix, b_ub=upper, bounds=(0, 1), method="highs")
            if solved.x is None:
                return None
            over = self._worst(solved.x)
            if over is None:
                return -float(solved.fun), solved.x, solved.lower.marginals + solved.upper.marginals
            self.active.append(over)

    def _search(self, lower: Floats, upper: Floats, gap: float) -> Bools | None:
        """The integer program with its variables between these bounds."""
        while True:
            free = np.flatnonzero(upper > lower)
            matrix, limit = self._rows()
            x = lower.copy()
            if len(free):
                solved = _quiet_milp(
                    -self.values[free],
                    integrality=np.ones(len(free)),
                    bounds=Bounds(0, 1),
                    constraints=LinearConstraint(matrix[:, free], -np.inf, limit - matrix @ lower),
                    options={"mip_rel_gap": gap, "node_limit": self.nodes},
                )
                if solved.x is None:
                    return None
                x[free] = np.round(solved.x)
            chosen: Bools = x > 0.5
            over = self._broken(chosen)
            if over is None:
                return chosen if self._fixed_hold(chosen) else None
            if over not in self.active:
                self.active.append(over)
            elif len(free) == 0 or self.tightened.get(over, 0.0) > 1e-3:
                return None
            else:  # accepted by the solver's tolerance, not by integer arithmetic
                self.tightened[over] = max(self.tightened.get(over, 0.0) * 4, _TIGHTEN)

    def _rows(self) -> tuple[Any, Floats]:
        """The fixed rows and the active ones of the pool, scaled."""
        if not self.active:
            return self.matrix, self.upper
        part = self.pool[self.active].astype(np.float64)
        scale = np.maximum(np.abs(part).max(axis=1), 1.0)
        room = self.room[self.active] / scale
        room = room - np.array([self.tightened.get(i, 0.0) for i in self.active]) * np.maximum(np.abs(room), 1.0)
        matrix = sparse.vstack([self.matrix, sparse.csr_matrix(part / scale[:, None])]).tocsr()
        return matrix, np.concatenate([self.upper, room])

    def _worst(self, x: Floats) -> int | None:
        """The inactive pool row most violated by a fractional solution."""
        over = self.pool @ x - self.room
        relative = over / np.maximum(np.abs(self.pool).max(axis=1, initial=1), 1)
        relative[self.active] = -1.0
        worst = int(np.argmax(relative)) if len(relative) else -1
        return worst if worst >= 0 and relative[worst] > 1e-7 else None

    def _broken(self, chosen: Bools) -> int | None:
        """The pool row most violated by an integer solution, in exact arithmetic."""
        over = self.pool[:, chosen].sum(axis=1) - self.room
        if not len(over) or over.max() <= 0:
            return None
        return int(np.argmax(over / np.maximum(np.abs(self.pool).max(axis=1, initial=1), 1)))

    def _fixed_hold(self, chosen: Bools) -> bool:
        return bool((self.matrix @ chosen.astype(np.float64) <= self.upper + 1e-6).all())

    def _holds(self, chosen: Bools) -> bool:
        return self._broken(chosen) is None and bool((self.upper >= -1e-6).all())


def minimize(cost: Floats, integrality: Ints, upper: Floats, matrix: Any, limit: Floats) -> Floats | None:
    """min cost @ x, 0 <= x <= upper, matrix @ x <= limit; None if there is no such x."""
    solved = _quiet_milp(
        cost,
        integrality=integrality,
        bounds=Bounds(np.zeros(len(cost)), upper),
        constraints=LinearConstraint(matrix, -np.inf, limit),
        options={"mip_rel_gap": 1e-6, "node_limit": _NODES},
    )
    if solved.x is None:
        return None
    result: Floats = np.where(integrality > 0, np.round(solved.x), solved.x)
    return result


def _quiet_milp(*args: Any, **kwargs: Any) -> Any:
    with _no_native_output():
        return milp(*args, **kwargs)


@contextmanager
def _no_native_output() -> Iterator[None]:
    """HiGHS 1.12 prints a debugging line to the process's stdout regardless of options (ERGO-Code/HiGHS issue 2783)."""
    with _LOCK:
        try:
            sys.stdout.flush()
            kept = os.dup(1)
        except (OSError, ValueError, AttributeError):  # no stdout to protect
            yield
            return
        native = ctypes.CDLL(None) if os.name == "posix" else None
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            if native is not None:
                native.fflush(None)
            os.dup2(null, 1)
            yield
        finally:
            if native is not None:
                native.fflush(None)  # the solver's buffered output must not appear later
            os.dup2(kept, 1)
            os.close(kept)
            os.close(null)
