"""The final stage: the best few trained in full, with several seeds, along with the unmodified model and a random placement."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgeon.records.recipe import parse_json, read_text
from surgeon.search.evaluate.evaluator import OutOfMemoryError
from surgeon.search.evaluate.training import TrainingEvaluator
from surgeon.search.gate import Gate
from surgeon.search.study.folder import Finished, SearchFolder, write_json
from surgeon.search.study.record import Record
from surgeon.util.outputs import SUMMARY, is_surgeon_folder

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A placement in the final stage. `role`: original, found or random; `values` by seed.

    There are no values if it was not trained, and why not is in `why_not`, or is not done yet.
    """

    role: str
    hash: str
    placement: dict[str, str]
    values: list[float]
    trial: int
    why_not: str | None = None

    @property
    def mean(self) -> float:
        """Mean of the values."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation of the values, 0 for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


def choose_arms(ranked: Sequence[Record], records: Sequence[Record], count: int) -> list[tuple[str, Record]]:
    """The original, the best `count` placements with replacements, and the first random one, pruned or not.

    The random one was not selected by value. `ranked` are the completed trials, best first, `records` all of them.
    """
    arms = [("original", one) for one in records if one.counts and not one.placement][:1]
    arms += [("found", one) for one in ranked if one.placement][:count]
    known = {one.hash for _, one in arms}
    drawn = [one for one in records if one.counts and one.source == "random"]
    return arms + [("random", one) for one in drawn if one.hash not in known][:1]


def run_finals(
    folder: SearchFolder,
    evaluator: TrainingEvaluator,
    gate: Gate,
    found: Finished,
    *,
    count: int,
    seeds: int,
    rung: int,
    tell: Tell,
) -> list[Arm]:
    """Train the arms, or resume them; completed runs are read. Every run is a surgeon folder in `finals`.

    There are only arms whose trials were evaluated; an arm over budget, or out of memory, is skipped with the reason. All arms
    are in the folder's table from the beginning, so that readers know how many are still to come.
    """
    chosen = choose_arms(found.ranked(), found.records, count)
    head = {"steps": evaluator.config.steps << rung, "seeds": seeds}
    with folder.alone():
        arms = [_completed(folder, evaluator, role, one, seeds, rung) for role, one in chosen]
        for number, (role, one) in enumerate(chosen):
            write_json(folder.table, {**head, "arms": [asdict(arm) for arm in arms]})
            arms[number] = last = _arm(folder, evaluator, gate, role, one, seeds, rung)
            told = last.why_not or f"{last.mean:.5g} ± {last.spread:.2g}"
            tell(f"finals {number + 1}/{len(chosen)}: {role}, {evaluator.task.primary} {told}")
        if arms:
            write_json(folder.table, {**head, "arms": [asdict(arm) for arm in arms]})
    return arms


def _completed(
    folder: SearchFolder, evaluator: TrainingEvaluator, role: str, one: Record, seeds: int, rung: int
) -> Arm:
    """The arm as it is on disk: with the values of all its seeds, or without any."""
    key = evaluator.space.hash_of(evaluator.space.placement(one.placement))
    known = [_recorded(evaluator, final_folder(folder, key, seed, rung)) for seed in range(seeds)]
    values = [value for value in known if value is not None]
    values = values if len(values) == seeds else []
    return Arm(role=role, hash=key, placement=dict(one.placement), values=values, trial=one.number)


def _arm(
    folder: SearchFolder, evaluator: TrainingEvaluator, gate: Gate, role: str, one: Record, seeds: int, rung: int
) -> Arm:
    placement = evaluator.space.placement(one.placement)
    key = evaluator.space.hash_of(placement)
    values: list[float] = []
    verdict = gate.check(placement)
    why_not = None if verdict.fits else "; ".join(verdict.reasons)
    for seed in range(seeds if why_not is None else 0):
        output = final_folder(folder, key, seed, rung)
        try:
            values.append(_value(evaluator, placement, output, rung, seed))
        except OutOfMemoryError as error:
            gate.out_of_memory(placement, error.memory)
            why_not = "out of memory at run time"
            values.clear()
            break
    return Arm(role=role, hash=key, placement=dict(one.placement), values=values, trial=one.number, why_not=why_not)


def final_folder(folder: SearchFolder, key: str, seed: int, rung: int) -> Path:
    """Folder of a final run."""
    return folder.finals / f"{key}-rung{rung}-seed{seed}"


def _value(evaluator: TrainingEvaluator, placement: Any, output: Path, rung: int, seed: int) -> float:
    known = _recorded(evaluator, output)
    if known is not None:
        return known
    result = evaluator.train(placement, rung=rung, seed=seed, output=output)
    return float(result.metrics[evaluator.task.primary])


def _recorded(evaluator: TrainingEvaluator, output: Path) -> float | None:
    """The value of a completed run; None if there is none."""
    summary = output / SUMMARY
    if not (is_surgeon_folder(output) and summary.is_file()):
        return None
    found = parse_json(read_text(summary), str(summary))
    return float(found["result"]["metrics"][evaluator.task.primary])


def best_arm(arms: Sequence[Mapping[str, Any]], *, higher: bool) -> Mapping[str, Any] | None:
    """The found or random arm with the best mean."""
    trained = [arm for arm in arms if arm["values"] and arm["placement"]]
    sign = -1.0 if higher else 1.0
    return min(trained, key=lambda arm: sign * statistics.fmean(arm["values"]), default=None)
