"""A trial as a record: the attributes in use, with type checks if they may be untrusted.

User attributes: `placement` (layer → option), `hash`, `source`, `gain` (expected by the table), `predicted`, `worker`,
`attempts`, and if applicable `refused`, `error`, `traced`, `seconds`, `loss` (of the samples that judge, if the evaluator measures
one), `start` (value of the network before any training; not in studies of older versions); in studies of older versions
`duplicate_of`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from surgeon.search.study.journal import StudyError
from surgeon.util.files import check_fields

Rank = tuple[float, ...]


def rank(value: float, *, higher: bool, loss: float | None, costs: Mapping[str, float | None]) -> Rank:
    """Sort key of results, best first: the value; between equal ones the lower loss, then fewer FLOPs, then less memory.

    `higher`: whether a higher value is better. `costs` has "flops" and "memory" (bytes, peak). What is not known comes last.
    """
    ties = (loss, costs.get("flops"), costs.get("memory"))
    return (-value if higher else value, *(math.inf if one is None else one for one in ties))


@dataclass(frozen=True, kw_only=True)
class Record:
    """One trial. `state`: complete, pruned, refused (over budget, never trained), failed, running, waiting, unused (none left).

    As read by `read_search`, one that is open and that no worker runs is interrupted.
    """

    number: int
    state: str
    hash: str | None
    placement: Mapping[str, str]
    source: str | None
    values: tuple[float, ...] | None
    duplicate_of: int | None
    attempts: int
    worker: str | None
    attributes: Mapping[str, Any] = field(repr=False)

    @property
    def counts(self) -> bool:
        """Whether it was a distinct evaluation."""
        return self.state in ("complete", "pruned") and self.duplicate_of is None

    @property
    def value(self) -> float | None:
        """The first value of a completed trial."""
        return self.values[0] if self.state == "complete" and self.values else None

    @property
    def costs(self) -> Mapping[str, float]:
        """The costs of the whole trace, else those of the cost table."""
        return self.attributes.get("traced") or self.attributes.get("predicted") or {}


def ranked(records: Iterable[Record], *, higher: bool) -> list[Record]:
    """The completed trials, best first (`rank`), the earlier one first if all is equal; `higher`: a higher value is better."""
    done = ((one.value, one) for one in records)
    keys = [
        (rank(value, higher=higher, loss=one.attributes.get("loss"), costs=one.costs), one.number, one)
        for value, one in done
        if value is not None and one.duplicate_of is None
    ]
    return [one for *_, one in sorted(keys, key=lambda key: key[:2])]


_ATTRIBUTES: dict[str, Any] = {  # schema of a trial's attributes
    "hash": str,
    "placement": {"*": str},
    "source": str,
    "gain": (int, float),
    "worker": str,
    "attempts": int,
    "duplicate_of": int,
    "refused": [str],
    "predicted": {"*": (int, float)},
    "traced": {"*": (int, float)},
    "seconds": (int, float),
    "loss": (int, float),
    "start": (int, float),
}


def checked(trial: FrozenTrial, where: str) -> FrozenTrial:
    """The trial; raises `StudyError` for attributes of unexpected types: a study may be untrusted."""
    fields = {name: kind for name, kind in _ATTRIBUTES.items() if name in trial.user_attrs}
    check_fields(dict(trial.user_attrs), fields, f"{where}: trial {trial.number}", StudyError)
    return trial


def record(trial: FrozenTrial) -> Record:
    """A trial as a record."""
    attributes = trial.user_attrs
    states = {
        TrialState.COMPLETE: "complete",
        TrialState.PRUNED: "refused" if "refused" in attributes else "pruned",
        TrialState.FAIL: "failed",
        TrialState.RUNNING: "running",
        TrialState.WAITING: "unused" if "worker" in attributes else "waiting",
    }
    values = trial.values if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) else None
    return Record(
        number=trial.number,
        state=states[trial.state],
        hash=attributes.get("hash"),
        placement=attributes.get("placement", {}),
        source=attributes.get("source"),
        values=None if values is None else tuple(values),
        duplicate_of=attributes.get("duplicate_of"),
        attempts=int(attributes.get("attempts", 0)),
        worker=attributes.get("worker"),
        attributes=attributes,
    )
