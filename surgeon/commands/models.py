"""`surgeon models`: the known model names."""

import argparse
from typing import Any

from surgeon.commands.common import checks
from surgeon.commands.common.arguments import print_json
from surgeon.errors import ConfigError

DESCRIPTION = "list the known model names"
EXAMPLES = "  surgeon models 'resnet*'\n  surgeon models torchvision/ --json\n  surgeon models 'resnet*' --type acda\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `surgeon models`; --json, --quiet and --debug are common to all commands."""
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="a glob, or part of the name")
    parser.add_argument(
        "--type",
        metavar="TYPE",
        help="count the convolutions of each that can become acda, pafu or sekg; builds every model",
    )


def check(args: argparse.Namespace) -> None:
    """Refuse invalid arguments before torch is loaded."""
    checks.layer_type(args.type)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    from surgeon.models.specs import model_names, nearest

    if args.type is not None:
        from surgeon.layers.registry import layer_class

        layer_class(args.type)  # report errors before anything is built

    names = model_names(args.pattern)
    if not names:
        raise ConfigError(f"no model matches {args.pattern!r}{nearest(args.pattern)}")
    if args.type is not None:
        _print_fitting(args, names)
    elif args.json:
        print_json(names)
    else:
        print("\n".join(names))
    return 0


def _print_fitting(args: argparse.Namespace, names: list[str]) -> None:
    """Print a line for each model as soon as it is known; nothing is downloaded, and models have no weights."""
    import surgeon
    from surgeon.commands.common.console import Progress
    from surgeon.errors import SurgeonError
    from surgeon.models.names import shapes_of
    from surgeon.surgery.plan import can_become

    rows = []
    with Progress(enabled=not args.quiet and args.json) as progress:
        for number, name in enumerate(names):
            progress(f"checking {name}", number, len(names))
            row: dict[str, Any] = {"model": name, "convolutions": None, "fitting": None, "why_not": None}
            try:
                sites = surgeon.inspect(shapes_of(name))
                row["convolutions"] = len(sites)
                row["fitting"] = sum(not can_become(site)[args.type] for site in sites)
            except (SurgeonError, RuntimeError) as error:
                row["why_not"] = str(error).splitlines()[0]
            rows.append(row)
            if not args.json:
                told = (
                    row["why_not"] or f"{row['fitting']} of {row['convolutions']} convolutions can become {args.type}"
                )
                print(f"{name}: {told}", flush=True)
    if args.json:
        print_json(rows)
