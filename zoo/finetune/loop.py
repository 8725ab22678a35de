"""Training: single optimizer steps, and a run of them with evaluations, checkpoints and rollbacks."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgeon.errors import TrainingError
from surgeon.layers.regularizer import regularization
from surgeon.util.copying import checkpoint_gradients
from surgeon.util.interrupt import caught
from surgeon.util.tables import counted
from surgeon.zoo.evaluate import running
from surgeon.zoo.finetune.batches import STOPS, Draws, mixed, seed_everything, to_device, training_batches
from surgeon.zoo.finetune.config import FinetuneConfig
from surgeon.zoo.finetune.devices import prepare
from surgeon.zoo.finetune.evaluation import Evaluation, evaluate, freeze_batch_norms, measures_statistics
from surgeon.zoo.finetune.guard import Guard, NotFiniteError, one_value_told
from surgeon.zoo.finetune.journal import TrainingJournal
from surgeon.zoo.finetune.optimizer import check_state, make_optimizer, try_optimizer
from surgeon.zoo.finetune.parameters import group_parameters, optimizer_groups
from surgeon.zoo.finetune.schedule import Rates, RunPlan, Temperature
from surgeon.zoo.finetune.state import Store, TrainingProgress
from surgeon.zoo.tasks import Batch, Task, TaskDataset, improved

if TYPE_CHECKING:
    from accelerate import Accelerator


Watch = Callable[[int, dict[str, float]], None]  # (step, metrics) of an evaluation; may raise to end the run


class Interrupted(KeyboardInterrupt):
    """The run was interrupted and has saved a checkpoint of the step it names."""

    def __init__(self, step: int) -> None:
        super().__init__(f"interrupted after step {step}")
        self.step = step


@dataclass
class Data:
    """The two datasets of a task."""

    train: TaskDataset
    val: TaskDataset


class Trainer:
    """A model in training: everything that an optimizer step needs, and the state saved in a checkpoint."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        data: Data,
        config: FinetuneConfig,
        accelerator: "Accelerator",
        teacher: nn.Module | None = None,
    ) -> None:
        self.task, self.data, self.config, self.accelerator = task, data, config, accelerator
        self.model = _placed(model, config, accelerator.device)
        self.teacher = None if teacher is None else _placed(teacher, config, accelerator.device).eval()
        if config.checkpointing:
            checkpoint_gradients(self.model)
        self.groups = group_parameters(self.model, config)
        self.plan = RunPlan.make(config, len(data.train), self.groups)
        self.ema = _average(self.model, config)
        self.train_mode()
        unused = accelerator.num_processes > 1 and self._has_unused_parameters()
        try_optimizer(config, accelerator.device)
        optimizer = make_optimizer(optimizer_groups(self.groups, config), config)
        self.own_forward = vars(self.model).get("forward")  # of this object alone, if it has one
        self.wrapped, self.optimizer = prepare(accelerator, self.model, optimizer, unused)
        self.rates = Rates(self.optimizer, config, self.plan)
        self.temperature = Temperature(self.model, config.temperature_end, self.plan.total)

    @property
    def result(self) -> nn.Module:
        """The model to evaluate and keep: the averaged one if there is one."""
        return self.model if self.ema is None else self.ema.module

    def train_mode(self) -> None:
        """Set training mode, with BatchNorms frozen if requested."""
        self.model.train()
        if self.config.freeze_bn:
            freeze_batch_norms(self.model)

    # --- a step ---------------------------------------------------------------------------------------------------

    def batches(self, step: int) -> Iterator[Batch]:
        """This process's training micro-batches starting at a step, augmented, on the device."""
        config, accelerator = self.config, self.accelerator
        start, rank = step * config.accumulate, accelerator.process_index
        draws = Draws(
            len(self.data.train),
            config.batch_size,
            seed=config.seed,
            start=start,
            rank=rank,
            processes=accelerator.num_processes,
        )
        for micro, batch in enumerate(training_batches(self.task, self.data.train, draws, config.workers), start):
            generator = torch.Generator().manual_seed(mixed(config.seed, "augment", micro, rank))
            batch = to_device(batch, accelerator.device, channels_last=config.channels_last)
            yield self.task.augment(batch, generator)

    def backward(self, step: int, batches: Iterator[Batch]) -> Tensor:
        """Compute a step's gradients; returns its mean (loss, the task's part of it) in this process, (2,)."""
        seed_everything(self.config.seed, "step", step, self.accelerator.process_index)
        losses = torch.zeros(2, device=self.accelerator.device)
        for _ in range(self.config.accumulate):
            batch = next(batches)
            with self.accelerator.accumulate(self.wrapped), one_value_told(batch):
                loss, task_loss = self._losses(self.wrapped, batch)
                self.accelerator.backward(loss)
            losses += torch.stack([loss.detach(), task_loss.detach()]) / self.config.accumulate
        return losses

    def _losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        with running(self.model, batch, self.task):
            output = self.task.forward(model, batch)
        task_loss = self.task.loss(output, batch).float()
        loss = task_loss
        if self.config.regularization:
            loss = loss + self.config.regularization * regularization(self.model)
        if self.teacher is not None and self.config.distill:
            with torch.no_grad(), self.accelerator.autocast():
                taught = self.task.forward(self.teacher, batch)
            loss = loss + self.config.distill * self.task.distillation_loss(output, taught).float()
        return loss, task_loss

    def drop_inactive(self, step: int) -> list[nn.Parameter]:
        """Forget the gradients of what does not move in this step; returns what does.

        Without a gradient an optimizer leaves a parameter, its averages and its decay alone. (Taking `requires_grad` away
        instead would leave DistributedDataParallel waiting for gradients that never come.)
        """
        active = self.plan.active(step)
        moving = []
        for group in self.groups:
            for parameter in group.parameters.values():
                if group.role not in active:
                    parameter.grad = None
                elif parameter.grad is not None:
                    moving.append(parameter)
        return moving

    def _has_unused_parameters(self) -> bool:
        """Whether a trial step leaves parameters without a gradient, which DistributedDataParallel must then search for."""
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        seed_everything(self.config.seed, "trial")
        self._losses(self.model, next(self.batches(0)))[0].backward()
        unused = any(p.requires_grad and p.grad is None for p in self.model.parameters())
        self.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        return unused

    # --- state ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The content of a checkpoint, except for the progress."""
        scaler = self.accelerator.scaler
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def check(self, state: dict[str, Any], where: str) -> None:
        """Raise `CheckpointError`, with `where`, unless `load` can take this state; nothing is changed."""
        check_state(self.state(), state, where)

    def abandon(self) -> None:
        """Discard a started step: its gradients, and the loss scaler's record of having unscaled them."""
        self.optimizer.zero_grad()
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.update(scaler.get_scale())

    def load(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.zero_grad()
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def _placed(model: nn.Module, config: FinetuneConfig, device: torch.device) -> nn.Module:
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def _average(model: nn.Module, config: FinetuneConfig) -> Any:
    from timm.utils import ModelEmaV3

    return None if config.ema is None else ModelEmaV3(model, decay=config.ema, use_warmup=True)


# --- the run of steps ---------------------------------------------------------------------------------------------


class Run:
    """One run of a trainer through its plan."""

    def __init__(
        self,
        trainer: Trainer,
        store: Store,
        journal: TrainingJournal,
        progress: TrainingProgress,
        watch: Watch | None = None,
        began: float | None = None,
    ) -> None:
        self.watch = watch
        self.trainer, self.store, self.journal, self.progress = trainer, store, journal, progress
        self.config, self.plan, self.accelerator = trainer.config, trainer.plan, trainer.accelerator
        self.guard = Guard(most=self.config.max_rollbacks, factor=self.config.rollback_factor)
        self.before, self.began = 0.0, time.monotonic() if began is None else began  # earlier sessions, in seconds; now
        self.evaluation = 0.0  # seconds of the longest evaluation so far
        self.pace = 0.0  # seconds of the newest step
        self.saved: int | None = None  # step of the newest checkpoint
        self.newest: tuple[int, Evaluation] | None = None  # step and evaluation, in this session
        self.best: tuple[int, Evaluation] | None = None  # as newest

    @property
    def elapsed(self) -> float:
        """Total seconds, over all sessions."""
        return self.before + time.monotonic() - self.began

    def rest(self) -> float:
        """Estimated seconds for the end of the run: an evaluation, and others after BatchNorm statistics are recomputed.

        These are of the last weights, and of the best ones if they are kept.
        """
        config = self.config
        if not config.recalibrate or config.freeze_bn or not measures_statistics(self.trainer.result):
            return self.evaluation
        forward = self.pace / config.accumulate / 3  # of a batch, without its backward pass
        networks = 2 if config.keep == "best" else 1
        return (1 + networks) * self.evaluation + networks * config.recalibrate * forward

    def _is_last(self) -> bool:
        """Whether time runs out unless the next step is the last."""
        limit = self.config.max_time
        return limit is not None and self.elapsed + 2 * self.pace + self.rest() >= limit

    def train(self) -> None:
        """Train to the end. Raises `Interrupted` after a first SIGINT, SIGTERM or SIGHUP, `TrainingError` if it cannot continue."""
        batches = self.trainer.batches(self.progress.step)
        with _listening() as asked:
            while self.progress.stopped is None:
                try:
                    _, stop = self.step(batches, asked)
                    self._after_step(stop)
                except NotFiniteError as error:
                    self._return_from(error)
                    batches = self.trainer.batches(self.progress.step)
                    continue
                if stop == "signal":
                    raise Interrupted(self.progress.step)
            late = self.accelerator.reduce(torch.tensor(float(asked.is_set()), device=self.accelerator.device))
            if late:  # during the last evaluation: callers that train several networks must know
                raise Interrupted(self.progress.step)

    def once(self) -> float:
        """Run a single step to check that it works; returns its loss."""
        return self.step(self.trainer.batches(0), threading.Event())[0]

    def step(self, batches: Iterator[Batch], asked: threading.Event) -> tuple[float, str | None]:
        """One optimizer step; returns its loss and the reason to stop after it, if any, the same in every process."""
        trainer, progress, accelerator = self.trainer, self.progress, self.accelerator
        started, step, over = time.perf_counter(), progress.step, self._is_last()
        rates = trainer.rates.set(step, progress.lr_factor)
        temperature = trainer.temperature.set(step)
        trainer.train_mode()
        losses = trainer.backward(step, batches)
        moving = trainer.drop_inactive(step)
        norm = accelerator.clip_grad_norm_(moving, self.config.clip or float("inf")) if moving else losses.new_zeros(())
        flags = losses.new_tensor([float(asked.is_set()), float(over and accelerator.is_main_process)])
        shared = accelerator.reduce(torch.cat([losses, flags]), reduction="mean")
        loss, task_loss, signalled, over_time = shared.tolist()
        self.guard.check(loss, float(norm), scaled=accelerator.scaler is not None)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        progress.step += 1
        if trainer.ema is not None:
            trainer.ema.update(trainer.model, step=progress.step)
        took = time.perf_counter() - started
        progress.seconds += took
        self.pace = took
        self.journal.advance(loss)
        if progress.step % self.config.log_every == 0 or progress.step == self.plan.total:
            self._log(loss, task_loss, float(norm), rates, temperature, took)
        return loss, "signal" if signalled else "time" if over_time else None

    def _log(
        self,
        loss: float,
        task_loss: float,
        norm: float,
        rates: dict[str, float],
        temperature: float | None,
        seconds: float,
    ) -> None:
        row = {"step": self.progress.step, "epoch": round(self.plan.epoch(self.progress.step), 4)}
        row |= {"loss": loss, "task_loss": task_loss, "gradient_norm": norm, "seconds": seconds}
        row |= {f"lr_{role}": rate for role, rate in rates.items()}
        self.journal.step(row if temperature is None else row | {"temperature": temperature})

    def _after_step(self, stop: str | None) -> None:
        progress, plan = self.progress, self.plan
        if progress.step >= plan.total:
            progress.stopped = "steps"
        elif stop == "time":
            progress.stopped = "time"
        if progress.stopped or progress.step % plan.eval_every == 0:
            self.guard.check_weights(self.trainer.model)
            self.note(self.evaluate())
            if progress.stopped is None and self.config.patience and progress.stale >= self.config.patience:
                progress.stopped = "patience"
        if progress.stopped or stop or progress.step % plan.checkpoint_every == 0:
            self.guard.check_weights(self.trainer.model)
            self.save()

    def evaluate(self) -> Evaluation:
        """Evaluate the kept model on the validation samples."""
        trainer, step = self.trainer, self.progress.step
        when = f"after step {step}" if step else "at the start"
        with self.journal.waiting(f"evaluating the network {when}: {counted(len(trainer.data.val), 'sample')}"):
            found = evaluate(
                trainer.result,
                trainer.task,
                trainer.data.val,
                self.config,
                self.accelerator,
                look=self.journal.log is not None,
                progress=self.journal.show,
            )
        self.evaluation = max(self.evaluation, found.seconds)
        self.newest = (self.progress.step, found)
        return found

    def note(self, found: Evaluation) -> None:
        """Record an evaluation and check whether it is the best."""
        progress, task = self.progress, self.trainer.task
        value = found.metrics[task.primary]
        first = progress.best is None and math.isfinite(value)
        progress.last = found.metrics
        if first or (progress.best is not None and improved(task, found.metrics, progress.best_metrics(task.primary))):
            progress.best, progress.best_step, progress.stale = value, progress.step, 0
            progress.best_loss = found.metrics.get("loss")
            self.best = (progress.step, found) if math.isfinite(found.seconds) else None
            if self.config.keep == "best" and self.accelerator.is_main_process:
                self.store.save_best(self.trainer.result.state_dict(), progress.step)
        else:
            progress.stale += 1
        row = {"step": progress.step, "epoch": round(self.plan.epoch(progress.step), 4), "metrics": found.metrics}
        self.journal.evaluation(row | {"best": progress.best_step == progress.step}, found)
        told = ", ".join(f"{name} {number:.4g}" for name, number in found.metrics.items())
        if any(map(math.isfinite, found.metrics.values())):  # otherwise not measured, or reported as an error
            which = task.purpose and f" (on {counted(len(self.trainer.data.val), 'sample')} {task.purpose})"
            self.journal.tell(f"step {progress.step}/{self.plan.total}: {told}{which}")
        if self.watch is not None and progress.step:
            self.watch(progress.step, found.metrics)

    def save(self) -> None:
        """Save a checkpoint of the current state."""
        self.progress.elapsed = self.elapsed
        if self.accelerator.is_main_process:
            self.store.save(self.trainer.state(), self.progress)
        self.saved = self.progress.step
        self.accelerator.wait_for_everyone()

    def _return_from(self, error: NotFiniteError) -> None:
        """Roll back to the last regular checkpoint, with lower rates."""
        failed = self.progress.step + 1
        self.trainer.abandon()
        found = self.store.newest(regular=True)
        if found is None:
            raise TrainingError(f"step {failed}: {error}, and there is no checkpoint to roll back to")
        state, progress = found
        self.progress = self.guard.rolled_back(error, failed, self.progress, progress)
        self.trainer.load(state)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.store.drop_after(self.progress.step)
        self.accelerator.wait_for_everyone()
        self.journal.start(self.progress.step, self.plan.total)
        self.journal.event(
            {"step": self.progress.step, "failed": failed, "reason": str(error), "lr_factor": self.progress.lr_factor}
        )
        self.journal.tell(
            f"step {failed}: {error}; rolled back to step {self.progress.step} with rates times {self.progress.lr_factor:g}"
        )


@contextmanager
def _listening() -> Iterator[threading.Event]:
    """An event set by the first SIGINT, SIGTERM or SIGHUP; a second one has its usual effect."""
    asked = threading.Event()

    def ask(number: int, before: Any) -> None:
        asked.set()
        signal.signal(number, before)

    with caught([number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN], ask):  # under nohup
        yield asked
