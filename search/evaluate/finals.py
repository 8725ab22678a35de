"""The final stage: the best few trained in full, with several seeds, along with the unmodified model and a random placement."""

import statistics
from collections.abc import Callable, Sequence
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
    """A placement in the final stage. `role`: original, found or random; `values` by seed, empty if it was not trained."""

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

    There are only arms whose trials were evaluated; an arm over budget, or out of memory, is skipped with the reason.
    """
    chosen = choose_arms(found.ranked(), found.records, count)
    arms: list[Arm] = []
    with folder.alone():
        for number, (role, one) in enumerate(chosen, start=1):
            arms.append(_arm(folder, evaluator, gate, role, one, seeds, rung))
            last = arms[-1]
            told = last.why_not or f"{last.mean:.5g} ± {last.spread:.2g}"
            tell(f"finals {number}/{len(chosen)}: {role}, {evaluator.task.primary} {told}")
            steps = evaluator.config.steps << rung
            values = {"steps": steps, "seeds": seeds, "arms": [asdict(arm) for arm in arms]}
            write_json(folder.table, values)
    return arms


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
    summary = output / SUMMARY
    if is_surgeon_folder(output) and summary.is_file():
        found = parse_json(read_text(summary), str(summary))
        return float(found["result"]["metrics"][evaluator.task.primary])
    result = evaluator.train(placement, rung=rung, seed=seed, output=output)
    return float(result.metrics[evaluator.task.primary])


def best_arm(arms: Sequence[dict[str, Any]], *, higher: bool) -> dict[str, Any] | None:
    """The found or random arm with the best mean."""
    trained = [arm for arm in arms if arm["values"] and arm["placement"]]
    sign = -1.0 if higher else 1.0
    return min(trained, key=lambda arm: sign * statistics.fmean(arm["values"]), default=None)
