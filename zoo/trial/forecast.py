"""The forecast of a trial, told before its first run: seeds and judging samples in its time, and the time for an answer."""

from typing import TYPE_CHECKING

from surgeon.util.few import enough
from surgeon.util.tables import counted, duration
from surgeon.zoo.trial.answer import ARMS, LEAST_SEEDS
from surgeon.zoo.trial.plan import END, time_to_judge
from surgeon.zoo.trial.speed import RESUMED, SLACK, minutes

if TYPE_CHECKING:
    from surgeon.zoo.trial.run import Trial


def planned(trial: "Trial") -> str:
    """The plan: what is trained and judged, what that will say, and the time that takes an answer."""
    plan, left = trial.plan, f"of the {duration(trial.left)} left" if trial.left > 0 else "and no time is left"
    takes = pair(trial)
    if trial.scores:
        done = f"{counted(len(trial.scores), 'run')} of {plan.steps} steps {'is' if len(trial.scores) == 1 else 'are'} done"
        return f"resuming: {done}; another pair takes about {duration(takes)} {left}"
    rates = f"rate{'s' * (len(plan.rates) > 1)} {', '.join(f'{rate:g}' for rate in plan.rates)}"
    whole = len(trial.task.dataset("val"))
    of = f" of {whole}" if plan.choose + plan.judge < whole else ""
    told = f"plan: {counted(plan.steps, 'step')} per run, {rates}; a pair takes about {duration(takes)} {left}"
    told += (
        f" ({duration(trial.spent)} went to loading, converting and timing)" if trial.spent > END * trial.left else ""
    )
    told += f"; {counted(plan.judge, 'sample')}{of} judge{'s' * (plan.judge == 1)}"
    if (more := time_for_judging(trial)) is not None:
        told += f", --max-time {more[1]} takes {more[0]}"
    seeds = min(max(int(trial.left / takes) - len(plan.rates) + 1, 1), trial.config.seeds)
    told += f"; this gives about {counted(seeds, 'seed')}"
    if seeds >= LEAST_SEEDS:
        return told
    told += f", and an answer takes {LEAST_SEEDS}: "
    needed = trial.spent + SLACK * (LEAST_SEEDS + len(plan.rates) - 1) * takes
    return told + (f"--max-time {minutes(needed / (1 - END))}" if trial.config.seeds >= LEAST_SEEDS else "--seeds 3")


def pair(trial: "Trial") -> float:
    """Expected seconds of a pair of runs."""
    return trial.expected([(arm, 0.0, 0) for arm in ARMS])


def untried(trial: "Trial") -> list[float]:
    """The planned rates with which no pair was trained."""
    tried = [{row["rate"] for row in trial.scores.values() if row["arm"] == arm} for arm in ARMS]
    return [rate for rate in trial.plan.rates if not all(rate in rates for rates in tried)]


def time_for_seeds(trial: "Trial", seeds: int) -> float:
    """Seconds for all sessions in which one more pair ends, or as many as an answer takes, after a start like this; ample."""
    rates = len(untried(trial))
    pairs = rates + LEAST_SEEDS - 1 if rates else max(LEAST_SEEDS - seeds, 1)
    takes = trial.short[1] if trial.short else pair(trial)
    return (trial.spent + RESUMED * (trial.setup + pairs * takes)) / (1 - END)


def time_for_judging(trial: "Trial") -> tuple[int, str] | None:
    """A number of judging samples that is enough, or all, and the time for it; None if time is not what limits them."""
    whole, rates = len(trial.task.dataset("val")), len(trial.config.rates)
    most = min(whole - whole // 2 if rates > 1 else whole, enough(trial.task.primary))
    if trial.plan.choose + trial.plan.judge >= whole or most <= trial.plan.judge:
        return None
    needed = time_to_judge(most, trial.speed, rates, trial.config.seeds, trial.config.steps)
    takes = ((trial.setup or trial.spent) + SLACK * needed) / (1 - END)
    return most, minutes(max(takes, trial.config.max_time + 60))
