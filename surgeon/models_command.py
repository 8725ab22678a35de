"""`surgeon models`: the names that can be given."""

import argparse

from surgeon.arguments import print_json
from surgeon.errors import ConfigError

DESCRIPTION = "list the models that can be named"
EXAMPLES = "  surgeon models 'resnet*'\n  surgeon models torchvision/ --json\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `surgeon models`, beside --json, --quiet and --debug."""
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="a glob, or a part of the name")


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    from surgeon.models import model_names, nearest

    names = model_names(args.pattern)
    if not names:
        raise ConfigError(f"no model matches {args.pattern!r}{nearest(args.pattern)}")
    if args.json:
        print_json(names)
    else:
        print("\n".join(names))
    return 0
