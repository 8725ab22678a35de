"""`surgeon collapse`: fold dynamic layers that do not vary back into convolutions. Imports torch when it runs."""

import argparse
from typing import TYPE_CHECKING, Any

from surgeon.commands.common import checks
from surgeon.commands.common.arguments import add_run, print_json, share, whole
from surgeon.errors import ConfigError, InputError, NothingFoldedError
from surgeon.util.outputs import check_output
from surgeon.util.waiting import waiting

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgeon.records.collapse_report import CollapseReport
    from surgeon.records.recipe import BaseModel

DESCRIPTION = "fold dynamic layers that do not vary back into plain convolutions"
EXAMPLES = """  surgeon collapse runs/resnet50-pafu -o runs/resnet50-lean
  surgeon collapse runs/resnet50-pafu --images photos/ -o runs/resnet50-lean
  surgeon collapse runs/resnet50-acda --images photos/ --tolerance 0.02 --dry-run

Without --images, only layers proven constant by their parameters are folded; with them, also
layers that do not vary on them. Exit code 1: nothing could be folded, or the result differs.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `surgeon collapse`; --json, --quiet and --debug are common to all commands."""
    add_run(parser)
    parser.add_argument("-o", "--output", metavar="OUT", help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace OUT if surgeon wrote it")
    parser.add_argument("--dry-run", action="store_true", help="fold and report, but write nothing")
    parser.add_argument("--layers", metavar="NAMES", help="which dynamic layers (default: all)")
    parser.add_argument("--images", metavar="DIR", help="images to observe the layers on")
    parser.add_argument("--limit", type=whole, default=32, metavar="N", help="use at most N of them (default: 32)")
    parser.add_argument(
        "--tolerance",
        type=share,
        default=0.0,
        metavar="T",
        help="largest relative variation of a filter folded at its mean, from 0 to less than 1 (default: 0, exact)",
    )


def run(args: argparse.Namespace) -> int:
    """Returns the exit code; raises `NothingFoldedError` after the report was printed."""
    import surgeon
    from surgeon.commands.common.console import Progress
    from surgeon.models.checkpoint import load, save
    from surgeon.models.hub import folder
    from surgeon.records.recipe import get_recipe

    with waiting(f"loading {args.run}", quiet=args.quiet):
        model = load(folder(args.run), trust_factory=args.trust_factory)
    recipe = get_recipe(model)
    base = recipe.base if recipe is not None else None
    images = _images(args, model, base)
    try:
        with Progress(enabled=not args.quiet) as progress:
            model, report = surgeon.collapse(
                model,
                tolerance=args.tolerance,
                calibration=images,
                input_size=None if base is None else base.input_size or None,
                layers=args.layers,
                inplace=not _is_layer(model),
                progress=progress,
            )
            report.model = args.run
            if not args.dry_run:
                progress("save", 0, 1)
                save(model, args.output, report=report, force=args.force)
    except NothingFoldedError as error:
        _print(args, error.report, None)
        raise
    _print(args, report, None if args.dry_run else args.output)
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse invalid arguments before torch is loaded."""
    if not args.output and not args.dry_run:
        raise ConfigError("give an output folder with -o OUT, or use --dry-run")
    if args.tolerance and not args.images:
        raise ConfigError("--tolerance needs --images to observe how much a layer varies")
    if args.limit < 1:
        raise ConfigError(f"--limit must be at least 1 image, got {args.limit}")
    if not args.dry_run:
        check_output(args.output, force=args.force)
    checks.run_folder(args.run)
    checks.converted(args.run, "collapse")
    checks.folder(args.images, "--images", InputError)


def _images(args: argparse.Namespace, model: "nn.Module", base: "BaseModel | None") -> "Tensor | None":
    if args.images is None:
        return None
    from surgeon.models.images import read_images

    if base is None:
        raise ConfigError("--images needs the base model's transform, and this folder does not name its base model")
    return read_images(args.images, model, base, limit=args.limit, option="--images")


def _is_layer(model: "nn.Module") -> bool:
    from surgeon.layers.base import DynamicConv2d

    return isinstance(model, DynamicConv2d)


def _print(args: argparse.Namespace, report: "CollapseReport | Any", written: str | None) -> None:
    from surgeon.commands.common.console import width

    report.model = args.run
    if args.json:
        print_json({"output": written, **report.to_dict()})
        return
    print(report.to_text(width()), end="")
    if report.folded:
        left = len(report.kept)
        print(f"dynamic layers that remain: {left}" if left else "no dynamic layer remains")
        print(f"written to  {written}" if written else "dry run: nothing was written")
