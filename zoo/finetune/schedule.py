"""Rates, phases and temperature at each step. All of it follows from the number of the step alone."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgeon.errors import ConfigError
from surgeon.zoo.finetune.config import FinetuneConfig, span_steps
from surgeon.zoo.finetune.parameters import ROLES, Group, Role, dynamic_modules


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Length and cadence of a run, in optimizer steps; counts start at 0 before the first step."""

    samples: int  # in an epoch
    per_step: int  # samples per optimizer step
    total: int
    warmup: int
    new_first: int
    eval_every: int
    checkpoint_every: int
    alternate: int | None
    all_warmup: bool = False  # the warm-up was to be at least as long as the run
    decay_every: int = 1  # for the schedule "step"
    milestones: tuple[int, ...] = ()  # for "multistep"

    @classmethod
    def make(cls, config: FinetuneConfig, samples: int, groups: list[Group]) -> "RunPlan":
        """Raises `ConfigError` for phases that need parameters the model lacks, or that leave nothing of the run."""
        per_step = config.batch_size * config.accumulate
        steps_per_epoch = samples / per_step
        lengths = [] if config.max_steps is None else [config.max_steps]
        if config.epochs is not None:
            lengths.append(max(round(config.epochs * steps_per_epoch), 1))
        total = min(lengths)

        def steps(name: str, span: str | None = None) -> int:
            return span_steps(span or getattr(config, name), steps_per_epoch, total, name)

        wanted = steps("warmup")
        warmup = min(wanted, total - 1)
        plan = cls(
            samples=samples,
            per_step=per_step,
            total=total,
            warmup=warmup,
            new_first=steps("new_first"),
            eval_every=steps("eval_every"),
            checkpoint_every=steps("checkpoint_every"),
            alternate=config.alternate,
            all_warmup=wanted >= total > 1,
            decay_every=steps("decay_every") if config.decay_every else max((total - warmup) // 3, 1),
            milestones=tuple(sorted(steps("milestones", span) for span in config.milestones)),
        )
        plan._check_phases({group.role for group in groups})
        return plan

    def _check_phases(self, roles: set[Role]) -> None:
        if self.new_first and not roles & {"new", "selector"}:
            raise ConfigError("new_first trains new parameters first, and the model has none that require a gradient")
        if self.new_first >= self.total and "other" in roles and self.new_first:
            raise ConfigError(f"new_first ({self.new_first} steps) takes up the whole run ({self.total} steps)")
        if self.alternate is not None and not ("selector" in roles and roles - {"selector"}):
            raise ConfigError("alternate trains selectors in turn, and the model has none (only PAFU has them)")

    def epoch(self, step: int) -> float:
        """Passes over the training data after this many steps."""
        return step * self.per_step / self.samples

    def active(self, step: int) -> frozenset[Role]:
        """The roles whose parameters are updated in the step with this number, counted from 0."""
        roles: set[Role] = set(ROLES)
        if step < self.new_first:
            roles.discard("other")
        if self.alternate is not None:
            selecting = step % (self.alternate + 1) == 0
            roles &= {"selector"} if selecting else {"new", "other"}
        return frozenset(roles)

    def warm(self, step: int) -> float:
        """Rate factor of the other parameters: their own linear warm-up after a first phase without them."""
        if not self.new_first or step < self.new_first:
            return 1.0
        return min((step - self.new_first + 1) / (self.warmup + 1), 1.0)


class Rates:
    """The learning rates of an optimizer's groups at every step, following timm's schedules."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: FinetuneConfig, plan: RunPlan) -> None:
        from timm.scheduler import create_scheduler_v2

        self.optimizer, self.plan = optimizer, plan
        default = {"poly": 1.0, "constant": 1.0}.get(config.sched, 0.1)  # for "poly" it is the power
        decay = default if config.decay_rate is None else config.decay_rate
        self.schedule, _ = create_scheduler_v2(
            optimizer,
            "step" if config.sched == "constant" else config.sched,  # a decay by 1: constant in every version of timm
            num_epochs=plan.total - plan.warmup,
            decay_epochs=plan.decay_every,
            # timm's multistep decays one step before its milestone
            decay_milestones=[milestone + 1 for milestone in plan.milestones],
            decay_rate=decay,
            min_lr=config.min_lr,
            warmup_lr=config.lr / (plan.warmup + 1),
            warmup_epochs=plan.warmup,
            warmup_prefix=True,  # the schedule starts at its peak, where the warm-up ends
            step_on_epochs=False,
            updates_per_epoch=1,
        )

    def set(self, step: int, factor: float = 1.0) -> dict[str, float]:
        """Set the rates for the step with this number, counted from 0, all times `factor`; returns each role's highest."""
        self.schedule.step_update(step)
        rates: dict[str, float] = {}
        for group in self.optimizer.param_groups:
            group["lr"] *= factor * (self.plan.warm(step) if group["role"] == "other" else 1.0)
            rates[group["role"]] = max(rates.get(group["role"], 0.0), group["lr"])
        return rates


class Temperature:
    """The temperature of selections over a run: from each layer's own, exponentially, to `end` times it."""

    def __init__(self, model: nn.Module, end: float, total: int) -> None:
        self.layers = [layer for _, layer in dynamic_modules(model)]
        self.end, self.total = end, total

    def set(self, step: int) -> float | None:
        """Set it for a step; returns the factor on the layers' own temperatures, None if no layer has one."""
        factor = float(self.end ** (step / max(self.total - 1, 1)))
        annealed = [layer.anneal(factor) for layer in self.layers]
        return factor if any(annealed) else None


def describe(optimizer: torch.optim.Optimizer, groups: list[Group]) -> list[dict[str, Any]]:
    """Description of the optimizer's groups: role, slowdown, decay, number of tensors and parameters, rate scale."""
    return [
        {
            "role": group.role,
            "slowed": group.slowed,
            "weight_decay": setting["weight_decay"],
            "lr_scale": group.lr_scale,
            "tensors": len(group.parameters),
            "parameters": sum(p.numel() for p in group.parameters.values()),
        }
        for group, setting in zip(groups, optimizer.param_groups, strict=True)
    ]
