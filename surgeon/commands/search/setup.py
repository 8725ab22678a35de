"""Shared by `surgeon search` and `surgeon gains`: their arguments, and the model, task and training defined by these."""

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgeon.commands.common import checks
from surgeon.commands.common.arguments import (
    above_zero,
    add_amp,
    add_batch_size,
    add_device,
    add_lr,
    add_seed,
    add_trust,
    add_weights,
    add_workers,
    amp,
    build,
    building,
    not_negative,
    with_default,
)
from surgeon.commands.common.tasks import add_task, make_task, settle
from surgeon.errors import ConfigError
from surgeon.util.waiting import waiting

if TYPE_CHECKING:
    from torch import nn

    from surgeon.records.recipe import BaseModel
    from surgeon.zoo.finetune import FinetuneConfig
    from surgeon.zoo.tasks import Task

GAINS = "nqm"  # the default estimator: benchmarks/gain_methods.py
BATCH_SIZE, OPTIMIZER = 32, "adamw"  # of a trial's training, and so of the step whose memory is limited

# Optimizers known to the cost of a step under these names, as timm's optimizers with their momentum.
OPTIMIZERS = {"sgd": ("sgd", 0.9), "sgd-plain": ("momentum", 0.0), "adam": ("adam", 0.9), "adamw": ("adamw", 0.9)}


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the task."""
    parser.add_argument("model", metavar="MODEL", help="a model's name, or a folder written by surgeon; not converted")
    group = parser.add_argument_group("model and task")
    add_task(group)
    add_weights(group)
    add_seed(group, "for everything random")
    add_trust(group)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a trial's training; --max-memory limits the memory of such a step."""
    group = parser.add_argument_group("training")
    add_batch_size(group, f"samples per step (default: {BATCH_SIZE})", BATCH_SIZE)
    add_lr(group, with_default("--lr", "peak learning rate"))
    group.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default=OPTIMIZER, help=f"default: {OPTIMIZER}")
    decay = with_default("--weight-decay", "weight decay, except on norms and biases")
    group.add_argument("--weight-decay", type=not_negative, metavar="X", help=decay)
    group.add_argument(
        "--new-lr-scale",
        type=above_zero,
        metavar="X",
        help="rate of new parameters, as a multiple of --lr (default: ACDA 1, other types 0.1)",
    )
    add_amp(group, amp)
    add_device(group)
    add_workers(group)


def check_task(args: argparse.Namespace) -> None:
    """Refuse an invalid model, task or space before torch is loaded; settles the task."""
    checks.model_of(args)
    checks.plain(args.model, "a search")
    settle(args)
    for kind in args.types:
        checks.layer_type(kind)
    checks.file(args.space, "--space")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model that fits its task, and its training options."""

    model: "nn.Module"
    base: "BaseModel | None"
    task: "Task"
    config: "FinetuneConfig"
    size: tuple[int, ...]

    def cost_settings(self, args: argparse.Namespace) -> dict[str, Any]:
        """The step whose cost the budget gate counts: that of the training."""
        return {
            "input_size": self.size,
            "batch_size": args.batch_size,
            "optimizer": args.optimizer,
            "amp": self.config.amp_dtype or False,
            "weight_decay": self.config.weight_decay,
        }


def make_setup(args: argparse.Namespace) -> Setup:
    """Build the model, check the task's data, and fit them to each other. Raises `SurgeonError`s."""
    from surgeon.search.evaluate.training import bound, sample_size
    from surgeon.zoo.finetune import FinetuneConfig

    name, momentum = OPTIMIZERS[args.optimizer]
    given = {key: getattr(args, key) for key in ("lr", "weight_decay", "new_lr_scale")}
    config = FinetuneConfig(
        batch_size=args.batch_size,
        opt=name,
        momentum=momentum,
        amp=args.amp or "no",
        workers=args.workers,
        device=args.device or "auto",
        seed=args.seed,
        **{key: value for key, value in given.items() if value is not None},
    )
    task = make_task(args, args.seed)
    with waiting("looking through the data", quiet=args.quiet):
        size = sample_size(task)
    if len(size) != 3:
        raise ConfigError(f"a search needs images (C, H, W), and task {task.name} has inputs {size}")
    with waiting(building(args), quiet=args.quiet):
        model, base = build(args)
    return Setup(model=bound(model, task), base=base, task=task, config=config, size=size)
