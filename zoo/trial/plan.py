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
_SHALLOW = frozenset({"pattern-detection", "super-resolution", "demosaicking", "sad", "denoising", "real-denoising"})
_OTHERWISE = "classification"  # the task whose layer is tried on those of no paper


def default_conversion(task: str) -> tuple[str, tuple[str, ...]]:
    """The layer type of the paper that is on the task, and the selections in the order in which they are tried."""
    kinds = {name: kind for kind in layer_types() for name in layer_class(kind).tasks}
    return kinds.get(task, kinds[_OTHERWISE]), ("all",) if task in _SHALLOW else _DEEP


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
    levers: Levers | None = None,
) -> TrialPlan:
    """The plan for `seconds` and three seeds. Raises `ConfigError`, with the `levers`, if that is too little for any comparison.

    `train` and `val` are the sizes of the splits, `batch` is samples per step. `steps` fixes the number of steps: then fewer
    pairs than three are planned where three do not fit, at least one.
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
        each = max(int(_EVALUATION * budget / speed.sample / 2), 1) if speed.sample > 0 else val
        choose, judge = (min(half, each) for half in (halves if len(tried) > 1 else (0, val)))
        left = budget - speed.run - speed.sample * (max(choose, 1) + judge)
        found = int(left / speed.step)
        if found >= least:
            return TrialPlan(steps=steps or min(found, most), rates=tried, choose=choose, judge=judge)
    fewest = steps or FEWEST_STEPS
    training = fewest * speed.step + speed.run
    needed = LEAST_SEEDS * max(training / (1 - _EVALUATION), training + 2 * speed.sample) / _SPARE
    raise too_little(seconds, needed, fewest, LEAST_SEEDS, levers)


def time_to_judge(samples: int, speed: Speed, rates: int) -> float:
    """Seconds of training for which the plan of a trial of this number of rates has `samples` to judge."""
    return 2 * samples * speed.sample * (rates + LEAST_SEEDS - 1) / _EVALUATION / _SPARE
