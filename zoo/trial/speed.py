"""How long the training steps of both networks take on this machine, and what to change where the time is too short for them."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from surgeon.errors import ConfigError
from surgeon.util.tables import duration

FEWEST_STEPS = 8  # fewer say nothing
_LEAST_SIDE = 32  # pixels; smaller images are another task
SLACK = 1.25  # times are those of a first try: another start and other steps take longer or shorter
RESUMED = 2.0  # slack of a resumed trial: a machine that is busier then must not cut its one pair short
_LEAST_BATCH = 2  # a BatchNorm needs two samples
_ROUGH = 0.25  # of a factor: a greater range between its quartiles is told
_APART = 1.1  # what runs and steps in turn may differ by, beyond their ranges


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds, of one network or for both arms together: per training step, per evaluated sample, and the overhead of a run."""

    step: float
    sample: float
    run: float

    def __add__(self, other: "Speed") -> "Speed":
        return Speed(step=self.step + other.step, sample=self.sample + other.sample, run=self.run + other.run)


@dataclass(frozen=True, kw_only=True)
class Levers:
    """Options that make a trial shorter: samples per step, the size (C, H, W) of one, the task's option for it (None: it has none),
    and the steps of a run if they were given.

    `spent` are the seconds before training, which more time has to cover, too, `conversion` says what is converted.
    """

    batch: int
    size: tuple[int, ...]
    option: str | None
    spent: float = 0.0
    steps: int | None = None
    conversion: str = ""

    def told(self, left: float, needed: float) -> str:
        """Options with which `needed` seconds of training fit into the `left` ones, each alone; both together if neither does."""
        share = max(left, 1.0) / needed / SLACK
        found = [f"--max-time {minutes(self.spent + SLACK * needed)}"]
        if self.steps is not None and self.steps * share >= FEWEST_STEPS:
            found.append(f"--steps {int(self.steps * share)}")
        batch, image = self._batch(share), self._image(share)
        found += [one for one in (batch, image) if one is not None]
        if len(found) == 1 and self.batch > _LEAST_BATCH:
            image = self._image(share * self.batch / _LEAST_BATCH)
            found += [] if image is None else [f"--batch-size {_LEAST_BATCH} with {image}"]
        return ", or ".join(found)

    def _batch(self, share: float) -> str | None:
        """The time of a step is proportional to its samples."""
        fits = self.batch * share
        return f"--batch-size {2 ** int(math.log2(fits))}" if fits >= _LEAST_BATCH else None

    def _image(self, share: float) -> str | None:
        """The time of a step is proportional to its pixels."""
        if self.option is None or len(self.size) != 3:
            return None
        side = int(min(self.size[1:]) * math.sqrt(share))
        side -= side % (32 if side >= 64 else 8)
        if side < _LEAST_SIDE:
            return None
        value = str(side) if self.option == "patch" else f"{self.size[0]},{side},{side}"
        return f"--task-option {self.option}={value}"


def minutes(seconds: float) -> str:
    """A time for --max-time that covers these seconds: whole minutes, from two hours on half hours."""
    if seconds > 7200:
        return f"{math.ceil(seconds / 1800) / 2:g}h"
    return f"{max(math.ceil(seconds / 60), 1)}m"


def told_left(seconds: float) -> str:
    """The time left, as the end of a sentence."""
    return f"{duration(seconds)} were left" if seconds > 0 else "none was left"


def too_little(left: float, needed: float, steps: int, seeds: int, levers: Levers | None) -> ConfigError:
    """The error for a time in which no comparison is possible."""
    what = "more time, or a smaller --batch-size" if levers is None else levers.told(left, needed)
    converted = f" (it converts {levers.conversion})" if levers is not None and levers.conversion else ""
    return ConfigError(
        f"--max-time leaves {max(left, 0):.0f} s for training, and {seeds} seeds of {steps} steps of both networks take about "
        f"{math.ceil(needed)} s: give {what}{converted}"
    )


def rounds(step: float) -> int:
    """How many steps of both networks are timed in turn, if one of both takes `step` seconds: about 10 s, at least three."""
    return max(min(int(10 / max(step, 1e-3)), 15), 3)


def told_times(pace: Mapping[str, Sequence[float]], trained: Mapping[str, Sequence[float]]) -> list[str]:
    """Notes where the times of a step contradict each other, as on a machine with other work on it.

    `pace`: seconds by arm of steps timed in turn; `trained`: those of the runs, by seed.
    """
    turns, runs = _factors(pace), _factors(trained)
    notes = []
    if len(turns) > 1:
        low, middle, high = statistics.quantiles(turns, n=4)
        if high - low > _ROUGH * middle:
            told = "other work on this machine slowed some of them"
            notes.append(f"the time of a step is rough: steps in turn took x{low:.2g} to x{high:.2g}, {told}")
    if turns and runs and (runs[0] > _APART * turns[-1] or _APART * runs[-1] < turns[0]):
        told = " to ".join(dict.fromkeys(f"x{factor:.2g}" for factor in (runs[0], runs[-1])))
        why = "the machine was not equally free in all of them; the factor told is that of steps in turn"
        notes.append(f"in the runs a step took {told} the time: {why}")
    return notes


def _factors(seconds: Mapping[str, Sequence[float]]) -> list[float]:
    """Converted to original, from the least to the greatest."""
    pairs = zip(seconds["original"], seconds["converted"], strict=True)
    return sorted(after / before for before, after in pairs if before and after)
