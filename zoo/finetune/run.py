"""A fine-tuning run from start to finish: check the data, evaluate, train, evaluate again, write."""

import contextlib
import logging
import math
import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from surgeon.errors import ConfigError, called
from surgeon.models.names import chosen_size
from surgeon.util.copying import check_module
from surgeon.util.files import check_fields
from surgeon.util.tables import counted
from surgeon.util.waiting import waiting
from surgeon.zoo.finetune.config import FinetuneConfig
from surgeon.zoo.finetune.devices import make_accelerator, release
from surgeon.zoo.finetune.evaluation import Evaluation, evaluate, measures_statistics, recalibrate
from surgeon.zoo.finetune.folder import RunFolder, record
from surgeon.zoo.finetune.journal import TrainingJournal
from surgeon.zoo.finetune.loop import Data, Interrupted, Run, Trainer, Watch
from surgeon.zoo.finetune.networks import Source, at_size, bound_to, earlier_steps, original_of, with_recipe, with_task
from surgeon.zoo.finetune.optimizer import check_optimizer
from surgeon.zoo.finetune.schedule import describe
from surgeon.zoo.finetune.state import Store, TrainingProgress
from surgeon.zoo.finetune.summary import MeasuredNetwork, Summary, measured
from surgeon.zoo.tasks import Task, improved
from surgeon.zoo.tasks.data.judged import told_division

if TYPE_CHECKING:
    from accelerate import Accelerator

    from surgeon.records.collapse_report import CollapseReport
    from surgeon.records.report import Report


logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class FinetuneResult:
    """The fine-tuned model, in eval mode on the device it was trained on, the summary of the run, and the conversion's report."""

    model: nn.Module
    summary: Summary
    output: Path | None
    report: "Report | CollapseReport | None" = field(default=None, repr=False)
    main: bool = field(default=True, repr=False)  # False in all processes but the first, which write nothing

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the fine-tuned model."""
        return self.summary.result.metrics


def finetune(
    model: nn.Module,
    task: Task,
    config: FinetuneConfig | None = None,
    output: str | Path | None = None,
    *,
    original: nn.Module | None = None,
    source: Source | None = None,
    resume: bool = False,
    force: bool = False,
    quiet: bool = True,
    watch: Watch | None = None,
    known_start: Mapping[str, float] | None = None,
    began: float | None = None,
) -> FinetuneResult:
    """Train a copy of a model on a task; the caller's model does not change.

    `output` becomes a surgeon folder with `training/` in it; None writes nothing to disk. `original` is the network before its
    conversion, for the comparison and for distillation; by default it is rebuilt from the model's recipe if possible.
    `resume` continues the run in `output`, which must have been started with the same model, task and options. Neither the random
    state nor the result depends on earlier draws. `watch` gets (step, metrics) of each evaluation in training; an exception from it
    ends the run. `known_start`: the model's metrics before training, if they need not be measured. `began`: when the time of
    `max_time` began to run, by `time.monotonic()` (None: now). Raises `DataError`, `ConfigError`, `TrainingError`, and
    `Interrupted` (a `KeyboardInterrupt`) when asked to stop.
    """
    check_module(model)
    config, source = config or FinetuneConfig(), source or Source()
    folder = None if output is None else RunFolder(Path(output))
    if folder is None and (resume or force):
        raise ConfigError("without an output there is nothing to resume or to replace")
    if folder is not None:
        folder.check(resume=resume, force=force)
    check_optimizer(config.opt)
    began = time.monotonic() if began is None else began
    with waiting("looking through the data", quiet=quiet):
        task.check()
    accelerator = make_accelerator(config)
    with random_state_kept(), contextlib.ExitStack() as stack:
        work, start_hash, notes = bound_to(model, task)
        if accelerator.is_main_process and not resume:
            for note in notes:
                logger.warning("%s", note)
        original, more = original_of(work, task, original, config, source)
        place = folder.training if folder is not None else _shared_place(stack)
        session = _Session(task, config, source, folder, accelerator, notes, quiet=quiet)
        try:
            notes += [*more, *told_data(work, task, session.data)]
            if earlier := earlier_steps(work):
                before = f"{source.name} had {counted(earlier, 'step')} of training by surgeon before this run"
                notes.append(f"{before}: compare it with a network that had them, too")
            notes += [] if (unknown := task.unknown_images(work, source.base)) is None else [unknown]
            trainer = session.trainer(work, original)  # refuses options before a folder is made, or replaced
            if config.max_steps is not None and config.epochs is not None and trainer.plan.total < config.max_steps:
                notes.append(f"{config.epochs:g} epochs (--epochs) are fewer steps than --max-steps {config.max_steps}")
                session.journal.tell(f"the run has {trainer.plan.total} steps: {notes[-1]}")
            if trainer.plan.all_warmup:
                told = called(f"--warmup {config.warmup}", f"warmup={config.warmup!r}")
                notes.append(
                    f"{told} is as long as the run of {trainer.plan.total} steps: only the last has the full rate"
                )
            if folder is not None:
                values = record(source.name, start_hash, task, config, accelerator.num_processes)
                session.open(values, stack, resume=resume)
            return session.run(trainer, work, original, place, watch, known_start, began)
        except Interrupted:
            raise
        except KeyboardInterrupt as stop:  # outside of the training
            session.discard()
            if session.saved is None:
                raise
            raise Interrupted(session.saved) from stop
        except Exception:
            session.discard()
            raise
        finally:
            session.journal.stop()


class _Session:
    """One session of a run."""

    def __init__(
        self,
        task: Task,
        config: FinetuneConfig,
        source: Source,
        folder: RunFolder | None,
        accelerator: "Accelerator",
        notes: list[str],
        *,
        quiet: bool,
    ) -> None:
        self.task, self.config, self.source, self.folder = task, config, source, folder
        self.accelerator, self.notes = accelerator, notes
        main = accelerator.is_main_process
        self.journal = TrainingJournal(
            folder.training if folder is not None and main else None, quiet=quiet or not main
        )
        self.data = Data(task.dataset("train"), task.dataset("val"))
        self.ongoing: Run | None = None
        self.made = False  # whether this session made the folder

    def trainer(self, work: nn.Module, original: nn.Module | None) -> Trainer:
        """The trainer of a network. Raises `ConfigError` for options that it cannot train with."""
        teacher = original if self.config.distill else None
        return Trainer(work, self.task, self.data, self.config, self.accelerator, teacher)

    def open(self, values: dict[str, Any], stack: contextlib.ExitStack, *, resume: bool) -> None:
        """Write the record of a new run, or check it against that of the resumed run; hold the folder's lock until the end."""
        assert self.folder is not None
        main = self.accelerator.is_main_process
        if resume:
            if main:
                stack.enter_context(self.folder.locked())
            self.notes += self.folder.compare(values)
        elif main:
            with self.folder.locked():  # the run to be replaced
                self.folder.create(values)
            self.made = True
            stack.enter_context(self.folder.locked())
        self.accelerator.wait_for_everyone()

    def discard(self) -> None:
        """Remove the folder of a new run that ended before its first checkpoint: there is nothing to resume in it."""
        if self.made and self.saved is None and self.folder is not None:
            self.journal.stop()
            self.folder.discard()

    @property
    def saved(self) -> int | None:
        """The step of the newest checkpoint, None if there is none."""
        return None if self.ongoing is None else self.ongoing.saved

    def run(
        self,
        trainer: Trainer,
        work: nn.Module,
        original: nn.Module | None,
        place: Path,
        watch: Watch | None,
        known: Mapping[str, float] | None,
        began: float,
    ) -> FinetuneResult:
        every = trainer.plan.checkpoint_every
        store = Store(place / "checkpoints", every, keeps_best=self.config.keep == "best")
        if self.accelerator.is_main_process:
            store.create()
        self.accelerator.wait_for_everyone()
        run = self.ongoing = Run(trainer, store, self.journal, TrainingProgress(), watch, began)
        self._begin(run, work, original, known)
        if self.folder is not None and self.accelerator.is_main_process:
            self.folder.settle()
        if run.progress.stopped is None:
            run.train()
        summary = self._end(run)
        summary.earlier_steps = earlier_steps(work)
        release(self.accelerator, trainer.wrapped, trainer.own_forward)
        trained = with_recipe(trainer.result, work)
        model = with_task(trained, self.task, self._input_size(), summary.kept_step).eval()
        if self.folder is not None and self.accelerator.is_main_process:
            base = at_size(self.source.base, self._input_size())
            self.folder.finish(model, base, self.source.report, summary)
        self.accelerator.wait_for_everyone()
        output = None if self.folder is None else self.folder.output
        return FinetuneResult(
            model=model,
            summary=summary,
            output=output,
            report=self.source.report,
            main=self.accelerator.is_main_process,
        )

    # --- before and after -----------------------------------------------------------------------------------------

    def _begin(self, run: Run, work: nn.Module, original: nn.Module | None, known: Mapping[str, float] | None) -> None:
        """Load the newest checkpoint, or evaluate the start and write the first one."""
        checkpoint = run.store.newest()
        if checkpoint is not None:
            state, run.progress = checkpoint
            run.saved = run.progress.step
            run.before = run.progress.elapsed
            where = str(run.store.path("step", run.progress.step))
            check_fields(run.progress.start, {"start": dict}, f"{where}: progress: start")
            run.trainer.check(state, where)
            run.trainer.load(state)
            if self.accelerator.is_main_process:
                run.store.drop_after(run.progress.step)
            self.accelerator.wait_for_everyone()
            limit = self.config.max_time
            if run.progress.stopped == "time" and (limit is None or run.progress.elapsed < limit):
                run.progress.stopped = None
            patience = self.config.patience
            if run.progress.stopped == "patience" and (patience is None or run.progress.stale < patience):
                run.progress.stopped = None
            self.journal.start(run.progress.step, run.plan.total)
            self.journal.tell(f"resuming after step {run.progress.step}/{run.plan.total}")
            return
        self.journal.start(0, run.plan.total)
        for line in self.task.told_images(work, self.source.base) if known is None else ():
            self.journal.tell(line)
        size = self._input_size()
        if original is not None:
            placed = original.to(self.accelerator.device).eval()
            before = self._evaluate(placed, "original")
            run.evaluation = before.seconds
            run.progress.start["original"] = asdict(measured(placed, before.metrics, before.seconds, size))
        start = run.evaluate() if known is None else Evaluation(dict(known), math.nan)
        run.progress.start["start"] = asdict(measured(run.trainer.model, start.metrics, start.seconds, size))
        run.note(start)
        run.save()

    def _end(self, run: Run) -> Summary:
        """Load the weights to keep, compute BatchNorm statistics and metrics, and summarize."""
        trainer, progress = run.trainer, run.progress
        kept, final, recalibrated = self._kept(run)
        limit = self.config.max_time
        if progress.stopped == "time" and limit is not None and progress.seconds < limit / 2:
            told = f"only {progress.seconds:.1f} s of the {limit:.0f} s were training"
            self.notes.append(f"{told}: loading, looking through the data and evaluations took the rest")
        start = progress.start
        summary = Summary(
            task=self.task.name,
            primary=self.task.primary,
            higher_is_better=self.task.higher_is_better,
            original=MeasuredNetwork(**start["original"]) if "original" in start else None,
            start=MeasuredNetwork(**start["start"]),
            result=measured(trainer.result, final.metrics, final.seconds, self._input_size()),
            steps=progress.step,
            epochs=run.plan.epoch(progress.step),
            stopped=progress.stopped or "steps",
            kept_step=kept,
            recalibrated=recalibrated,
            rollbacks=progress.rollbacks,
            seconds=progress.seconds,
            groups=describe(trainer.optimizer, trainer.groups),
            notes=self.notes,
            input_size=list(self._input_size()),
            images=self.task.images(),
            train_samples=len(self.data.train),
            val_samples=len(self.data.val),
            keep=self.config.keep,
        )
        self.journal.hparams(self.config.to_dict() | {"task": self.task.name}, final.metrics)
        return summary

    def _kept(self, run: Run) -> tuple[int, Evaluation, bool]:
        """Load the weights to keep: their step, their metrics, and whether their BatchNorm statistics are those measured now.

        The last weights get such statistics before they are compared with the best: while a network learns fast, its own lag
        behind, and it looks worse than it is. Those of step 0 stay the start's.
        """
        trainer, last = run.trainer, run.progress.step
        best = run.progress.best_step if self.config.keep == "best" else None
        known = dict(found for found in (run.best, run.newest) if found is not None)  # evaluated in this session

        def measured_again(step: int) -> tuple[int, Evaluation, bool]:
            return step, *self._recalibrated(trainer, known.get(step) or self._evaluate(trainer.result))

        if best is None or best == last:
            return measured_again(last)
        newest, weights = None, {}
        if self._recalibrates(trainer):
            newest = measured_again(last)
            weights = {name: value.clone() for name, value in trainer.result.state_dict().items()}
        trainer.result.load_state_dict(run.store.best(best))
        found = measured_again(best) if best else (0, known.get(0) or self._evaluate(trainer.result), False)
        if newest is None or not improved(self.task, newest[1].metrics, found[1].metrics):
            return found
        trainer.result.load_state_dict(weights)
        return newest

    def _recalibrates(self, trainer: Trainer) -> bool:
        return bool(self.config.recalibrate) and not self.config.freeze_bn and measures_statistics(trainer.result)

    def _evaluate(self, model: nn.Module, what: str = "result") -> Evaluation:
        val = self.data.val
        with self.journal.waiting(f"evaluating the {what}: {counted(len(val), 'sample')}"):
            return evaluate(model, self.task, val, self.config, self.accelerator, progress=self.journal.show)

    def _recalibrated(self, trainer: Trainer, before: Evaluation) -> tuple[Evaluation, bool]:
        """Recalibrated BatchNorm statistics, unless the network is worse with them."""
        config, model = self.config, trainer.result
        if not self._recalibrates(trainer):
            return before, False
        kept = {name: value.clone() for name, value in model.state_dict().items()}

        def forward(network: nn.Module, batch: Any) -> None:
            with self.accelerator.autocast():
                self.task.forward(network, batch)

        count = config.recalibrate
        with self.journal.waiting(f"measuring the statistics of batch norms on {count} batches"):
            recalibrate(model, self.task, trainer.batches(trainer.plan.total), count, forward)
        after = self._evaluate(model)
        if improved(self.task, before.metrics, after.metrics):
            model.load_state_dict(kept)
            return before, False
        return after, True

    def _input_size(self) -> tuple[int, ...]:
        return tuple(self.data.train[0]["input"].shape)


# --- helpers ------------------------------------------------------------------------------------------------------


def _shared_place(stack: contextlib.ExitStack) -> Path:
    """A folder for the checkpoints of a run without an output: the first process's, shared by all on the machine."""
    from accelerate.utils import broadcast_object_list

    return Path(broadcast_object_list([stack.enter_context(tempfile.TemporaryDirectory())])[0])


def told_data(model: nn.Module, task: Task, data: Data) -> list[str]:
    """Notes on what the task took from the model's recipe, and on limits of its sets."""
    notes = told_division(task)
    size, given = tuple(data.train[0]["input"].shape), task.config.input_size
    told = "x".join(map(str, size))
    if given is None and task.at_models_size and chosen_size(model) == size:
        option = called("--task-option input_size=SIZE", "input_size=")
        notes.append(f"inputs are {told}, as recorded with the model ({option} changes that)")
    elif given is not None and given != size and len(size) == 3:
        why = f", which patch={patch} decides" if (patch := getattr(task.config, "patch", None)) is not None else ""
        notes.append(f"inputs are {told}{why}: input_size={'x'.join(map(str, given))} does not")
    for name in ("train_limit", "val_limit"):
        if (limit := getattr(task.config, name)) is not None:
            notes.append(f"{name}={limit}: at most that many samples of the set are used")
    return notes


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Context that restores the global generators of Python, numpy and torch."""
    python, legacy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
