"""Shared by `surgeon search` and `surgeon gains`: their arguments, and the model, task and training defined by these."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.commands.arguments import add_amp, add_device, add_pairs, add_seed, amp, whole
from surgeon.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from surgeon.records.recipe import BaseModel
    from surgeon.zoo.finetune import FinetuneConfig
    from surgeon.zoo.tasks import Task

GAINS = "nqm"  # the default estimator: benchmarks/gain_methods.py

# Optimizers known to the cost of a step under these names, as timm's optimizers with their momentum.
OPTIMIZERS = {"sgd": ("sgd", 0.9), "sgd-plain": ("momentum", 0.0), "adam": ("adam", 0.9), "adamw": ("adamw", 0.9)}


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the task."""
    parser.add_argument("model", metavar="MODEL", help="a model's name, or a folder written by surgeon; not converted")
    group = parser.add_argument_group("model and task")
    group.add_argument("--task", required=True, metavar="TASK", help="classification, denoising, ...")
    group.add_argument("--data", type=Path, metavar="DIR", help="the task's data")
    group.add_argument("--weights", default="auto", metavar="auto|pretrained|random|FILE", help="default: auto")
    add_pairs(group, "--task-option", "any option of the task", dest="task_options")
    add_seed(group, "for everything random")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a trial's training; --max-memory limits the memory of such a step."""
    group = parser.add_argument_group("training")
    group.add_argument("--batch-size", type=whole, default=32, metavar="N", help="samples per step (default: 32)")
    group.add_argument("--lr", type=float, metavar="X", help="peak learning rate")
    group.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adamw", help="default: adamw")
    group.add_argument("--weight-decay", type=float, metavar="X", help="weight decay, except on norms and biases")
    group.add_argument("--new-lr-scale", type=float, metavar="X", help="rate of new parameters, as a multiple of --lr")
    add_amp(group, amp)
    group.add_argument("--workers", type=whole, default=0, metavar="N", help="data-loading processes (default: 0)")
    add_device(group)


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
    from surgeon.commands.finetune import make_task
    from surgeon.models.names import build_model
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
    size = sample_size(task)
    if len(size) != 3:
        raise ConfigError(f"a search needs images (C, H, W), and task {task.name} has inputs {size}")
    model, base = build_model(args.model, weights=args.weights, seed=args.seed)
    return Setup(model=bound(model, task), base=base, task=task, config=config, size=size)
