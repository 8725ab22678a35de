"""The two networks under comparison, and the conversion between them."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from surgeon.errors import ConfigError, NothingReplacedError, SelectionError
from surgeon.records.recipe import Recipe
from surgeon.records.report import Report, options_text
from surgeon.surgery.convert import convert
from surgeon.util.copying import copy_model, seed_torch
from surgeon.util.tables import counted
from surgeon.zoo.finetune import FinetuneConfig
from surgeon.zoo.tasks import Task
from surgeon.zoo.trial.plan import RATES, default_conversion


@dataclass(frozen=True, kw_only=True)
class TryConfig:
    """Settings of the comparison. Invalid values raise a `ConfigError`.

    `type`, `layers`, `options` or `recipe` define the conversion (None: the task's default). `max_time` is in seconds for
    everything, over all sessions; at most `seeds` seeds are trained. `rates` are swept for both; one is used for both.
    `base` holds the fine-tuning options of both.
    """

    type: str | None = None
    layers: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None
    max_time: float = 1800.0
    seeds: int = 5
    steps: int | None = None
    rates: tuple[float, ...] = RATES
    base: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(recalibrate=0))

    def __post_init__(self) -> None:
        for name in ("seeds", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value!r}")
        for rate in self.rates:
            if not (math.isfinite(rate) and rate > 0):
                raise ConfigError(f"a learning rate must be a number > 0, got {rate!r}")
        if not self.rates or len(set(self.rates)) < len(self.rates):
            raise ConfigError(f"learning rates must be given, each once, got {list(self.rates)}")
        if self.recipe is not None and (self.type or self.layers or self.options):
            raise ConfigError("a recipe says layers, types and options itself: give it alone")


class Twins:
    """A plain model and its conversion, bound to a task; converted and verified on construction.

    `asked` is the conversion as asked for, in the words of the trial's record. Raises the errors of `surgeon.convert` if none
    of the task's selections matches anything.
    """

    def __init__(self, model: nn.Module, task: Task, config: TryConfig) -> None:
        self.model, self.task, self.config = model, task, config
        bound, given = self._fitted(0)
        self.given = None if given is None else f"both networks were given {given}"
        self.size: tuple[int, ...] = tuple(task.dataset("train")[0]["input"].shape)
        self.order: dict[str, Any]
        self.asked, self.report = self._convert_first(bound)

    def _convert_first(self, bound: nn.Module) -> tuple[str, Report]:
        config = self.config
        if config.recipe is not None:
            self.order = {"recipe": config.recipe, "input_size": self.size}
            return "by a recipe", convert(bound, **self.order)[1]
        kind, selections = default_conversion(self.task.name)
        tried = (config.layers,) if config.layers else selections
        for layers in tried:
            self.order = {"layers": layers, "type": config.type or kind, "input_size": self.size, **config.options}
            try:
                report = convert(bound, **self.order)[1]
            except (SelectionError, NothingReplacedError):
                if layers == tried[-1]:
                    raise
                continue
            break
        default = f" (the default of {self.task.name})"
        layers += "" if config.layers else default
        return f"{layers} to {self.order['type']}{'' if config.type else default}", report

    @property
    def becomes(self) -> str:
        """Which layers become what, with the options that they got, and what of it is a default: `stage4 to acda m4 S1`."""
        kinds = sorted({options_text(one.type, one.options) for one in self.report.replaced})
        told = f"{self.order.get('layers', 'the layers of a recipe')} to {', '.join(kinds)}"
        return f"{told} ({' and '.join(self._defaults)}: the default of {self.task.name})" if self._defaults else told

    @property
    def told(self) -> str:
        """`becomes` with the number of layers, and how to choose others."""
        choose = "; --layers, --type choose others" if self._defaults else ""
        return f"{self.becomes}, {counted(len(self.report.replaced), 'layer')}{choose}"

    @property
    def _defaults(self) -> list[str]:
        """The parts that nobody asked for."""
        config = self.config
        return [] if config.recipe else [name for name in ("layers", "type") if getattr(config, name) is None]

    def bound(self, seed: int) -> nn.Module:
        """A copy of the model that fits the task; a new head depends on the seed."""
        return self._fitted(seed)[0]

    def _fitted(self, seed: int) -> tuple[nn.Module, str | None]:
        with torch.random.fork_rng():
            seed_torch(seed)
            bound, given = self.task.fitted(copy_model(self.model))
            return bound.eval(), given

    def network(self, arm: str, seed: int) -> nn.Module:
        """One of the two networks as initialized with a seed: both compute the same function."""
        plain = self.bound(seed)
        return plain if arm == "original" else convert(plain, seed=seed, check=False, **self.order)[0]
