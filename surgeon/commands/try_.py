"""`surgeon try`: does a conversion pay off on these data? Imports torch when it runs."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.commands.arguments import add_pairs, add_training_options, positive, print_json
from surgeon.errors import ConfigError

if TYPE_CHECKING:
    from surgeon.zoo.trial import Answer, TryConfig

DESCRIPTION = "does a conversion pay on your data? trains original and converted equally, and answers; resumable"
EXAMPLES = """  surgeon try resnet18 --task classification --data photos/ --max-time 30m
  surgeon try resnet18 --task classification --data photos/ --max-time 2h --resume
  surgeon try zoo/dncnn --task denoising --data photos/ --task-option sigma=25 --type pafu
  surgeon try resnet18 --task classification --data photos/ --layers stage4 --type acda --lr 1e-4 3e-4

What is converted: --layers and --type, or --recipe; by default the layer whose paper is on the task. Both networks get the same
data, steps and seeds, and the same learning rates to choose from, with seed 0 on validation images that do not judge. "gain" and
"loss" are beyond two standard errors of the paired differences of at least three seeds; anything else is no answer, and says so.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `surgeon try`; --json, --quiet and --debug are common to all commands."""
    parser.add_argument("model", metavar="MODEL", help="a model's name, or a folder written by surgeon; not converted")
    group = parser.add_argument_group("model and task")
    group.add_argument("--task", required=True, metavar="TASK", help="classification, denoising, ...")
    group.add_argument("--data", type=Path, metavar="DIR", help="the task's data")
    group.add_argument("--weights", default="auto", metavar="auto|pretrained|random|FILE", help="default: auto")
    add_pairs(group, "--model-args", "any option of the model")
    add_pairs(group, "--task-option", "any option of the task", dest="task_options")
    group = parser.add_argument_group("conversion (default: that of the task)")
    group.add_argument("--layers", metavar="SELECTION", help="which convolutions, as for surgeon convert")
    group.add_argument("--type", metavar="TYPE", help="acda, pafu or sekg")
    group.add_argument("--recipe", metavar="FILE|zoo/NAME", help="rules from a recipe")
    add_pairs(group, "--option", "any layer option", dest="options")
    group = parser.add_argument_group("how long")
    group.add_argument(
        "--max-time", default="30m", metavar="TIME", help="for everything: 90s, 30m, 1.5h (default: 30m)"
    )
    group.add_argument("--seeds", type=positive, default=5, metavar="N", help="maximum number of pairs (default: 5)")
    group.add_argument(
        "--steps", type=positive, metavar="N", help="optimizer steps per run (default: what the time allows)"
    )
    group = add_training_options(parser.add_argument_group("training"))
    group.add_argument(
        "--lr", type=float, nargs="+", metavar="X", help="one for both, or several to try (default: 1e-4 3e-4 1e-3)"
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o", "--output", type=Path, metavar="OUT", help="folder to write (default: runs/MODEL-TASK-try)"
    )
    group.add_argument("--resume", action="store_true", help="resume the trial in OUT; --max-time may be longer")
    group.add_argument("--force", action="store_true", help="replace OUT if surgeon try wrote it")


def run(args: argparse.Namespace) -> int:
    """Returns the exit code: 1 if not one pair could be compared, 130 when interrupted, with a hint on how to resume."""
    from surgeon.commands.finetune import make_task
    from surgeon.models.names import build_model
    from surgeon.zoo.trial import try_conversion
    from surgeon.zoo.trial.folder import TryFolder

    name = args.model.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    output = args.output or Path("runs", f"{name}-{args.task}-try")
    config = _config(args)
    make_task(args, 0)  # report invalid options before a model is built
    TryFolder(output).check(resume=args.resume, force=args.force)
    model, base = build_model(args.model, weights=args.weights, options=dict(args.model_args))
    try:
        answer = try_conversion(
            model,
            lambda seed: make_task(args, seed),
            output,
            config,
            name=args.model,
            base=base,
            resume=args.resume,
            force=args.force,
            quiet=args.quiet,
            tell=lambda text: _tell(args, text),
        )
    except KeyboardInterrupt:
        if not TryFolder(output).record.is_file():
            raise
        print("surgeon: interrupted; resume with the same command and --resume", file=sys.stderr)
        return 130
    _print(args, answer, output)
    return 0 if answer.gains else 1


def _config(args: argparse.Namespace) -> "TryConfig":
    from surgeon.records.recipe import Recipe
    from surgeon.zoo.finetune import FinetuneConfig
    from surgeon.zoo.finetune.config import parse_time
    from surgeon.zoo.trial import TryConfig

    if args.recipe and (args.layers or args.type or args.options):
        raise ConfigError("--recipe defines layers, types and options: leave out --layers, --type and --option")
    given: dict[str, Any] = {name: getattr(args, name) for name in ("amp", "device", "batch_size", "workers")}
    base = FinetuneConfig(recalibrate=0, **{name: value for name, value in given.items() if value is not None})
    return TryConfig(
        type=args.type,
        layers=args.layers,
        options=dict(args.options),
        recipe=Recipe.read(args.recipe) if args.recipe else None,
        max_time=parse_time(args.max_time, "--max-time"),
        seeds=args.seeds,
        steps=args.steps,
        base=base,
        **({} if args.lr is None else {"rates": tuple(args.lr)}),
    )


def _print(args: argparse.Namespace, answer: "Answer", output: Path) -> None:
    from surgeon.commands.console import width
    from surgeon.zoo.trial.folder import TryFolder
    from surgeon.zoo.trial.report import write_report

    folder = TryFolder(output)
    data = "" if args.data is None else f" --data {args.data}"
    page = write_report(answer, folder.report, f"surgeon finetune {output}/model --task {args.task}{data} --epochs 10")
    model = str(output / "model") if folder.model.is_dir() else None
    values = {"output": str(output), "model_folder": model, "report": str(page), **answer.to_dict()}
    folder.write(folder.answer, values)
    if args.json:
        print_json(values)
    else:
        print(answer.to_text(width()), end="")
        print(
            "".join(f"{told:<11} {path}\n" for told, path in (("report", page), ("go on with", model)) if path), end=""
        )


def _tell(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(f"surgeon: {text}", file=sys.stderr, flush=True)
