"""Text and JSON summary of a search: its state, its best placements relative to the unmodified model, its finals."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import spearmanr

from surgeon.search.study.folder import Finished
from surgeon.search.study.record import Record
from surgeon.util.few import COUNTS, enough, few_judge
from surgeon.util.tables import counted, paragraph, table


def status_values(found: Finished, count: int = 5) -> dict[str, Any]:
    """The summary as plain JSON values."""
    original = found.original()
    used = [one for one in found.records if one.state != "unused"]
    return {
        "model": found.about["model"]["name"],
        "task": found.about["task"],
        "budgets": found.about["budgets"],
        "trials": dict(Counter("repeated" if one.duplicate_of is not None else one.state for one in used)),
        "begun": found.begun,
        "ended": found.ended,
        "workers": len(found.alive),
        "rank_correlation": None if (rank := rank_correlation(found)) is None else asdict(rank),
        "start": found.start(),
        "original": None if original is None else record_values(found, original),
        "best": [record_values(found, one) for one in found.ranked()[:count]],
        "objectives": found.about["objectives"],
        "front": [record_values(found, one) for one in found.records if one.number in found.front],
        "finals": found.finals,
    }


def record_values(found: Finished, one: Record) -> dict[str, Any]:
    """One trial as plain JSON values."""
    return {
        "trial": one.number,
        "hash": one.hash,
        "source": one.source,
        "value": found.value(one),
        "loss": one.attributes.get("loss"),
        "values": None if one.values is None else list(one.values),
        "placement": dict(one.placement),
        "gain": one.attributes.get("gain"),
        "traced": one.attributes.get("traced"),
        "seconds": one.attributes.get("seconds"),
    }


@dataclass(frozen=True, kw_only=True)
class RankCorrelation:
    """Spearman's, of `trials` trials, `tied` of which share their measured value with another one.

    `error` is its standard error if the two have nothing to do with each other.
    """

    value: float
    error: float
    trials: int
    tied: int

    def __str__(self) -> str:
        ties = f", {self.tied} with tied values" if self.tied else ""
        undecided = ": undecided" if abs(self.value) <= 2 * self.error else ""
        return f"{self.value:.2f} ± {self.error:.2f} ({counted(self.trials, 'trial')}{ties}){undecided}"


def rank_correlation(found: Finished) -> RankCorrelation | None:
    """How the expected gains rank the measured values; None with fewer than 4 trials, or if one of the two is constant."""
    pairs = [(float(one.attributes.get("gain", 0.0)), found.value(one) or 0.0) for one in found.ranked()]
    if len(pairs) < 4:
        return None
    expected, measured = zip(*pairs, strict=True)
    if len(set(expected)) == 1 or len(set(measured)) == 1:
        return None
    value = float(spearmanr(expected, measured).statistic)
    return RankCorrelation(
        value=value if found.higher_is_better else -value,
        error=(len(pairs) - 1) ** -0.5,  # by permutation, with ties, too
        trials=len(pairs),
        tied=sum(n for n in Counter(measured).values() if n > 1),
    )


def notes(found: Finished) -> list[str]:
    """The limits of what the trials say, for the text and the page alike."""
    judged: Sequence[str | None] = ()
    if found.ranked():
        judged = (worse_than_start(found), few_samples(found), as_good(found), tied(found) or none_better(found))
    return [told for told in (found.ended, interrupted(found), unfinished(found), *judged) if told is not None]


def interrupted(found: Finished) -> str | None:
    """A sentence if trials were interrupted and nobody runs them."""
    number = sum(one.state == "interrupted" for one in found.records)
    if not number:
        return None
    was, it = ("was", "it") if number == 1 else ("were", "them")
    return f"{counted(number, 'trial')} {was} interrupted: the same command with --resume continues {it}"


def unfinished(found: Finished) -> str | None:
    """A sentence if arms of the finals are still to be trained."""
    done, of = found.finals_done()
    if done == of:
        return None
    return f"{done} of {counted(of, 'final')} done: they compare once all are; if they were interrupted, --resume continues them"


def tied(found: Finished) -> str | None:
    """A sentence if all of several trials have the same value."""
    values = [found.value(one) for one in found.ranked()]
    if len(values) < 2 or len(set(values)) > 1:
        return None
    return f"all {len(values)} trials have the same value: trainings are too short, or the metric too coarse, to tell them apart"


def as_good(found: Finished) -> str | None:
    """A sentence if other trials have the best one's value: which of them is the best."""
    first, *others = found.ranked()
    same = [one for one in others if one.value == first.value]
    if not same or tied(found):
        return None
    numbers = [str(one.number) for one in same]
    also = " and ".join(filter(None, (", ".join(numbers[:-1]), numbers[-1])))
    by = ["lower loss"] * ("loss" in first.attributes) + ["fewer FLOPs", "less memory"]
    what = f"{found.about['task']['primary']} {first.value:.5g}"
    return f"{'trial' if len(same) == 1 else 'trials'} {also} reached {what}, too: {', then '.join(by)} decides"


def none_better(found: Finished) -> str | None:
    """A sentence if no placement with replacements, in the finals once they are done, is better than the unmodified model."""
    ends = [(arm["placement"], statistics.fmean(arm["values"])) for arm in found.compared()]
    ends = ends or [(one.placement, one.values[0]) for one in found.ranked() if one.values]
    sign = 1 if found.higher_is_better else -1
    plain = [sign * value for layers, value in ends if not layers]
    others = [sign * value for layers, value in ends if layers]
    if not plain or not others or max(others) > max(plain):
        return None
    return "no placement is better than the unmodified model trained equally"


def worse_than_start(found: Finished) -> str | None:
    """A sentence if even the best training, of the finals once they are done, ends worse than the network was before it."""
    start = found.start()
    arms = found.compared()
    ends = [statistics.fmean(arm["values"]) for arm in arms] or [one.values[0] for one in found.ranked() if one.values]
    sign, way = (1, "below") if found.higher_is_better else (-1, "above")
    if start is None or not ends or any(sign * (value - start) >= 0 for value in ends):
        return None
    return (
        f"all {'finals' if arms else 'trials'} end {way} the network as it was ({found.about['task']['primary']} {start:.5g}): "
        "this training makes it worse, so their order says little about what a conversion brings. Longer --steps, a smaller --lr"
    )


def few_samples(found: Finished) -> str | None:
    """A sentence if few samples judge the trials; None, too, for a search that does not record their number."""
    samples, primary = found.about["task"].get("val_samples"), found.about["task"]["primary"]
    if not isinstance(samples, int) or samples < 1:
        return None
    one = f"each is {100 / samples:.2g} points of {primary}, and " if primary in COUNTS else ""
    return few_judge(samples, f"{one}the order of trials says little of other images", least=enough(primary))


def status_lines(found: Finished, count: int = 5) -> list[str]:
    """The summary as lines of text."""
    values, rank = status_values(found, count), rank_correlation(found)
    states = ", ".join(f"{number} {state}" for state, number in sorted(values["trials"].items()))
    workers = values["workers"]
    running = f"; {counted(workers, 'worker')} running" if workers else ""
    lines = [
        paragraph(f"{values['model']} on {values['task']['name']}: {values['budgets']}", hang="  "),
        f"trials: {states or 'none yet'}{running}",
    ]
    if not found.begun:
        told = "what each replacement gains is estimated before the first trial; if that was killed, start the search again"
        lines.append(paragraph(f"note: {told}", hang="  "))
    if rank is not None:
        lines.append(f"rank correlation of the expected gain ({found.about['gains']}) with the values: {rank}")
    rows = [_row(found, one) for one in found.ranked()[:count]]
    original = found.original()
    if original is not None and original not in found.ranked()[:count]:
        rows.append(_row(found, original))
    primary, start = found.about["task"]["primary"], found.start()
    if rows and start is not None:
        rows.append(["-", "untrained", f"{start:.5g}", "0", "+0.0%", "+0.0%"])
    if rows:
        lines += ["", table(["trial", "from", primary, "replaced", "FLOPs", "params"], rows, left=2)]
    lines += [paragraph(f"note: {told}", hang="  ") for told in notes(found)]
    if found.front:
        front = [_row(found, one) for one in found.records if one.number in found.front]
        what = ", ".join([primary, *found.about["objectives"][1:]])
        lines += [
            "",
            f"Pareto front ({what}):",
            table(["trial", "from", primary, "replaced", "FLOPs", "params"], front, left=2),
        ]
    if found.finals is not None:
        lines += ["", *finals_lines(found.finals, primary)]
    return lines


def _row(found: Finished, one: Record) -> list[str]:
    return [
        str(one.number),
        str(one.source),
        f"{found.value(one):.5g}",
        str(len(one.placement)),
        *(relative(found, one, name) for name in ("flops", "params")),
    ]


def relative(found: Finished, one: Record, name: str) -> str:
    """A trial's cost relative to the original's, in percent."""
    if name not in one.costs:
        return "-"
    return f"{one.costs[name] / found.about['original'][name] - 1:+.1%}"


def finals_lines(finals: Mapping[str, Any], primary: str) -> list[str]:
    """The table of the final stage."""
    rows = []
    for arm in finals["arms"]:
        mean, spread = mean_and_spread(arm["values"])
        told = [mean, spread] if arm["values"] else [arm["why_not"] or UNDONE, "-"]
        rows.append([arm["role"], str(arm["trial"]), str(len(arm["placement"])), *told])
    head = f"finals: {counted(finals['steps'], 'step')}, {counted(finals['seeds'], 'seed')}"
    return [head, table(["arm", "trial", "replaced", primary, "sd"], rows)]


UNDONE = "not done yet"  # of an arm of the finals


def mean_and_spread(values: Sequence[float]) -> tuple[str, str]:
    """Mean and standard deviation as text."""
    if not values:
        return "-", "-"
    spread = f"{statistics.stdev(values):.2g}" if len(values) > 1 else "-"
    return f"{statistics.fmean(values):.5g}", spread
