"""Two networks trained with the same seeds: differences, their standard error, and whether they decide anything."""

import math
import statistics
from collections.abc import Mapping, Sequence

SEEDS = 3  # with fewer nothing is decided


def differences(
    mine: Mapping[int, Mapping[str, float]], other: Mapping[int, Mapping[str, float]]
) -> dict[str, list[float]]:
    """Differences of the seeds that both have, by score; both give scores by seed."""
    shared = sorted(set(mine) & set(other))
    return {what: [mine[s][what] - other[s][what] for s in shared] for what in (mine[shared[0]] if shared else {})}


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None with fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def verdict(values: Sequence[float], lower: bool = False) -> str:
    """ "won" or "lost" beyond two standard errors of at least three seeds, otherwise "undecided"."""
    error = standard_error(values)
    if error is None or len(values) < SEEDS or abs(statistics.mean(values)) <= 2 * error:
        return "undecided"
    return "won" if (statistics.mean(values) < 0) == lower else "lost"


def signed(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard error."""
    error = standard_error(values)
    return f"{statistics.mean(values):+.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def tally(verdicts: Sequence[str]) -> str:
    """How many comparisons are won, lost and undecided."""
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("won", "lost", "undecided"))
    return f"of {len(verdicts)} comparisons: {counts}"
