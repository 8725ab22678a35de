"""`surgeon try`: does a conversion pay off on these data? Imports torch when it runs."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.commands.common import checks
from surgeon.commands.common.arguments import (
    add_amp,
    add_batch_size,
    add_device,
    add_lr,
    add_pairs,
    add_trust,
    add_weights,
    add_workers,
    amp,
    build,
    building,
    model_name,
    model_options,
    positive,
    print_json,
    tell,
)
from surgeon.commands.common.tasks import add_task, make_task, settle
from surgeon.errors import ConfigError
from surgeon.models.places import factory_of
from surgeon.records.training import check_resumed_trial
from surgeon.util.files import here
from surgeon.util.outputs import check_trial_output
from surgeon.util.parse import parse_time
from surgeon.util.waiting import waiting

if TYPE_CHECKING:
    from surgeon.zoo.trial import Answer, TryConfig

NEEDS = ("torch", "timm", "accelerate", "torchmetrics")  # libraries
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
    add_task(group)
    add_weights(group)
    add_trust(group)
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
    group = parser.add_argument_group("training")
    add_batch_size(group, "samples per step (default: 32)", 32)
    add_lr(group, "one for both, or several to try (default: 1e-4 3e-4 1e-3)", nargs="+")
    add_amp(group, amp)
    add_device(group)
    add_workers(group)
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o", "--output", type=Path, metavar="OUT", help="folder to write (default: runs/MODEL-TASK-try)"
    )
    group.add_argument("--resume", action="store_true", help="resume the trial in OUT; --max-time may be longer")
    group.add_argument("--force", action="store_true", help="replace OUT if surgeon try wrote it")


def check(args: argparse.Namespace) -> None:
    """Refuse invalid arguments before torch is loaded; settles the task."""
    if args.recipe and (args.layers or args.type or args.options):
        raise ConfigError("--recipe defines layers, types and options: leave out --layers, --type and --option")
    parse_time(args.max_time, "--max-time")
    checks.recipe(args.recipe)
    checks.layer_type(args.type, checks.layer_options(args.type, args.options))
    checks.model_of(args)
    checks.plain(args.model, "a trial")
    settle(args)
    check_trial_output(_output(args), resume=args.resume, force=args.force)
    if args.resume:
        check_resumed_trial(_output(args), _settings(args), dict(args.task_options))


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of the trial that are known before torch is loaded, by their names in its record."""
    return {
        "model": args.model,
        "model options": model_options(args),
        "task": args.task,
        "layer options": checks.layer_options(args.type, args.options),
        **({} if args.lr is None else {"rates": args.lr}),
        "steps": args.steps,
        "training": {name: value for name in ("amp", "batch_size") if (value := getattr(args, name)) is not None},
    }


def _output(args: argparse.Namespace) -> Path:
    return args.output or Path("runs", f"{model_name(args.model)}-{args.task}-try")


def run(args: argparse.Namespace) -> int:
    """Returns the exit code: 1 if not one pair could be compared, 130 when interrupted, with a hint on how to resume."""
    from surgeon.zoo.trial import try_conversion
    from surgeon.zoo.trial.run import TrialInterrupted

    output = _output(args)
    config = _config(args)
    make_task(args, 0)  # report invalid options before a model is built
    with waiting(building(args), quiet=args.quiet):
        model, base = build(args, head="weights")
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
            began=args.began,
            tell=lambda text: tell(args, text),
        )
    except TrialInterrupted:
        print("surgeon: interrupted; resume with the same command and --resume", file=sys.stderr)
        return 130
    _print(args, answer, output)
    return 0 if answer.gains else 1


def _config(args: argparse.Namespace) -> "TryConfig":
    from surgeon.records.recipe import Recipe
    from surgeon.zoo.finetune import FinetuneConfig
    from surgeon.zoo.trial import TryConfig

    given: dict[str, Any] = {name: getattr(args, name) for name in ("amp", "device", "batch_size", "workers")}
    base = FinetuneConfig(recalibrate=0, **{name: value for name, value in given.items() if value is not None})
    return TryConfig(
        type=args.type,
        layers=args.layers,
        options=checks.layer_options(args.type, args.options),
        recipe=Recipe.read(args.recipe) if args.recipe else None,
        max_time=parse_time(args.max_time, "--max-time"),
        seeds=args.seeds,
        steps=args.steps,
        base=base,
        **({} if args.lr is None else {"rates": tuple(args.lr)}),
    )


def resumed(args: argparse.Namespace, answer: "Answer") -> str:
    """The command that resumes the trial: with the time for the seeds that an answer takes, or with twice the seeds and time."""
    from surgeon.zoo.trial.speed import minutes

    longer = answer.more_time or 2 * max(answer.seconds, parse_time(args.max_time))
    more = ["--resume", "--max-time", minutes(longer)]
    if answer.stopped == "seeds":
        more += ["--seeds", str(2 * args.seeds)]
    words, replaced = list(args.argv), {"--force", *(word for word in more if word.startswith("--"))}
    for place in [place for place, word in enumerate(words) if word.partition("=")[0] in replaced][::-1]:
        alone = words[place] in ("--force", "--resume") or "=" in words[place]
        del words[place : place + (1 if alone else 2)]
    return shlex.join(["surgeon", *words, *more])


def _print(args: argparse.Namespace, answer: "Answer", output: Path) -> None:
    from surgeon.commands.common.console import width
    from surgeon.zoo.trial.folder import TryFolder
    from surgeon.zoo.trial.report import write_report

    folder = TryFolder(output)
    data = "" if args.data is None else f" --data {args.data}"
    trust = "" if factory_of(folder.model) is None else " --trust-factory"
    settings = f" --lr {answer.rates['converted']:g}" if "converted" in answer.rates else ""
    settings += f" --batch-size {args.batch_size}" if args.batch_size else ""
    go_on = (
        f"surgeon finetune {output}/model --task {args.task}{data} -o {output}-finetuned --epochs 10{settings}{trust}"
    )
    page = write_report(answer, folder.report, go_on, resumed(args, answer))
    model = str(output / "model") if folder.model.is_dir() else None
    values = {"output": str(output), "model_folder": model, "report": str(page), **answer.to_dict()}
    folder.write(folder.answer, values)
    if args.json:
        print_json(values)
    else:
        print(answer.to_text(width()), end="")
        print(
            "".join(f"{told:<11} {path}\n" for told, path in (("report", here(page)), ("model", model)) if path), end=""
        )
