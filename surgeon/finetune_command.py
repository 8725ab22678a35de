"""`surgeon finetune`: train a converted (or plain) network on a task. Imports torch when it runs."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.arguments import assignment
from surgeon.errors import ConfigError

if TYPE_CHECKING:
    from surgeon.zoo.finetune import FinetuneConfig
    from surgeon.zoo.finetune.run import DryRun
    from surgeon.zoo.tasks import Task

DESCRIPTION = "train a converted network on a task; crash-safe, resumable"
EXAMPLES = """  surgeon finetune runs/resnet50-acda --task classification --data imagenet/ --epochs 10 --amp bf16
  surgeon finetune runs/resnet50-acda --task classification --data imagenet/ --new-first 1ep --warmup 5% --ema 0.999
  surgeon finetune runs/dncnn-pafu --task denoising --data photos/ --task-option sigma=25 --alternate --distill 0.1
  surgeon finetune runs/resnet50-acda --task classification --data imagenet/ --dry-run
  surgeon finetune runs/resnet50-acda --task classification --data imagenet/ --epochs 10 --amp bf16 --resume
  torchrun --nproc-per-node 4 -m surgeon finetune runs/resnet50-acda --task classification --data imagenet/

spans (--warmup, --new-first, ...) are optimizer steps (200), epochs (1.5ep) or a part of the run (5%)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `surgeon finetune`, beside --json, --quiet and --debug.

    Those of the run's config have no default here: what is not given is left to `FinetuneConfig`.
    """
    parser.add_argument("model", metavar="RUN|MODEL", help="a folder that surgeon wrote, or a model's name")
    group = parser.add_argument_group("what is trained on what")
    group.add_argument("--task", required=True, metavar="TASK", help="classification, denoising, ...")
    group.add_argument("--data", type=Path, metavar="DIR", help="the task's data")
    group.add_argument(
        "--weights", default="auto", metavar="auto|pretrained|random|FILE", help="of MODEL (default: auto)"
    )
    group.add_argument(
        "--task-option",
        type=assignment,
        dest="task_options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="any option of the task",
    )
    group.add_argument(
        "--trust-factory", action="store_true", help="run the package.module:factory that RUN's recipe names"
    )
    group.add_argument("-o", "--output", type=Path, metavar="OUT", help="folder to write (default: runs/NAME-TASK)")
    group.add_argument("--force", action="store_true", help="replace OUT if surgeon wrote it")
    group.add_argument("--resume", action="store_true", help="go on with the run in OUT, with the same options")
    group.add_argument(
        "--dry-run", action="store_true", help="check the data, try one step, predict its cost; write nothing"
    )
    _add_length(parser)
    _add_optimizer(parser)
    _add_layers(parser)
    _add_operation(parser)


def _add_length(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("length and batches")
    _option(group, "--epochs", float, "N", "passes over the training data")
    _option(group, "--max-steps", int, "N", "at most so many optimizer steps")
    _option(group, "--max-time", str, "TIME", "at most so much training: 90s, 30m, 1.5h")
    _option(group, "--batch-size", int, "N", "samples a micro-step, over all processes")
    _option(group, "--accumulate", int, "N", "micro-steps an optimizer step")
    _option(group, "--eval-batch-size", int, "N", "samples a batch in evaluation")
    _option(group, "--workers", int, "N", "processes that load data; 0 loads in the training process")
    _option(group, "--eval-every", str, "SPAN", "between evaluations")
    _option(group, "--patience", int, "N", "stop after so many evaluations without a better one")
    group.add_argument("--keep", choices=("best", "last"), help="which weights make the result")


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimizer")
    _option(group, "--opt", str, "NAME", "any of timm's optimizers")
    _option(group, "--lr", float, "X", "learning rate at its highest")
    _option(group, "--weight-decay", float, "X", "not on norms and biases")
    _option(group, "--momentum", float, "X", "of optimizers that have one")
    group.add_argument("--sched", choices=("cosine", "poly", "step", "tanh", "constant"), help="of timm's schedules")
    _option(group, "--warmup", str, "SPAN", "linear warm-up")
    _option(group, "--min-lr", float, "X", "where the schedule ends")
    _option(group, "--clip", float, "X", "largest norm of the gradient; 0: no limit")
    _option(group, "--ema", float, "DECAY", "keep an average of the weights")


def _add_layers(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("dynamic layers")
    _option(group, "--new-lr-scale", float, "X", "rate of new parameters, as a part of --lr")
    _option(group, "--new-first", str, "SPAN", "train only new parameters so long")
    _option(group, "--regularization", float, "X", "weight of the layers' own loss (PAFU: decorrelation)")
    _option(group, "--temperature-end", float, "X", "PAFU: temperature at the end, as a part of the first")
    group.add_argument(
        "--alternate", type=int, nargs="?", const=3, metavar="K", help="PAFU: a selector step, then K others (3)"
    )
    _option(group, "--distill", float, "X", "weight of the distance to the original network's outputs")
    group.add_argument("--freeze-bn", action="store_true", default=None, help="keep the BatchNorm statistics")
    _option(group, "--recalibrate", int, "N", "training batches that measure BatchNorm statistics at the end")


def _add_operation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("operation")
    group.add_argument("--amp", choices=("no", "fp16", "bf16"), help="automatic mixed precision")
    group.add_argument("--device", choices=("auto", "cpu"), help="cpu: leave a GPU alone")
    group.add_argument("--channels-last", action="store_true", default=None, help="channels-last memory format")
    group.add_argument(
        "--checkpointing", action="store_true", default=None, help="gradient checkpointing (timm models)"
    )
    _option(group, "--checkpoint-every", str, "SPAN", "between checkpoints")
    _option(group, "--max-rollbacks", int, "N", "returns after numbers that are not finite")
    _option(group, "--log-every", int, "N", "steps between rows of the log")
    _option(group, "--seed", int, "N", "of the order, the augmentation and the layers' noise")


def _option(group: Any, flag: str, kind: Any, metavar: str, told: str) -> None:
    group.add_argument(flag, type=kind, metavar=metavar, help=told)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code; 130 when interrupted, with how to go on."""
    from surgeon.zoo.finetune import finetune
    from surgeon.zoo.finetune.folder import RunFolder
    from surgeon.zoo.finetune.loop import Interrupted

    config = read_config(args)
    task = make_task(args, config.seed)
    name = args.model.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    output = args.output or Path("runs", f"{name}-{args.task}")
    if args.dry_run:
        return _dry_run(args, task, config)
    RunFolder(output).check(resume=args.resume, force=args.force)  # before a model is built
    model, original, source = _source(args)
    try:
        result = finetune(
            model,
            task,
            config,
            output,
            original=original,
            source=source,
            resume=args.resume,
            force=args.force,
            quiet=args.quiet,
        )
    except Interrupted as stop:
        print(f"surgeon: {stop}; go on with the same command and --resume", file=sys.stderr)
        return 130
    finally:
        _leave_group()
    if result.main:
        from surgeon.console import width

        if args.json:
            print(json.dumps({"output": str(output), **result.summary.to_dict()}, indent=2))
        else:
            print(f"{result.summary.to_text(width())}written to  {output}")
    return 0


def read_config(args: argparse.Namespace) -> "FinetuneConfig":
    """The options that were given, over the defaults. Raises `ConfigError`."""
    from dataclasses import fields

    from surgeon.zoo.finetune import FinetuneConfig
    from surgeon.zoo.finetune.config import parse_time

    given = {f.name: getattr(args, f.name) for f in fields(FinetuneConfig) if getattr(args, f.name, None) is not None}
    if "max_time" in given:
        given["max_time"] = parse_time(given["max_time"], "--max-time")
    if given.get("clip") == 0:
        given["clip"] = None
    return FinetuneConfig(**given)


def make_task(args: argparse.Namespace, seed: int) -> "Task":
    """The task with its options. Raises `ConfigError`."""
    from surgeon.zoo.tasks import create_task

    options = {key: tuple(value) if isinstance(value, list) else value for key, value in args.task_options}
    if "data" in options:
        raise ConfigError("the task's data are given with --data, not as a --task-option")
    if args.data is not None:
        options["data"] = args.data
    return create_task(args.task, seed=seed, **options)


def _source(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The model, its original where that takes trust, and where the model comes from."""
    from surgeon.models import build_model, restore
    from surgeon.recipe import get_recipe
    from surgeon.zoo.finetune import Source

    if not Path(args.model, "recipe.json").is_file():
        model, base = build_model(args.model, weights=args.weights)
        return model, None, Source(name=args.model, base=base)
    from surgeon.checkpoint import load, read_report

    if args.weights != "auto":
        raise ConfigError(f"{args.model} is a surgeon folder and has its own weights; --weights cannot apply")
    model = load(args.model, trust_factory=args.trust_factory)
    recipe = get_recipe(model)
    base = None if recipe is None else recipe.base
    original = restore(base, trust_factory=True) if args.trust_factory and base is not None else None
    return model, original, Source(name=args.model, base=base, report=read_report(args.model))


def _leave_group() -> None:
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _dry_run(args: argparse.Namespace, task: "Task", config: "FinetuneConfig") -> int:
    from surgeon.zoo.finetune import dry_run

    model, original, _ = _source(args)
    found = dry_run(model, task, config, original=original)
    _leave_group()
    if args.json:
        print(json.dumps({"model": args.model, "task": args.task, **found.to_dict()}, indent=2))
    else:
        print("\n".join(_dry_run_lines(args, found)))
    return 0


def _dry_run_lines(args: argparse.Namespace, found: "DryRun") -> list[str]:
    from surgeon.cost_command import cost_lines
    from surgeon.tables import count, table

    rows = [
        (g["role"], count(g["parameters"]), str(g["tensors"]), f"{g['lr_scale']:g}", f"{g['weight_decay']:g}")
        for g in found.groups
    ]
    lines = [
        f"{args.task}: {found.train_samples} training and {found.val_samples} validation samples, all readable",
        f"{found.steps} steps, {found.epochs:.2f} epochs; one step on this machine: {found.seconds:.2f} s, loss {found.loss:.5g}",
        "",
        table(("parameters", "count", "tensors", "rate x", "decay"), rows),
        "",
    ]
    if found.cost is not None:
        lines += cost_lines(args.model, found.cost)
    return [*lines, *(f"note: {note}" for note in found.notes), "dry run: nothing was written"]
