"""Result of a trial: paired differences over seeds, the cost of the conversion, and a one-sentence summary."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from surgeon.util.few import COUNTS
from surgeon.util.tables import count, counted, duration, paragraph, table
from surgeon.zoo.finetune.state import finite

ARMS = ("original", "converted")
LEAST_SEEDS = 3  # for a verdict
SHARES = ("top1", "miou")  # at most 1
UNITS = {"top1": ("points of top-1", 100.0), "miou": ("points of mIoU", 100.0), "psnr": ("dB", 1.0)}


def with_error(value: float, error: float | None) -> str:
    """A difference and its error to the same decimals: the error to two digits."""
    if not error or not math.isfinite(error):
        return f"{value:+.3g}" + ("" if error is None else f" ± {error:.2g}")
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:+.{decimals}f} ± {error:.{decimals}f}"


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def by_chance(seeds: int) -> float:
    """How often a mean of normal differences around 0 is beyond two standard errors: Student's t."""
    from scipy.stats import t

    return float(2 * t.sf(2, seeds - 1))


def tied(gains: Sequence[float]) -> bool:
    """Whether all are equal but for rounding: counts of few samples are too coarse, and a standard error of 0 measures nothing."""
    return max(gains) - min(gains) <= 1e-9


def verdict(gains: Sequence[float]) -> str:
    """ "won" or "lost" beyond two standard errors of at least three seeds, otherwise "undecided"; gains: more is better.

    Undecided, too, if they are `tied`.
    """
    error = standard_error(gains)
    if error is None or len(gains) < LEAST_SEEDS or tied(gains) or abs(statistics.fmean(gains)) <= 2 * error:
        return "undecided"
    return "won" if statistics.fmean(gains) > 0 else "lost"


@dataclass(frozen=True, kw_only=True)
class ArmCost:
    """Cost of one arm. FLOPs per image (1 MAC = 2 FLOPs; None: not countable), parameters, seconds per training step."""

    flops: int | None
    params: int
    step_seconds: float


@dataclass(kw_only=True)
class Answer:
    """Result of `surgeon try`. Scores are on the judging images, in the metric's own unit, by arm, one per seed of `seeds`."""

    model: str
    task: str
    primary: str
    higher_is_better: bool
    becomes: str  # layers, type and options
    replaced: int
    steps: int
    epochs: float
    batch_size: int
    samples: dict[str, int]  # train, val; choose and judge: those of val that were used
    rates: dict[str, float]  # by arm
    swept: dict[str, dict[str, float | None]]  # by arm: what the choosing images say, by rate
    seeds: list[int]
    scores: dict[str, list[float]]
    costs: dict[str, ArmCost]
    stopped: str  # "seeds" or "time"
    seconds: float
    layers: list[dict[str, Any]] = field(default_factory=list)  # how adaptive the converted network's layers became
    start: float | None = None  # of the network before any training; None: there was no time to measure it
    notes: list[str] = field(default_factory=list)
    size: list[int] = field(default_factory=list)  # (C, H, W) of the image that the FLOPs are of
    images: str | None = None  # how the inputs were made of them
    more_time: float | None = None  # seconds in all for the seeds of an answer; None if time was no limit

    def ends_below_start(self) -> bool:
        """Whether both networks are worse after training than the network was before, on average over the seeds."""
        sign = 1.0 if self.higher_is_better else -1.0
        ends = [statistics.fmean(scores) for scores in self.scores.values() if scores]
        return self.start is not None and bool(ends) and all(sign * (end - self.start) < 0 for end in ends)

    @property
    def cut(self) -> bool:
        """Whether validation samples were left out, for lack of time."""
        return self.samples["choose"] + self.samples["judge"] < self.samples["val"]

    @property
    def unit(self) -> str:
        """Unit of gains, in words."""
        return UNITS.get(self.primary, (self.primary, 1.0))[0]

    @property
    def scale(self) -> float:
        """Factor from the metric to the unit of gains."""
        return UNITS.get(self.primary, (self.primary, 1.0))[1]

    @property
    def gains(self) -> list[float]:
        """Paired differences by seed in `unit`; more is better, whichever way the metric points."""
        sign = self.scale if self.higher_is_better else -self.scale
        pairs = zip(self.scores["converted"], self.scores["original"], strict=True)
        return [sign * (mine - other) for mine, other in pairs]

    @property
    def gain(self) -> float | None:
        """Mean of the paired differences."""
        return statistics.fmean(self.gains) if self.gains else None

    @property
    def error(self) -> float | None:
        """Standard error of `gain`."""
        return standard_error(self.gains)

    @property
    def verdict(self) -> str:
        """won, lost or undecided: that, too, if both networks end worse than they started."""
        return "undecided" if self.coarse or self.ends_below_start() else verdict(self.gains)

    @property
    def outcome(self) -> str:
        """The verdict, with "no gain seen" where seeds and samples suffice for a bound, as in the sentence."""
        few = len(self.gains) < LEAST_SEEDS or tied(self.gains) or self.coarse
        return self.verdict if few or self.verdict != "undecided" or self.ends_below_start() else "no gain seen"

    @property
    def step(self) -> float:
        """The weight of one judging sample in `unit`: a share cannot move by less. 0 for other metrics."""
        return self.scale / max(self.samples["judge"], 1) if self.primary in COUNTS else 0.0

    @property
    def coarse(self) -> bool:
        """Whether gain and error together are less than one judging sample counts."""
        return self.error is not None and abs(self.gain or 0.0) + 2 * self.error < self.step

    def factor(self, what: str) -> float | None:
        """Ratio of a cost, converted to original; None if one of them is unknown."""
        before, after = (getattr(self.costs[arm], what) for arm in ARMS)
        return after / before if before and after is not None and math.isfinite(after / before) else None

    def sentence(self) -> str:
        """The answer in one sentence."""
        flops, time = self.factor("flops"), self.factor("step_seconds")
        costs = [] if flops is None else [f"x{flops:.2f} FLOPs"]
        costs += [] if time is None else [f"x{time:.2g} time a step"]
        return f"{self._gain_told()}, costs {', '.join(costs)}"

    def _gain_told(self) -> str:
        count_, error = len(self.gains), self.error
        seeds = counted(count_, "seed")
        if self.gain is None:
            return "no answer: not one pair was trained to its end"
        found = with_error(self.gain, error)
        if self.verdict == "won":
            return f"gain {found} {self.unit} ({seeds})"
        if self.verdict == "lost":
            return f"loss {found} {self.unit} ({seeds})"
        if self.ends_below_start():
            return f"undecided: both end worse than untrained, {found} {self.unit} apart ({seeds})"
        if error is None or count_ < LEAST_SEEDS:
            return f"undecided: {found} {self.unit} with {seeds}, an answer takes {LEAST_SEEDS}"
        if tied(self.gains):
            judge = self.samples["judge"]
            why = (
                f"both are right on {'the' if judge == 1 else 'all'} {counted(judge, 'judging sample')}"
                if self.perfect
                else f"{counted(judge, 'judging sample')} {'is' if judge == 1 else 'are'} too few to tell"
            )
            return f"undecided: {self.gain:+.3g} {self.unit} with each of {seeds}; {why}"
        if self.coarse:
            of = counted(self.samples["judge"], "judging sample")
            return f"undecided: {found} {self.unit} ({seeds}); of {of}, one is {self.step:.2g} {self.unit}"
        return f"no gain seen beyond ± {2 * error:.2g} {self.unit} ({found}, {seeds})"

    @property
    def perfect(self) -> bool:
        """Whether both networks have the best value of their metric, with every seed."""
        return self.primary in SHARES and all(score == 1.0 for scores in self.scores.values() for score in scores)

    def meaning(self) -> str:
        """The verdict in a sentence, and what would help where there is none."""
        if self.verdict != "undecided":
            better = "better" if self.verdict == "won" else "worse"
            return f"The converted network is {better}, beyond two standard errors of the paired differences."
        if self.ends_below_start():
            return "Training made both networks worse, which tells nothing about the conversion: longer, or at a smaller rate."
        if len(self.gains) < LEAST_SEEDS:
            return f"Too few seeds to tell: an answer takes {LEAST_SEEDS}."
        if self.perfect:
            return "Nothing is left to gain on these images: harder ones could tell the networks apart, longer training cannot."
        if self.coarse:
            return "The difference is less than one judging sample: more of them could tell."
        if tied(self.gains):
            return "All seeds differ by the same amount, which measures no error: more judging images could tell."
        return "No difference was seen beyond two standard errors; more seeds or longer training may show one, or not."

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; NaN and infinity become null."""
        found = {"gain": self.gain, "standard_error": self.error, "unit": self.unit, "verdict": self.outcome}
        factors = {what: self.factor(what) for what in ("flops", "params", "step_seconds")}
        values: dict[str, Any] = finite(
            {"answer": self.sentence(), **found, "gains": self.gains, "factors": factors, **asdict(self)}
        )
        return values

    def to_text(self, width: int = 80) -> str:
        """The sentence, a table, and the method of comparison."""
        rows = []
        for arm in ARMS:
            scores, cost = self.scores[arm], self.costs[arm]
            shown = f"{statistics.fmean(scores):.5g}" if scores else "-"
            rate = f"{self.rates[arm]:.3g}" if arm in self.rates else "-"
            rows.append((arm, shown, rate, count(cost.params), count(cost.flops), duration(cost.step_seconds)))
        if self.start is not None:
            rows.append(("untrained", f"{self.start:.5g}", "-", "", "", ""))
        head = paragraph(f"{self.model} on {self.task}: {self.sentence()}", width=width, hang="  ")
        body = table(("", self.primary, "rate", "params", "FLOPs", "a step"), rows, width=width)
        lines = [paragraph(line, width=width, hang="  ") for line in (*how(self), *(f"note: {n}" for n in self.notes))]
        return "\n".join([head, "", body, "", *lines]) + "\n"


def how(answer: Answer) -> list[str]:
    """The method of comparison, in sentences."""
    samples, arrow = answer.samples, "higher" if answer.higher_is_better else "lower"
    lines = [
        f"converted: {answer.becomes}, {counted(answer.replaced, 'layer')}",
        f"trained: both {counted(answer.steps, 'step')} ({answer.epochs:.2g} epochs) of {answer.batch_size}, "
        f"from {counted(samples['train'], 'sample')}, the same order for the same seed",
        *([] if answer.images is None else [f"images: {answer.images}"]),
        f"rates: {_rates(answer.swept)}",
        f"judged: {answer.primary} ({arrow} is better) of the last weights on {counted(samples['judge'], 'sample')}"
        + (f" of {samples['val']}" if answer.cut else "")
        + (f"; {counted(samples['choose'], 'other')} chose the rates" if samples["choose"] else ""),
    ]
    if answer.verdict != "undecided":
        seeds = len(answer.gains)
        lines.append(
            f"decided: beyond two standard errors, which {seeds} seeds of equal networks exceed by chance in "
            f"{100 * by_chance(seeds):.0f} of 100 trials"
        )
    if answer.size:
        lines.append(f"FLOPs: of one image of {'x'.join(map(str, answer.size))}")
    return lines


def _rates(swept: Mapping[str, Mapping[str, float | None]]) -> str:
    rates = list(dict.fromkeys(rate for values in swept.values() for rate in values))
    if len(rates) == 1:
        return f"{rates[0]} for both"
    return f"{', '.join(rates)} tried for each with seed 0, the best of each taken"
