"""The result of a search's finals: the best placement and the unmodified model, trained with the same seeds."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgeon.search.evaluate.finals import best_arm
from surgeon.search.study.folder import Finished
from surgeon.util.tables import counted
from surgeon.zoo.trial import standard_error, verdict, with_error


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The best arm of the finals and the unmodified model; `gains` are the differences by seed, more is better."""

    best: Mapping[str, Any]
    original: Mapping[str, Any]
    gains: list[float]

    @property
    def verdict(self) -> str:
        """won, lost or undecided."""
        return verdict(self.gains)

    @property
    def gain(self) -> str:
        """In words: "+0.021 ± 0.006 (3 seeds)"."""
        mean = with_error(statistics.fmean(self.gains), standard_error(self.gains))
        return f"{mean} ({counted(len(self.gains), 'seed')})"


def comparison(found: Finished) -> Comparison | None:
    """The result of the finals; None unless they are done, with a placement and the unmodified model trained."""
    arms = found.compared()
    best = best_arm(arms, higher=found.higher_is_better)
    original = next((arm for arm in arms if arm["role"] == "original"), None)
    if best is None or original is None:
        return None
    sign = 1.0 if found.higher_is_better else -1.0
    gains = [sign * (a - b) for a, b in zip(best["values"], original["values"], strict=False)]
    return Comparison(best=best, original=original, gains=gains)
