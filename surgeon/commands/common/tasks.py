"""The task of a command: its arguments, and the task recorded in a fine-tuned folder."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.commands.common import checks
from surgeon.commands.common.arguments import add_pairs, tell
from surgeon.errors import ConfigError, DataError, RecipeError
from surgeon.records.recipe import Trained, trained
from surgeon.util import declared
from surgeon.util.files import read_object
from surgeon.util.outputs import RECIPE

if TYPE_CHECKING:
    from surgeon.zoo.recipes import TrainingRecipe
    from surgeon.zoo.tasks import Task

DATA_PAGE = "docs/tasks.md"  # where the folders are described


def add_task(group: Any, default: str = "the one a fine-tuned folder was trained on") -> None:
    """`--task`, `--data` and `--task-option`."""
    group.add_argument("--task", metavar="TASK", help=f"classification, denoising, ... (default: {default})")
    group.add_argument("--data", type=Path, metavar="DIR", help=f"the task's data, laid out as in {DATA_PAGE}")
    told = "any option of the task; a fine-tuned folder's own are the default"
    add_pairs(group, "--task-option", told, dest="task_options")


def settle(args: argparse.Namespace) -> None:
    """Set `args.task` and `args.task_options` to the given values, defaulting to those the model's folder was trained with.

    Raises `ConfigError` without a task, and for options that are not the task's. Nothing heavy is loaded.
    """
    kept = recorded(args.model)
    if args.task is None and kept is not None:
        args.task = kept.name
    if args.task is None:
        names = ", ".join(sorted(declared.tasks()))
        raise ConfigError(f"--task must be given: {args.model} does not record a task; tasks are {names}")
    known = declared.tasks().get(args.task)  # nothing is known here about a third-party task
    given = checks.typed(known, args.task_options)
    same = kept is not None and kept.name == args.task
    options = kept.options if kept is not None and same else {}
    checks.task(args.task, given, args.data)
    if args.data is None and known is not None and "train" in known.options and not {"train", "val"} & set(given):
        raise DataError(
            f"task {args.task} needs data: --data DIR, laid out as in {DATA_PAGE} (in most cases train/ and val/ in it), or "
            "--task-option train=DIR val=DIR"
        )
    args.task_options = list((options | given).items())
    if options and not set(options) <= set(given):
        taken = ", ".join(f"{key}={_shown(value)}" for key, value in options.items() if key not in given)
        own = ", ".join(f"{key}={_shown(value)}" for key, value in given.items())
        tell(args, f"as recorded in {args.model}: {args.task} with {taken}{f'; as given: {own}' if own else ''}")


def recorded(model: str | None) -> Trained | None:
    """The task recorded in a fine-tuned folder on this machine."""
    file = Path(model or "", RECIPE)
    if model is None or not file.is_file():
        return None
    return trained(read_object(file, RecipeError).get("task"), f"{file}: task")


def make_task(args: argparse.Namespace, seed: int, recipe: "TrainingRecipe | None" = None, **more: Any) -> "Task":
    """The task with its options, and `more` of them. Raises `ConfigError`, with a hint on `--data` if data are missing."""
    from surgeon.zoo.tasks import create_task

    options = {key: tuple(value) if isinstance(value, list) else value for key, value in args.task_options} | more
    if recipe is not None:
        return recipe.make_task(args.data, seed=seed, **options)
    if args.data is not None:
        options["data"] = args.data
    return create_task(args.task, seed=seed, **options)


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
