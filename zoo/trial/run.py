"""A trial from start to finish: convert, time both networks, plan, train pairs of runs, judge, summarize."""

import dataclasses
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgeon.errors import ConfigError, TrainingError
from surgeon.models.weights import state_sha256
from surgeon.records.recipe import BaseModel
from surgeon.surgery.rewrite import dynamic_layers
from surgeon.util.copying import copy_model
from surgeon.util.outputs import RUN
from surgeon.util.tables import counted, duration
from surgeon.visualize.adaptivity import Adaptivity
from surgeon.zoo.evaluate import evaluate
from surgeon.zoo.finetune import FinetuneConfig, Source, finetune
from surgeon.zoo.finetune.devices import make_accelerator
from surgeon.zoo.finetune.pace import paced
from surgeon.zoo.tasks import Task, better
from surgeon.zoo.tasks.data.fingerprint import fingerprint
from surgeon.zoo.trial.answer import ARMS, Answer
from surgeon.zoo.trial.folder import TryFolder
from surgeon.zoo.trial.forecast import planned
from surgeon.zoo.trial.parts import part_of
from surgeon.zoo.trial.plan import END, TrialPlan, make_plan
from surgeon.zoo.trial.results import sum_up
from surgeon.zoo.trial.speed import Levers, Speed, rounds
from surgeon.zoo.trial.twins import TryConfig, Twins

Tell = Callable[[str], None]
MakeTask = Callable[[int], Task]  # by seed


class TrialInterrupted(KeyboardInterrupt):
    """The trial was interrupted, and can be resumed."""


def try_conversion(
    model: nn.Module,
    make_task: MakeTask,
    output: str | Path,
    config: TryConfig | None = None,
    *,
    name: str = "model",
    base: BaseModel | None = None,
    resume: bool = False,
    force: bool = False,
    quiet: bool = True,
    tell: Tell | None = None,
    began: float | None = None,
) -> Answer:
    """Train a model and its conversion alike, and report what the conversion gains and costs.

    `make_task` returns the task with a seed's random numbers. `output` becomes a folder with the answer, a report page and
    the best converted network; `resume` continues the trial there, with a longer `max_time` or more `seeds` if given.
    `began`: when the time began to run, by `time.monotonic()` (None: now).
    Raises `ConfigError`, `DataError`, `CheckpointError`, and, when asked to stop, `TrialInterrupted` if `output` can be resumed,
    otherwise `KeyboardInterrupt`.
    """
    config, tell = config or TryConfig(), tell or (lambda text: None)
    folder = TryFolder(Path(output))
    folder.check(resume=resume, force=force)
    if dynamic_layers(model):
        raise ConfigError(
            "a trial starts from a plain model, and this one has dynamic layers: surgeon revert makes it one"
        )
    trial = Trial(model, make_task, folder, config, name, base, quiet, tell)
    trial.started = trial.started if began is None else began
    with ExitStack() as stack:
        if folder.path.exists():
            stack.enter_context(folder.hold(begin=False))
        try:
            trial.prepare(stack, resume=resume)
            return trial.run()
        except KeyboardInterrupt as stop:
            raise (TrialInterrupted if trial.ready else KeyboardInterrupt) from stop
        finally:
            trial.note_time()


class Trial:
    """One session of a trial."""

    def __init__(
        self,
        model: nn.Module,
        make_task: MakeTask,
        folder: TryFolder,
        config: TryConfig,
        name: str,
        base: BaseModel | None,
        quiet: bool,
        tell: Tell,
    ) -> None:
        self.model, self.make_task, self.folder, self.config = model, make_task, folder, config
        self.name, self.base, self.quiet, self.tell = name, base, quiet, tell
        self.started, self.before = time.monotonic(), 0.0  # of this session; seconds of earlier ones
        self.setup = 0.0  # seconds of this session before its first run
        self.run_started: float | None = None
        self.run_before = 0.0  # seconds that earlier sessions spent on the unfinished run
        self.device = make_accelerator(config.base).device
        self.task = make_task(0)
        self.ready = False
        self.short: tuple[float, float] | None = (
            None  # seconds left, and what a pair takes, where no further one fitted
        )
        self.scores: dict[str, dict[str, Any]] = {}
        self.pace: dict[str, list[float]] = {arm: [] for arm in ARMS}  # seconds of steps timed in turn

    @property
    def spent(self) -> float:
        """Seconds spent over all sessions."""
        return self.before + time.monotonic() - self.started

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.config.max_time * (1 - END) - self.spent

    def note_time(self) -> None:
        """Save for the next session: total seconds, and those of the unfinished run."""
        running = 0.0 if self.run_started is None else time.monotonic() - self.run_started
        if self.ready:
            self.folder.write(self.folder.clock, {"seconds": self.spent, "run": self.run_before + running})

    # --- before ---------------------------------------------------------------------------------------------------

    def prepare(self, stack: ExitStack, *, resume: bool) -> None:
        """Check the data, convert, and plan; or read the plan of the trial to resume.

        A new plan is made if no pair was trained to its end, and there is more time now, or too little for the pair.
        A new folder is created only then, and locked on the stack.
        """
        new = not self.folder.path.exists()
        self.tell("looking through the data")
        self.task.check()
        self.tell("converting")
        self.twins = Twins(self.model, self.task, self.config)
        self.tell(f"converting {self.twins.told}")
        if self.twins.given is not None:
            self.tell(f"WARNING: {self.twins.given}")
        for line in self.task.told_images(self.model, self.base):
            self.tell(line)
        identity, data = self._identity(), fingerprint(self.task)
        if resume:
            old = self.folder.read()
            self.folder.compare(old, identity, data)
            (self.before, self.run_before), self.scores = self.folder.spent(), self.folder.read_scores()
            self.plan = TrialPlan(**{**old["plan"], "rates": tuple(map(float, old["plan"]["rates"]))})
            self.speed, self.pace = Speed(**old["speed"]), old["pace"]
        if not resume or self._outgrown(old.get("max_time", 0.0)):
            self.tell("measuring a training step of both")
            self.speed = self._measure()
            before, self.plan = self.plan if resume else None, self._plan(self.speed)
            if new:
                stack.enter_context(self.folder.hold(begin=True))
            plan = asdict(self.plan) | {"rates": list(self.plan.rates)}
            record = {"identity": identity, "data": data, "plan": plan, "speed": asdict(self.speed)}
            record["pace"] = self.pace
            if self.plan != before:
                self.scores, self.run_before = {}, 0.0
            self.folder.create(record | {"max_time": self.config.max_time}, new=new, keep=self.plan == before)
        self.ready = True
        self.tell(planned(self))

    def _outgrown(self, planned: float) -> bool:
        """Whether the plan of the resumed trial, made for `planned` seconds, does not fit, and no finished pair depends on it."""
        first = [[(arm, rate, 0) for arm in ARMS] for rate in self.plan.rates]
        if any(all(_key(*one) in self.scores for one in pair) for pair in first):
            return False
        lacking = [one for one in first[0] if _key(*one) not in self.scores]
        return self.config.max_time > planned or self.left < self.expected(lacking) - self.run_before

    def _plan(self, speed: Speed) -> TrialPlan:
        """The plan for the time left. Raises `ConfigError` if that is too short."""
        return make_plan(
            self.left,
            speed,
            train=len(self.task.dataset("train")),
            val=len(self.task.dataset("val")),
            batch=self.config.base.batch_size * self.config.base.accumulate,
            rates=self.config.rates,
            steps=self.config.steps,
            seeds=self.config.seeds,
            levers=self._levers(),
        )

    def _levers(self) -> Levers:
        """Options that would make the trial shorter."""
        options = {field.name for field in dataclasses.fields(self.task.config)}
        option = "patch" if "patch" in options else "input_size" if "val" in options else None
        return Levers(
            batch=self.config.base.batch_size,
            size=self.twins.size,
            option=option,
            spent=self.spent / (1 - END),
            steps=self.config.steps,
            conversion=self.twins.told,
        )

    def _identity(self) -> dict[str, Any]:
        """Settings that must be the same on resume."""
        config, free = self.config, ("workers", "log_every", "max_time", "device")
        options = {key: _plain(value) for key, value in dataclasses.asdict(self.task.config).items()}
        return {
            "model": self.name,
            "model options": {key: _plain(value) for key, value in self.base.kwargs.items()} if self.base else {},
            "weights": state_sha256(self.model),
            "task": self.task.name,
            "task options": {key: value for key, value in options.items() if key not in ("data", "train", "val")},
            "conversion": self.twins.asked if config.recipe is None else config.recipe.to_dict()["rules"],
            "layer options": config.options,
            "rates": list(config.rates),
            "steps": config.steps,
            "training": {key: value for key, value in config.base.to_dict().items() if key not in free},
        }

    def _measure(self) -> Speed:
        """The speed of both on this machine. Raises `ConfigError` as soon as it is clear that the time is too short."""
        batch = min(self.config.base.batch_size, max(len(self.task.dataset("val")), 1))
        task, speeds = part_of(self.task, 0, 1, batch), list[Speed]()
        for arm in ARMS:
            network = self.twins.network(arm, 0)
            speeds.append([self._probe(network, task, 1) for _ in range(2)][-1])  # the first one warms up
            both = speeds[0] + speeds[-1]
            self._plan(both)  # the converted network is taken to be as fast until it is timed, too
        self._time_in_turn(task, rounds(both.step))
        return replace(both, step=sum(map(statistics.median, self.pace.values()))) if self.pace["original"] else both

    def _time_in_turn(self, task: Task, count: int) -> None:
        """Time steps of both networks in turn, so that other work on the machine does not slow one of them alone."""
        config = self.training(rate=min(self.config.rates), seed=0, steps=count + 1, limit=None)
        with suppress(torch.OutOfMemoryError):  # each alone may fit
            times = paced([self.twins.network(arm, 0) for arm in ARMS], task, config, rounds=count)
            self.pace = dict(zip(ARMS, times, strict=True))
        for arm, seconds in self.pace.items():
            if seconds:
                self.tell(f"a step of the {arm} network takes about {duration(statistics.median(seconds))}")

    def _probe(self, network: nn.Module, task: Task, steps: int) -> Speed:
        """The speed of one network, from a run of this number of steps."""
        config = self.training(rate=min(self.config.rates), seed=0, steps=steps, limit=None)
        began = time.monotonic()
        summary = finetune(network, task, config, known_start={task.primary: math.nan}).summary
        training, evaluation = summary.seconds, summary.result.seconds
        rest = max(time.monotonic() - began - training - evaluation, 0.0)
        return Speed(step=training / steps, sample=evaluation / len(task.dataset("val")), run=rest)

    def training(self, *, rate: float, seed: int, steps: int, limit: float | None) -> FinetuneConfig:
        """Options of a run, the same for both networks."""
        changes: dict[str, Any] = {"lr": rate, "seed": seed, "max_steps": steps, "max_time": limit}
        changes |= {"epochs": None, "keep": "last", "eval_every": "100%"}  # its last weights are judged
        return replace(self.config.base, **changes)

    def judge(self, network: nn.Module, task: Task, layers: list[Adaptivity] | None = None) -> float:
        """The primary metric on the task's validation samples."""
        base = self.config.base
        found = evaluate(
            network,
            task,
            batch_size=base.eval_batch_size or base.batch_size,
            device=self.device,
            amp=base.amp_dtype,
            workers=base.workers,
            layers=layers,
        )
        return float(found[task.primary])

    def start(self, seconds: float) -> float | None:
        """The metric of the network before any training on the judging samples, if it is known or can be measured in `seconds`."""
        if (known := self.folder.read_start()) is not None:
            return known
        if seconds < self.speed.sample / 2 * self.plan.judge:
            return None
        found = self.judge(self.twins.network("original", 0), self.parts(self.task)[1])
        if not math.isfinite(found):
            return None
        self.folder.write(self.folder.start, {"judged": found})
        return found

    # --- pairs of runs --------------------------------------------------------------------------------------------

    def run(self) -> Answer:
        """Train what the time allows, and summarize."""
        stopped, self.setup = "seeds", self.spent - self.before
        if (start := self.start(END * self.left)) is not None:
            judge = counted(self.plan.judge, "sample")
            self.tell(f"untrained: {self.task.primary} {start:.4g} (on {judge} for judging)")
        for number, pair in enumerate(self._pairs()):
            lacking = [one for one in pair if _key(*one) not in self.scores]
            if not lacking:
                continue
            takes = self.expected(lacking) - self.run_before
            if number and self.left < takes:
                stopped, self.short = "time", (max(self.left, 0.0), takes)
                break
            if not all(self._one(*one) for one in lacking):
                stopped = "time"
                break
        self.note_time()
        return sum_up(self, stopped)

    def _pairs(self) -> Iterator[list[tuple[str, float, int]]]:
        """(arm, rate, seed) of each pair's runs: first the sweep with seed 0, then more seeds at the best rates."""
        for rate in self.plan.rates:
            yield [(arm, rate, 0) for arm in ARMS]
        for seed in range(1, self.config.seeds):
            best = {arm: self.best_rate(arm) for arm in ARMS}
            if any(rate is None for rate in best.values()):
                return
            yield [(arm, rate, seed) for arm, rate in best.items() if rate is not None]

    def expected(self, runs: list[tuple[str, float, int]]) -> float:
        """Expected seconds, from the completed runs."""
        plan, speed = self.plan, self.speed
        by_arm = {arm: [row["seconds"] for row in self.scores.values() if row["arm"] == arm] for arm in ARMS}
        guess = (plan.steps * speed.step + speed.run + speed.sample * (plan.choose + plan.judge)) / 2
        return sum(statistics.fmean(by_arm[arm]) if by_arm[arm] else guess for arm, _, _ in runs)

    def _one(self, arm: str, rate: float, seed: int) -> bool:
        """Train and judge one network; False if the time ran out first."""
        key, began = _key(arm, rate, seed), time.monotonic()
        self.run_started = began
        place = self.folder.runs / key
        going_on = (place / RUN).is_file()
        left = f"{max(self.left, 0.0) / 60:.1f} min left"
        self.tell(f"run {len(self.scores) + 1}: {arm}, rate {rate:g}, seed {seed}; {left}")
        task = self.make_task(seed)
        chooser, judge = self.parts(task)
        left_to_train = self.left - self.speed.sample / 2 * self.plan.judge
        limit = max(left_to_train, 0.1) + self.run_before
        config = self.training(rate=rate, seed=seed, steps=self.plan.steps, limit=limit)
        network = self.twins.network(arm, seed)
        source = Source(name=key, base=self.base, report=self.twins.report if arm == "converted" else None)
        row: dict[str, Any] = {"arm": arm, "rate": rate, "seed": seed}
        try:
            result = finetune(
                network,
                chooser,
                config,
                place,
                source=source,
                resume=going_on,
                force=place.exists() and not going_on,
                quiet=self.quiet,
                known_start={task.primary: math.nan},
            )
        except TrainingError as error:
            row |= {"chooses": None, "judged": None, "failed": str(error), "step_seconds": 0.0, "epochs": 0.0}
        else:
            summary = result.summary
            if summary.stopped == "time":
                return False
            layers: list[Adaptivity] = []
            chooses = result.metrics[task.primary]
            judged = self.judge(result.model, judge, layers)
            row |= {"chooses": _finite(chooses), "judged": _finite(judged), "layers": [x.to_dict() for x in layers]}
            row |= {"step_seconds": summary.seconds / max(summary.steps, 1), "epochs": summary.epochs}
            if arm == "converted" and self._is_best(chooses):
                self.folder.keep(place)
        self.scores[key] = row | {"seconds": self.run_before + time.monotonic() - began}
        self.run_before, self.run_started = 0.0, None
        self.folder.write(self.folder.scores / f"{key}.json", self.scores[key])
        shutil.rmtree(place, ignore_errors=True)
        self.note_time()
        return True

    def parts(self, task: Task) -> tuple[Task, Task]:
        """The selecting and the judging task: every second validation sample each, or both all of them."""
        plan, parts = self.plan, []
        choose, judge = (0, 2, plan.choose, "for choosing rates"), (1, 2, plan.judge, "for judging")
        for one in (choose, judge) if plan.choose else ((0, 1, plan.judge, "for judging"),):
            part = part_of(task, *one)
            part.bind(copy_model(self.model))
            parts.append(part)
        return parts[0], parts[-1]

    def _is_best(self, value: float) -> bool:
        others = [r["chooses"] for r in self.scores.values() if r["arm"] == "converted" and r["chooses"] is not None]
        return math.isfinite(value) and not any(better(self.task, other, value) for other in others)

    def swept(self, arm: str) -> dict[float, float | None]:
        rows = [row for row in self.scores.values() if (row["arm"], row["seed"]) == (arm, 0)]
        return {row["rate"]: row["chooses"] for row in sorted(rows, key=lambda row: row["rate"])}

    def best_rate(self, arm: str) -> float | None:
        """The rate preferred by the selecting samples, at seed 0."""
        known = {rate: value for rate, value in self.swept(arm).items() if value is not None}
        sign = 1.0 if self.task.higher_is_better else -1.0
        return max(known, key=lambda rate: sign * known[rate], default=None)


def _key(arm: str, rate: float, seed: int) -> str:
    return f"{arm}-lr{rate:g}-seed{seed}"


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.absolute())
    return list(value) if isinstance(value, tuple) else value
