"""`surgeon finetune`: train a converted (or plain) network on a task. Imports torch when it runs."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.commands.common import checks
from surgeon.commands.common.arguments import (
    above_zero,
    add_amp,
    add_device,
    add_lr,
    add_trust,
    add_weights,
    amp,
    building,
    decay,
    model_name,
    model_options,
    natural,
    not_negative,
    positive,
    print_json,
    seed,
    tell_weights,
    with_default,
)
from surgeon.commands.common.tasks import add_task, make_task, settle
from surgeon.errors import ConfigError
from surgeon.models.places import check_own
from surgeon.records.training import check_resumed
from surgeon.util.declared import training_defaults
from surgeon.util.outputs import check_run_output, is_surgeon_folder
from surgeon.util.parse import parse_span, parse_time
from surgeon.util.waiting import waiting

if TYPE_CHECKING:
    from torch import nn

    from surgeon.zoo.finetune import FinetuneConfig, Source
    from surgeon.zoo.finetune.dry import DryRun
    from surgeon.zoo.recipes import TrainingRecipe
    from surgeon.zoo.tasks import Task

NEEDS = ("torch", "timm", "accelerate", "torchmetrics")  # libraries
DESCRIPTION = "train a converted network on a task, or a zoo network by its paper's recipe; crash-safe, resumable"
EXAMPLES = """  surgeon finetune runs/resnet50-acda --task classification --data imagenet/ --epochs 10 --amp bf16
  surgeon finetune runs/resnet50-acda --task classification --data imagenet/ --new-first 1ep --warmup 5% --ema 0.999
  surgeon finetune runs/dncnn-pafu --task denoising --data photos/ --task-option sigma=25 --alternate --distill 0.1
  surgeon finetune runs/resnet50-acda --task classification --data imagenet/ --dry-run
  surgeon finetune runs/resnet50-acda --task classification --data imagenet/ --epochs 10 --amp bf16 --resume
  surgeon finetune --recipe adfnet --data DIV2K/ --amp bf16
  surgeon finetune zoo/adfnet_wo_dcb_mdcb --recipe adfnet --preset small --data photos/ --task-option sigma=30
  torchrun --nproc-per-node 4 -m surgeon finetune runs/resnet50-acda --task classification --data imagenet/

spans (--warmup, --new-first, ...) are optimizer steps (200), epochs (1.5ep) or a percentage of the run (5%)
recipes are files with a paper's network, task and options (surgeon zoo NAME lists those of a network); every other
option given here overrides the recipe's
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `surgeon finetune`; --json, --quiet and --debug are common to all commands.

    Options of the run's config have no default here: those not given are left to `FinetuneConfig`.
    """
    parser.add_argument(
        "model",
        nargs="?",
        metavar="RUN|MODEL",
        help="a folder written by surgeon, or a model's name (default: the recipe's network)",
    )
    group = parser.add_argument_group("model, task and output")
    add_task(group, "the recipe's, or the one that a fine-tuned folder was trained on")
    group.add_argument("--recipe", metavar="NAME|FILE", help="a training recipe: surgeon's by name, or a .json file")
    group.add_argument(
        "--preset",
        dest="presets",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="presets of the recipe, later ones override; small: minutes on a CPU",
    )
    add_weights(group)
    group.add_argument(
        "--original-weights", metavar="FILE", help="those of the network before its conversion, if moved"
    )
    add_trust(group)
    group.add_argument("-o", "--output", type=Path, metavar="OUT", help="folder to write (default: runs/NAME-TASK)")
    group.add_argument("--force", action="store_true", help="replace OUT if surgeon wrote it")
    group.add_argument("--resume", action="store_true", help="resume the run in OUT, with the same options and data")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="check the data, try one step and one batch of validation, predict the cost; write nothing",
    )
    _add_length(parser)
    _add_optimizer(parser)
    _add_layers(parser)
    _add_operation(parser)


def _add_length(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("length and batches")
    _option(
        group,
        "--epochs",
        above_zero,
        "N",
        "passes over the training data (default: 10, or as many as --max-steps takes)",
    )
    _option(group, "--max-steps", positive, "N", "number of optimizer steps; with --epochs too, the smaller length")
    _option(group, "--max-time", str, "TIME", "maximum time, including evaluations and data loading: 90s, 30m, 1.5h")
    _option(group, "--batch-size", positive, "N", "samples per micro-step, over all processes")
    _option(group, "--accumulate", positive, "N", "micro-steps per optimizer step")
    _option(group, "--eval-batch-size", positive, "N", "samples per batch in evaluation")
    _option(group, "--workers", natural, "N", "data-loading processes; 0 loads in the training process")
    _option(group, "--eval-every", str, "SPAN", "between evaluations")
    _option(group, "--patience", positive, "N", "stop after N evaluations without a better one")
    group.add_argument(
        "--keep", choices=("best", "last"), help=with_default("--keep", "which weights to keep as the result")
    )


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimizer")
    _option(group, "--opt", str, "NAME", "any of timm's optimizers")
    add_lr(group, with_default("--lr", "peak learning rate"))
    _option(group, "--weight-decay", not_negative, "X", "weight decay, except on norms and biases")
    _option(group, "--momentum", not_negative, "X", "momentum, for optimizers that have one")
    schedules = ("cosine", "poly", "step", "multistep", "tanh", "constant")
    group.add_argument("--sched", choices=schedules, help=with_default("--sched", "one of timm's schedules"))
    _option(group, "--decay-rate", above_zero, "X", "step, multistep: factor on the rate; poly: the power")
    _option(group, "--decay-every", str, "SPAN", "step: span between decays")
    group.add_argument(
        "--milestones", nargs="+", action="extend", metavar="SPAN", help="multistep: when the rate decays"
    )
    _option(group, "--warmup", str, "SPAN", "linear warm-up")
    _option(group, "--min-lr", not_negative, "X", "final learning rate of the schedule")
    _option(group, "--clip", not_negative, "X", "maximum gradient norm; 0: no limit")
    _option(group, "--ema", decay, "DECAY", "keep an average of the weights")


def _add_layers(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("dynamic layers")
    _option(
        group,
        "--new-lr-scale",
        above_zero,
        "X",
        "rate of new parameters, as a multiple of --lr (default: ACDA 1, other types 0.1)",
    )
    group.add_argument(
        "--fan-in-lr",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=with_default("--fan-in-lr", "slow the last weight of a generator in proportion to its inputs"),
    )
    _option(group, "--new-first", str, "SPAN", "train only new parameters for SPAN first")
    _option(group, "--regularization", not_negative, "X", "weight of the layers' own loss (PAFU: decorrelation)")
    _option(group, "--temperature-end", above_zero, "X", "PAFU: final temperature, as a fraction of the initial one")
    group.add_argument(
        "--alternate",
        type=positive,
        nargs="?",
        const=3,
        metavar="K",
        help="PAFU: alternate one selector step with K others (3)",
    )
    _option(group, "--distill", not_negative, "X", "weight of the distance to the original network's outputs")
    group.add_argument("--freeze-bn", action="store_true", default=None, help="keep the BatchNorm statistics")
    _option(group, "--recalibrate", natural, "N", "training batches for recalibrating BatchNorm at the end")


def _add_operation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("operation")
    add_amp(group, amp)
    add_device(group)
    group.add_argument("--channels-last", action="store_true", default=None, help="channels-last memory format")
    group.add_argument(
        "--checkpointing", action="store_true", default=None, help="gradient checkpointing (timm models)"
    )
    _option(group, "--checkpoint-every", str, "SPAN", "between checkpoints")
    _option(group, "--max-rollbacks", natural, "N", "maximum rollbacks after NaN or infinity")
    _option(group, "--log-every", positive, "N", "steps between rows of the log")
    _option(group, "--seed", seed, "N", "seed for order, augmentation and the layers' noise")


def _option(group: Any, flag: str, kind: Any, metavar: str, told: str) -> None:
    group.add_argument(flag, type=kind, metavar=metavar, help=with_default(flag, told))


def check(args: argparse.Namespace) -> None:
    """Refuse invalid arguments before torch is loaded; settles the task unless a recipe does."""
    if args.max_time is not None:
        parse_time(args.max_time, "--max-time")
    for name in ("eval_every", "decay_every", "warmup", "new_first", "checkpoint_every", "milestones"):
        given, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        for span in given if isinstance(given, list) else [given] if given is not None else []:
            if parse_span(span, flag)[0] == 0 and (name.endswith("_every") or name == "milestones"):
                raise ConfigError(f"{flag} must be more than 0, got {span!r}")
    if args.model is not None:
        checks.model_of(args)
    checks.file(args.original_weights, "--original-weights")
    if args.recipe is None:
        if args.model is None:
            raise ConfigError(
                "RUN|MODEL must be given, and --task; or --recipe NAME, which brings both (surgeon zoo NAME names the "
                "recipes of a network)"
            )
        if args.presets:
            raise ConfigError(f"--preset {args.presets[0]} is a preset of a recipe, and --recipe is missing")
        settle(args)
    elif args.recipe.endswith(".json"):
        checks.file(args.recipe, "--recipe")
    else:
        checks.training_recipe(args.recipe)
    checks.folder(args.data, "--data")
    if not args.dry_run and (args.output or args.model):
        _check_run(args)


def _check_run(args: argparse.Namespace) -> None:
    """Refuse an occupied output, and options that contradict those of the run to resume."""
    output = _output(args, args.task if args.recipe is None else Path(args.recipe).stem)
    check_run_output(output, resume=args.resume, force=args.force)
    if args.resume:
        defaults = training_defaults()
        given = _given(args, (*defaults, "milestones"))
        config = given if args.recipe is not None else defaults | given
        if "epochs" not in given:
            config.pop("epochs", None)  # follows from --max-steps
        check_resumed(output, model=args.model, task=args.task, config=config, options=dict(args.task_options))


def _output(args: argparse.Namespace, what: str) -> Path:
    return args.output or Path("runs", f"{model_name(args.model)}-{what}")


def run(args: argparse.Namespace) -> int:
    """Returns the exit code; 130 when interrupted, with a hint on how to resume."""
    from surgeon.zoo.finetune import finetune
    from surgeon.zoo.finetune.folder import RunFolder
    from surgeon.zoo.finetune.loop import Interrupted
    from surgeon.zoo.finetune.optimizer import check_optimizer

    recipe = read_recipe(args)
    config = read_config(args, recipe)
    check_optimizer(config.opt)
    task = make_task(args, config.seed, recipe)
    if args.model is None and recipe is not None:
        args.model = f"zoo/{recipe.networks[0]}"
    output = _output(args, task.name if recipe is None else Path(recipe.name).stem)
    if not args.dry_run:
        RunFolder(output).check(resume=args.resume, force=args.force)  # before a model is built
    with waiting(building(args), quiet=args.quiet):
        model, source = _source(args, config.seed, recipe)
    config = read_config(args, recipe, model)
    if args.dry_run:
        return _dry_run(args, model, source, task, config)
    try:
        result = finetune(
            model,
            task,
            config,
            output,
            source=source,
            resume=args.resume,
            force=args.force,
            quiet=args.quiet,
            began=args.began,
        )
    except Interrupted as stop:
        print(f"surgeon: {stop}; resume with the same command and --resume", file=sys.stderr)
        return 130
    finally:
        _leave_group()
    if result.main:
        from surgeon.commands.common.console import width

        if args.json:
            print_json({"output": str(output), **result.summary.to_dict()})
        else:
            print(f"{result.summary.to_text(width())}written to  {output}")
    return 0


def read_recipe(args: argparse.Namespace) -> "TrainingRecipe | None":
    """The training recipe with its presets, None if there is none. Raises `ConfigError`."""
    if args.recipe is None:
        return None
    from surgeon.zoo.recipes import training_recipe

    recipe = training_recipe(args.recipe).with_presets(*args.presets)
    if args.task not in (None, recipe.task):
        raise ConfigError(f"recipe {recipe.name} is for the task {recipe.task}, got --task {args.task}")
    return recipe


def read_config(
    args: argparse.Namespace, recipe: "TrainingRecipe | None" = None, model: "nn.Module | None" = None
) -> "FinetuneConfig":
    """The options given, over the recipe's as far as they apply to this model, over the defaults.

    Raises `ConfigError`.
    """
    from dataclasses import fields

    from surgeon.zoo.finetune import FinetuneConfig

    given = _given(args, [field.name for field in fields(FinetuneConfig)])
    return FinetuneConfig(**given) if recipe is None else recipe.config(model, **given)


def _given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The options of the run's config, of these names, that were given."""
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    if "max_time" in given:
        given["max_time"] = parse_time(given["max_time"], "--max-time")
    if given.get("clip") == 0:
        given["clip"] = None
    return given


def _source(args: argparse.Namespace, seed: int, recipe: "TrainingRecipe | None") -> "tuple[nn.Module, Source]":
    """The model and its origin."""
    from surgeon.models.hub import folder_if_any
    from surgeon.models.names import build_model
    from surgeon.records.recipe import get_recipe
    from surgeon.zoo.finetune import Source

    folder = folder_if_any(args.model)
    if not is_surgeon_folder(folder):
        options = model_options(args)
        if recipe is None:
            model, base = build_model(args.model, weights=args.weights, options=options, head="weights")
            tell_weights(args, base)
        else:
            model, base = recipe.make_model(args.model, weights=args.weights, seed=seed, options=options)
        return model, Source(name=args.model, base=base)
    from surgeon.models.checkpoint import load, read_report

    check_own(args.model, weights=args.weights, num_classes=args.num_classes, options=dict(args.model_args))
    model = load(folder, trust_factory=args.trust_factory)
    recorded = get_recipe(model)
    base = None if recorded is None else recorded.base
    return model, Source(
        name=args.model,
        base=base,
        report=read_report(folder),
        trust_factory=args.trust_factory,
        original_weights=args.original_weights,
    )


def _leave_group() -> None:
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _dry_run(
    args: argparse.Namespace, model: "nn.Module", source: "Source", task: "Task", config: "FinetuneConfig"
) -> int:
    from surgeon.zoo.finetune import dry_run

    with waiting("trying a step and a validation batch", quiet=args.quiet):
        found = dry_run(model, task, config, source=source)
    _leave_group()
    if args.json:
        print_json({"model": args.model, "task": task.name, **found.to_dict()})
    else:
        print("\n".join(_dry_run_lines(args.model, task.name, found)))
    return 0


_RATES = (
    "New parameters learn at --new-lr-scale times it (by default each layer type's own); the weight with which a generator ends, "
    "in proportion to its inputs, slower still (--no-fan-in-lr: not)"
)


def _role(group: dict[str, Any]) -> str:
    return group["role"] if group["slowed"] == 1 else f"{group['role']}, last weights"


def _dry_run_lines(model: str, task: str, found: "DryRun") -> list[str]:
    from surgeon.commands.common.console import width
    from surgeon.costs.text import cost_lines
    from surgeon.util.tables import count, paragraph, table

    rows = [
        (_role(g), count(g["parameters"]), str(g["tensors"]), f"{g['lr_scale']:.3g}", f"{g['weight_decay']:g}")
        for g in found.groups
    ]
    lines = [
        f"{task}: {found.train_samples} training and {found.val_samples} validation samples, all readable",
        f"{found.steps} steps, {found.epochs:.2f} epochs; one step on this machine: {found.seconds:.2f} s, loss {found.loss:.5g}",
        "",
        table(("parameters", "count", "tensors", "rate x", "decay"), rows),
        paragraph(f"rate x: factor on --lr. {_RATES}", width=width(), hang="  "),
        "",
    ]
    if found.cost is not None:
        lines += cost_lines(model, found.cost)
    return [*lines, *(f"note: {note}" for note in found.notes), "dry run: nothing was written"]
