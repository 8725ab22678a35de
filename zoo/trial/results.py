"""The results of a trial: its answer, what it cost, and notes on what limits it."""

import math
import statistics
from typing import TYPE_CHECKING, Any

from surgeon.costs import cost
from surgeon.errors import SurgeonError
from surgeon.util.few import enough, few_judge
from surgeon.util.tables import counted, duration
from surgeon.zoo.trial.answer import ARMS, Answer, ArmCost
from surgeon.zoo.trial.forecast import time_for_judging, time_for_seeds, untried
from surgeon.zoo.trial.plan import END, LEAST_STEPS
from surgeon.zoo.trial.speed import minutes, told_left, told_times

if TYPE_CHECKING:
    from surgeon.zoo.trial.run import Trial


def sum_up(trial: "Trial", stopped: str) -> Answer:
    """The answer from what was judged."""
    rates = {arm: rate for arm in ARMS if (rate := trial.best_rate(arm)) is not None}
    rows = {
        arm: {
            row["seed"]: row
            for row in trial.scores.values()
            if row["arm"] == arm and row["rate"] == rates.get(arm) and row["judged"] is not None
        }
        for arm in ARMS
    }
    seeds = sorted(set(rows["original"]) & set(rows["converted"]))
    done = [row for by_seed in rows.values() for row in by_seed.values()]
    converted = rows["converted"].get(seeds[0], {}) if seeds else {}
    planned: dict[float, float | None] = dict.fromkeys(trial.plan.rates)
    train, val = len(trial.task.dataset("train")), len(trial.task.dataset("val"))
    batch = trial.config.base.batch_size * trial.config.base.accumulate
    answer = Answer(
        model=trial.name,
        task=trial.task.name,
        primary=trial.task.primary,
        higher_is_better=trial.task.higher_is_better,
        becomes=trial.twins.becomes,
        replaced=len(trial.twins.report.replaced),
        steps=trial.plan.steps,
        epochs=done[0]["epochs"] if done else trial.plan.steps * batch / train,
        batch_size=batch,
        samples={"train": train, "val": val, "choose": trial.plan.choose, "judge": trial.plan.judge},
        rates=rates,
        swept={arm: {f"{rate:g}": value for rate, value in (trial.swept(arm) or planned).items()} for arm in ARMS},
        seeds=seeds,
        scores={arm: [rows[arm][seed]["judged"] for seed in seeds] for arm in ARMS},
        costs={arm: _cost(trial, arm, rows[arm]) for arm in ARMS},
        stopped=stopped,
        seconds=trial.spent,
        layers=converted.get("layers", []),
        start=trial.start(trial.left + trial.config.max_time * END / 2) if seeds else None,
        size=list(trial.twins.size),
        images=trial.task.images(),
        more_time=time_for_seeds(trial, len(seeds)) if stopped == "time" else None,
    )
    trained = {arm: [rows[arm][seed]["step_seconds"] for seed in seeds] for arm in ARMS}
    answer.notes = [*_notes(trial, answer), *told_times(trial.pace, trained)]
    return answer


def _cost(trial: "Trial", arm: str, rows: dict[int, dict[str, Any]]) -> ArmCost:
    network = trial.twins.network(arm, 0)
    try:
        flops: int | None = cost(network, input_size=trial.twins.size, mode="infer").flops
    except SurgeonError:
        flops = None
    params = sum(parameter.numel() for parameter in network.parameters())
    times = trial.pace[arm] or [row["step_seconds"] for row in rows.values()]
    return ArmCost(flops=flops, params=params, step_seconds=statistics.median(times) if times else math.nan)


def _notes(trial: "Trial", answer: Answer) -> list[str]:
    told = (trial.twins.given, trial.task.unknown_images(trial.model, trial.base))
    notes = [note for note in told if note is not None]
    if trial.plan.rates != trial.config.rates:
        notes.append(
            "the time is too short to sweep the learning rate: one for both, which may suit one of them better"
        )
    notes += _edges(trial, answer)
    if len(trial.plan.rates) > 1 and not trial.plan.choose:
        notes.append("there are too few validation samples to split: those that chose the rates judge, too")
    one = f"each is {answer.step:.2g} {answer.unit}, and " if answer.step else ""
    few = few_judge(
        trial.plan.judge,
        f"{one}the error is that over seeds, and says nothing of other images",
        least=enough(trial.task.primary),
        **_cut(trial, answer),
    )
    notes += [] if few is None or not answer.seeds else [few]
    failed = [row for row in trial.scores.values() if "failed" in row]
    notes += [f"{row['arm']} at rate {row['rate']:g}, seed {row['seed']}: {row['failed']}" for row in failed]
    if trial.plan.steps < LEAST_STEPS and trial.config.steps is None:
        notes.append(
            f"only {trial.plan.steps} steps fit into the time, which say little: a longer --max-time trains more"
        )
    if answer.stopped == "time":
        done = f"{len(answer.seeds)} of {counted(trial.config.seeds, 'seed')}"
        notes.append(f"{done}: {_time_is_up(trial, answer.more_time or 0.0)}")
    if answer.start is not None and answer.ends_below_start():
        way = "below" if answer.higher_is_better else "above"
        notes.append(
            f"both end {way} the network as it was ({answer.primary} {answer.start:.5g}): longer --max-time, smaller --lr"
        )
    if answer.start is None and answer.seeds:
        notes.append("no time was left to measure the network as it was, before any training")
    if answer.epochs < 1 and answer.seeds:
        notes.append(f"{answer.epochs:.2g} epochs are a short training: what is seen so early need not hold later")
    return notes


def _edges(trial: "Trial", answer: Answer) -> list[str]:
    """A note on the networks whose best rate is at the edge of those tried."""
    edges = []
    for arm, rate in answer.rates.items():
        tried = {row["rate"] for row in trial.scores.values() if row["arm"] == arm}
        beyond = {*tried, *untried(trial)}  # of those that had no time, another note tells
        if len(tried) > 1 and rate in (min(beyond), max(beyond)):
            edges.append(f"{arm}, {rate:g},")
    if not edges:
        return []
    which = "best rate of {} is" if len(edges) == 1 else "best rates of {} are"
    return [f"the {which.format(' and '.join(edges))} at the edge of those tried: --lr takes others"]


def _cut(trial: "Trial", answer: Answer) -> dict[str, Any]:
    """Arguments of `few_judge` if the time limited the judging samples: of how many, and the time that takes more."""
    if not answer.cut:
        return {}
    more = time_for_judging(trial)
    hint = f"the time allowed no more; --force --max-time {more[1]} judges on {more[0]}" if more else None
    return {"whole": answer.samples["val"], "hint": hint}


def _time_is_up(trial: "Trial", longer: float) -> str:
    """Why there is no further pair, and the time that takes one."""
    why = (
        f"another pair takes about {duration(trial.short[1])}, and {told_left(trial.short[0])}"
        if trial.short
        else "a run was cut short"
    )
    lacking = untried(trial)
    rates = (
        f"tries rate{'s' * (len(lacking) > 1)} {', '.join(f'{rate:g}' for rate in lacking)}, which had no time, and "
    )
    told = rates if lacking and trial.scores else ""
    return f"the time is up ({why}): --resume --max-time {minutes(longer)} {told}trains more seeds"
