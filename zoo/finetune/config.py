"""The options of a fine-tuning run."""

import math
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from surgeon.errors import ConfigError
from surgeon.util.parse import parse_span

SCHEDULES = ("cosine", "poly", "step", "multistep", "tanh", "constant")
PRECISIONS = ("no", "fp16", "bf16")
DEVICES = "auto", "cpu", "cuda", "cuda:N"
KEEP = ("best", "last")
EPOCHS = 10.0


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Options of fine-tuning. Invalid values raise a `ConfigError`.

    A *span* is a string: optimizer steps ("200"), epochs ("1.5ep"), or a percentage of the run ("5%", of the planned steps).

    Length: `epochs` passes over the training data (None: as many as `max_steps` takes, 10 without it), at most `max_steps`
    optimizer steps (the schedule is planned for the shorter of the two), at most `max_time` seconds over all sessions, evaluations
    included (which cuts the schedule short).
    Batches: `batch_size` samples per micro-step over all processes, `accumulate` micro-steps per optimizer step; evaluation uses
    `eval_batch_size` (None: the same).
    Optimizer: a timm name; `lr` at the peak of the schedule `sched`, times `new_lr_scale` for new parameters (those that
    the replaced convolutions did not have; None: each layer type's own, 1 for ACDA and 0.1 for the others); `fan_in_lr` slows
    the weight with which a generator ends, in proportion to its inputs; `warmup` is a span; no weight decay on norms and
    biases; `clip` bounds the norm of the gradient (None: off).
    Schedules start where the warm-up ends: "step" multiplies the rate by `decay_rate` (None: 0.1) after every span
    `decay_every` (None: a third of the rest of the run), "multistep" at each span of `milestones`; the power of "poly" is
    `decay_rate` (None: 1).
    New layers: `new_first` is an initial span in which only new parameters are trained; `regularization` weights the layers' own
    loss terms; PAFU's temperature decays exponentially from each layer's own to `temperature_end` times it; `alternate` k trains,
    in turn, the selectors for one step and everything else for k (PAFU, §4.1: 3).
    `distill`: weight of the distance to the original network's outputs.
    `ema`: decay of an average of the weights, which is then evaluated and kept (None: off).
    BatchNorm: `freeze_bn` keeps its statistics (except in the generators of dynamic layers, which are new with the
    conversion); `recalibrate` is the number of training batches over which they are recomputed at the
    end (0: off), with every other layer in eval mode.
    Evaluation: every span `eval_every` and at the end; the run stops after `patience` evaluations without a better primary metric
    (None: never); `keep` selects the best or the last weights as the result.
    Safety: `checkpoint_every` is a span; NaN or infinity in the loss or gradients rolls the run back to the last checkpoint, with
    rates times `rollback_factor`, at most `max_rollbacks` times.
    """

    epochs: float | None = None
    max_steps: int | None = None
    max_time: float | None = None
    batch_size: int = 32
    accumulate: int = 1
    eval_batch_size: int | None = None
    workers: int = 0
    opt: str = "adamw"
    lr: float = 3e-4
    weight_decay: float = 0.01
    momentum: float = 0.9
    sched: str = "cosine"
    warmup: str = "5%"
    min_lr: float = 0.0
    decay_rate: float | None = None
    decay_every: str | None = None
    milestones: tuple[str, ...] = ()
    new_lr_scale: float | None = None
    fan_in_lr: bool = True
    new_first: str = "0"
    clip: float | None = 5.0
    regularization: float = 0.0
    temperature_end: float = 0.5
    alternate: int | None = None
    distill: float = 0.0
    ema: float | None = None
    freeze_bn: bool = False
    recalibrate: int = 32
    eval_every: str = "1ep"
    patience: int | None = None
    keep: str = "best"
    checkpoint_every: str = "200"
    max_rollbacks: int = 3
    rollback_factor: float = 0.5
    log_every: int = 10
    amp: str = "no"
    device: str = "auto"
    channels_last: bool = False
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "log_every"):
            self._check_integer(name, 1)
        for name in ("workers", "recalibrate", "max_rollbacks", "seed"):
            self._check_integer(name, 0)
        for name in ("max_steps", "eval_batch_size", "alternate", "patience"):
            if getattr(self, name) is not None:
                self._check_integer(name, 1)
        for name in ("lr", "temperature_end"):
            self._check_number(name, above=True)
        if self.epochs is None and self.max_steps is None:
            object.__setattr__(self, "epochs", EPOCHS)
        for name in ("epochs", "max_time", "new_lr_scale", "clip", "decay_rate"):
            if getattr(self, name) is not None:
                self._check_number(name, above=True)
        for name in ("weight_decay", "momentum", "min_lr", "regularization", "distill"):
            self._check_number(name, above=False)
        for name, values in (("sched", SCHEDULES), ("amp", PRECISIONS), ("device", DEVICES), ("keep", KEEP)):
            value = re.sub(r"^cuda:\d{1,4}$", "cuda:N", str(getattr(self, name)))
            if value not in values or getattr(self, name) == "cuda:N":
                raise ConfigError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")
        if self.ema is not None and not (isinstance(self.ema, float) and 0 < self.ema < 1):
            raise ConfigError(f"ema, the decay of the average, must be between 0 and 1, got {self.ema!r}")
        if not 0 < self.rollback_factor < 1:
            raise ConfigError(f"rollback_factor must be between 0 and 1, got {self.rollback_factor!r}")
        for name in ("warmup", "new_first", "eval_every", "checkpoint_every"):
            number, _ = parse_span(getattr(self, name), name)
            if number == 0 and name.endswith("_every"):
                raise ConfigError(f"{name} must be more than 0, got {getattr(self, name)!r}")
        self._check_decay()

    @property
    def amp_dtype(self) -> str | None:
        """`amp` as the name of a torch dtype; None for "no"."""
        return {"no": None, "fp16": "float16", "bf16": "bfloat16"}[self.amp]

    def _check_decay(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones or ()))
        if bool(self.milestones) != (self.sched == "multistep"):
            raise ConfigError(
                f"milestones and the schedule multistep need each other, got sched={self.sched!r}, "
                f"milestones={self.milestones!r}"
            )
        if self.decay_every is not None and self.sched != "step":
            raise ConfigError(f"decay_every requires the schedule step, got sched={self.sched!r}")
        if self.decay_rate is not None and self.sched not in ("step", "multistep", "poly"):
            raise ConfigError(f"decay_rate requires the schedule step, multistep or poly, got sched={self.sched!r}")
        every = () if self.decay_every is None else (self.decay_every,)
        for name, spans in (("decay_every", every), ("milestones", self.milestones)):
            if any(parse_span(span, name)[0] == 0 for span in spans):
                raise ConfigError(f"{name} must be more than 0, got {getattr(self, name)!r}")

    def _check_integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be an integer >= {least}, got {value!r}")

    def _check_number(self, name: str, *, above: bool) -> None:
        value = getattr(self, name)
        fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not fine or value < 0 or (above and value == 0):
            raise ConfigError(f"{name} must be a number {'>' if above else '>='} 0, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {"milestones": list(self.milestones) or None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`; an unknown option raises a `ConfigError`."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"a fine-tuning run has no option {', '.join(unknown)}; it has {', '.join(known)}")
        return cls(**values)


def span_steps(text: str, steps_per_epoch: float, total: int, what: str = "span") -> int:
    """A span in optimizer steps, rounded; at least 1 unless the span is 0."""
    number, unit = parse_span(text, what)
    steps = number * {"": 1.0, "ep": steps_per_epoch, "%": total / 100}[unit]
    return max(round(steps), 1) if steps > 0 else 0
