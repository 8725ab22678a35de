"""Two networks trained with the same seeds: differences, their standard error, and whether they decide anything."""

import statistics
from collections.abc import Mapping, Sequence

from surgeon.zoo.trial.answer import standard_error, verdict


def differences(
    mine: Mapping[int, Mapping[str, float]], other: Mapping[int, Mapping[str, float]]
) -> dict[str, list[float]]:
    """Differences of the seeds that both have, by score; both give scores by seed."""
    shared = sorted(set(mine) & set(other))
    return {what: [mine[s][what] - other[s][what] for s in shared] for what in (mine[shared[0]] if shared else {})}


def outcome(values: Sequence[float], lower: bool = False) -> str:
    """`verdict` where less may be better."""
    return verdict([-value for value in values] if lower else values)


def signed(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard error."""
    error = standard_error(values)
    return f"{statistics.mean(values):+.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def tally(verdicts: Sequence[str]) -> str:
    """How many comparisons are won, lost and undecided."""
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("won", "lost", "undecided"))
    return f"of {len(verdicts)} comparisons: {counts}"
