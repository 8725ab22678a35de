"""The value of a placement by training: convert, fine-tune briefly on a task, measure the task's primary metric.

The unmodified model gets the same training. All randomness (order, augmentation, new weights) depends on the
seed alone, so a placement resumed after a kill gets the value it would have had.
"""

import gc
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from surgeon.errors import ConfigError, TrainingError
from surgeon.models.checkpoint import save
from surgeon.models.weights import state_sha256
from surgeon.records.recipe import BaseModel
from surgeon.records.report import Report as ConversionReport
from surgeon.search.evaluate.evaluator import Evaluator, OutOfMemoryError, Report, StoppedError
from surgeon.search.placement.problem import Ints
from surgeon.search.space import Space
from surgeon.search.study.folder import NOTE, read_kept, write_json
from surgeon.search.study.journal import file_lock
from surgeon.search.study.record import rank
from surgeon.surgery.convert import convert
from surgeon.surgery.rewrite import dynamic_layers
from surgeon.util.copying import copy_model, seed_torch
from surgeon.util.outputs import RUN
from surgeon.zoo.finetune import FinetuneConfig, FinetuneResult, Source, finetune
from surgeon.zoo.finetune.loop import Interrupted
from surgeon.zoo.tasks import Task
from surgeon.zoo.tasks.data.fingerprint import fingerprint

logger = logging.getLogger(__name__)

_FREE = ("workers", "log_every", "max_time")  # options that do not change the result of a training
_EPOCHS = 1e6  # only the number of steps limits the length


@dataclass(frozen=True, kw_only=True)
class ShortConfig:
    """Length of a trial's training. `steps` optimizer steps at rung 0, twice as many at each higher rung.

    `evaluations` is the number of values reported, evenly spaced, the last one at the end.
    """

    steps: int = 200
    evaluations: int = 4
    base: FinetuneConfig = field(default_factory=FinetuneConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "evaluations"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    def at(self, rung: int, seed: int | None = None) -> FinetuneConfig:
        """The fine-tuning options of a rung."""
        steps = self.steps << rung
        return replace(
            self.base,
            epochs=_EPOCHS,
            max_steps=steps,
            eval_every=str(self.interval(rung)),
            keep="last",
            seed=self.base.seed if seed is None else seed,
        )

    def interval(self, rung: int) -> int:
        """Steps between two evaluations."""
        return max((self.steps << rung) // self.evaluations, 1)


class TrainingEvaluator(Evaluator):
    """Fine-tunes placements of one model on one task.

    `model` must already fit the task (`bound`). `keep` is a folder for the best placement trained so far, as a surgeon
    folder, by its value, loss and `costs` (`search.study.record.rank`; "flops", "memory" of a placement); `base` describes how to
    build its original.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        space: Space,
        config: ShortConfig,
        *,
        base: BaseModel | None = None,
        keep: Path | None = None,
        costs: Callable[[Ints], Mapping[str, float]] | None = None,
    ) -> None:
        self.model, self.task, self.space, self.config = model, task, space, config
        self.keep, self._costs = keep, costs
        self.directions = ("maximize" if task.higher_is_better else "minimize",)
        self._weights = state_sha256(model)
        self._data = fingerprint(task)
        self._size = sample_size(task)
        self.base = base if base is None else replace(base, input_size=self._size)  # at which it is trained
        self._loss: float | None = None  # of the last evaluation
        self._start: dict[str, float] | None = None  # metrics before training, which conversion preserves

    @property
    def start(self) -> float | None:
        return None if self._start is None else float(self._start[self.task.primary])

    @property
    def loss(self) -> float | None:
        return self._loss

    def identity(self) -> Mapping[str, Any]:
        options = {key: _plain(value) for key, value in asdict(self.task.config).items()}
        training = {key: value for key, value in self.config.at(0).to_dict().items() if key not in _FREE}
        return {
            "evaluator": "training",
            "task": self.task.name,
            "options": options | {"seed": self.task.seed},
            "training": training,
            "weights": self._weights,
            "data": self._data,
        }

    def evaluate(self, placement: Ints, report: Report, rung: int) -> float:
        """The primary metric of the validation split after the training.

        Raises:
            TrainingError: loss or weights are not finite.
            StoppedError: Ctrl-C.
        """
        last = self.config.steps << rung
        primary = self.task.primary

        def watch(step: int, metrics: dict[str, float]) -> None:
            if not np.isfinite(metrics[primary]):
                raise TrainingError(f"{primary} is {metrics[primary]} after {step} steps")
            if step != last:  # the result is the return value: a finished trial is not pruned
                report(step, metrics[primary])

        result = self.train(placement, rung=rung, watch=watch)
        value, loss = float(result.metrics[primary]), float(result.metrics.get("loss", math.nan))
        self._loss = loss if math.isfinite(loss) else None
        if self.keep is not None and any(placement):
            self._keep_best(result, placement, value)
        return value

    def train(
        self, placement: Ints, *, rung: int = 0, seed: int | None = None, output: Path | None = None, watch: Any = None
    ) -> FinetuneResult:
        """Convert and fine-tune; `output` becomes the folder of a run (`surgeon.zoo.finetune`), or is resumed."""
        config = self.config.at(rung, seed)
        memory: int | None = None
        try:
            return self._train(placement, config, output, watch)
        except Interrupted as error:
            raise StoppedError(str(error)) from error
        except (torch.OutOfMemoryError, MemoryError) as error:
            memory = _device_memory()
            logger.debug("out of memory: %s", error)
        except RuntimeError as error:
            if "allocate memory" not in str(error):  # message of torch's CPU allocator
                raise
            logger.debug("out of memory: %s", error)
        gc.collect()  # outside the handler, so that no traceback holds the training's tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise OutOfMemoryError(memory)

    def _train(self, placement: Ints, config: FinetuneConfig, output: Path | None, watch: Any) -> FinetuneResult:
        model, report = self.converted(placement, seed=config.seed)
        source = Source(name=self.space.hash_of(placement), base=self.base, report=report)
        resume = output is not None and (output / RUN).is_file()
        known = self._start if output is None else None
        result = finetune(
            model, self.task, config, output, source=source, resume=resume, watch=watch, known_start=known
        )
        self._start = result.summary.start.metrics
        return result

    def converted(self, placement: Ints, seed: int = 0) -> tuple[nn.Module, ConversionReport | None]:
        """A copy of the model with this placement, computing the same function, and the report (None: nothing is replaced)."""
        if not any(placement):
            return copy_model(self.model), None
        recipe = self.space.recipe(placement, seed=seed)
        return convert(self.model, recipe=recipe, seed=seed, check=False, input_size=self._size)

    def _keep_best(self, result: FinetuneResult, placement: Ints, value: float) -> None:
        """The record is updated once the new model is complete, and only then the old one is removed: a kill leaves one of them."""
        assert self.keep is not None
        self.keep.mkdir(parents=True, exist_ok=True)
        with file_lock(self.keep / ".lock"):
            known, higher = read_kept(self.keep), self.task.higher_is_better
            costs: Mapping[str, float] = {} if self._costs is None else self._costs(placement)
            mine = rank(value, higher=higher, loss=self._loss, costs=costs)
            if known and mine >= rank(known["value"], higher=higher, loss=known.get("loss"), costs=known):
                return
            key = self.space.hash_of(placement)
            folder = self.keep / key
            save(result.model, folder, base=self.base, report=result.report, scores=result.metrics, force=True)
            ties = {"loss": self._loss, "flops": costs.get("flops"), "memory": costs.get("memory")}
            values = {"hash": key, "value": value, **ties, "placement": self.space.names(placement)}
            write_json(self.keep / NOTE, values)
            for other in self.keep.iterdir():
                if other.is_dir() and other.name != key:
                    shutil.rmtree(other)


def bound(model: nn.Module, task: Task) -> nn.Module:
    """A copy of the model that fits the task; a new head is the same at every call. Raises `ConfigError` for a converted model."""
    if dynamic_layers(model):
        raise ConfigError(
            "a search starts from a plain model, and this one has dynamic layers: surgeon revert makes it one"
        )
    with torch.random.fork_rng():
        seed_torch(task.seed)
        return task.bind(copy_model(model)).eval()


def sample_size(task: Task) -> tuple[int, ...]:
    """(C, H, W) of a training sample. Raises `DataError` if the data cannot be used."""
    task.check()
    return tuple(task.dataset("train")[0]["input"].shape)


def _device_memory() -> int | None:
    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def _plain(value: Any) -> Any:
    """The value after a round trip through JSON."""
    if isinstance(value, Path):
        return str(value.absolute())
    return list(value) if isinstance(value, tuple) else value
