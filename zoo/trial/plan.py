"""Default conversion of a task, and the steps, rates and seeds that fit into a time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from surgeon.layers.registry import layer_class, layer_types
from surgeon.zoo.trial.answer import LEAST_SEEDS
from surgeon.zoo.trial.speed import FEWEST_STEPS, Levers, Speed, too_little

RATES = (1e-4, 3e-4, 1e-3)  # a third and three times the default of fine-tuning
LEAST_STEPS = 20  # fewer say little
MOST_EPOCHS = 10.0
END = 0.05  # share of the time for counting costs and writing the report
_SPARE = 0.9  # share of the time that is planned; step times vary
_EVALUATION = 0.2  # largest share of the time for evaluations

# Selections in the order in which they are tried, by task; late stages cost least.
_DEEP = ("stage3,stage4", "stage2", "stage1", "all")
_SHALLOW = frozenset({"pattern-detection", "demosaicking", "sad", "denoising", "real-denoising"})
_AT_THE_END = frozenset({"super-resolution"})  # where gains were seen: docs/gains.md
_OTHERWISE = "classification"  # the task whose layer is tried on those of no paper


def default_conversion(task: str) -> tuple[str, tuple[str, ...]]:
    """The layer type of the paper that is on the task, and the selections in the order in which they are tried."""
    kinds = {name: kind for kind in layer_types() for name in layer_class(kind).tasks}
    selections = ("last-spatial", "all") if task in _AT_THE_END else ("all",) if task in _SHALLOW else _DEEP
    return kinds.get(task, kinds[_OTHERWISE]), selections


@dataclass(frozen=True, kw_only=True)
class TrialPlan:
    """`rates` are tried with seed 0; `choose` and `judge` count validation samples (`choose` 0: the judging ones choose)."""

    steps: int
    rates: tuple[float, ...]
    choose: int
    judge: int


def make_plan(
    seconds: float,
    speed: Speed,
    *,
    train: int,
    val: int,
    batch: int,
    rates: Sequence[float],
    steps: int | None = None,
    seeds: int = LEAST_SEEDS,
    levers: Levers | None = None,
) -> TrialPlan:
    """The plan for `seconds` and three seeds. Raises `ConfigError`, with the `levers`, if that is too little for any comparison.

    `train` and `val` are the sizes of the splits, `batch` is samples per step. `steps` fixes the number of steps: then fewer
    pairs than three are planned where three do not fit, at least one. Time that the steps of all `seeds` leave goes to judging.
    """
    halves = (val // 2, val - val // 2) if val > 1 and len(rates) > 1 else (0, val)
    most = max(math.ceil(MOST_EPOCHS * train / batch), LEAST_STEPS)
    one = tuple(rates)[len(rates) // 2 :][:1]
    for tried, pairs, least in (
        (tuple(rates), len(rates) + LEAST_SEEDS - 1, steps or LEAST_STEPS),
        (one, LEAST_SEEDS, steps or FEWEST_STEPS),
        *((one, fewer, steps) for fewer in range(LEAST_SEEDS - 1, 0, -1) if steps),
    ):
        budget = _SPARE * seconds / pairs
        parts = halves if len(tried) > 1 else (0, val)
        choose, judge = _samples(_EVALUATION * budget, speed, parts)
        left = budget - speed.run - speed.sample * (max(choose, 1) + judge)
        found = int(left / speed.step)
        if found >= least:
            found = steps or min(found, most)
            spare = _SPARE * seconds / max(len(tried) + seeds - 1, 1) - speed.run - found * speed.step
            choose, judge = _samples(max(_EVALUATION * budget, spare), speed, parts)
            return TrialPlan(steps=found, rates=tried, choose=choose, judge=judge)
    fewest = steps or FEWEST_STEPS
    training = fewest * speed.step + speed.run
    needed = LEAST_SEEDS * max(training / (1 - _EVALUATION), training + 2 * speed.sample) / _SPARE
    raise too_little(seconds, needed, fewest, LEAST_SEEDS, levers)


def _samples(seconds: float, speed: Speed, parts: tuple[int, int]) -> tuple[int, int]:
    """The samples of both parts that are evaluated in `seconds`; a run without those that choose evaluates one, too."""
    most = seconds / speed.sample if speed.sample > 0 else math.inf
    each = max(most / 2 if parts[0] else most - 1, 1)
    return math.floor(min(each, parts[0])), math.floor(min(each, parts[1]))


def time_to_judge(samples: int, speed: Speed, rates: int, seeds: int, steps: int | None) -> float:
    """Seconds of training for which the plan of a trial with these options has `samples` to judge."""
    evaluation = (2 * samples if rates > 1 else samples + 1) * speed.sample
    least = (rates + LEAST_SEEDS - 1) / _SPARE
    if steps is None:
        return least * evaluation / _EVALUATION
    training = speed.run + steps * speed.step
    return max(least * training / (1 - _EVALUATION), (rates + seeds - 1) / _SPARE * (training + evaluation))
