"""`surgeon inspect`: every convolution of a model."""

import argparse

from surgeon.commands.common import checks
from surgeon.commands.common.arguments import add_model, build, input_size, print_json, weights_for_shapes

DESCRIPTION = "list every convolution: stage, shapes, FLOPs, memory, possible layer types and reasons against others"
EXAMPLES = """  surgeon inspect resnet50
  surgeon inspect torchvision/densenet121 --json

In the JSON document, can_become of a convolution lists the types that it can become, and why_not
has the reasons against each of the others.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `surgeon inspect`; --json, --quiet and --debug are common to all commands."""
    add_model(parser, "random: only shapes matter; a folder has its own")


def check(args: argparse.Namespace) -> None:
    """Refuse invalid arguments before torch is loaded."""
    checks.model_of(args)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    import surgeon
    from surgeon.commands.common.console import Progress, inspection_values, width

    args.weights = weights_for_shapes(args.model, args.weights)
    with Progress(enabled=not args.quiet) as progress:
        progress("build", 0, 2)
        model, base = build(args)
        progress("inspect", 1, 2)
        sites = surgeon.inspect(model, input_size=input_size(args, base))
    if args.json:
        print_json({"model": args.model, "convolutions": inspection_values(sites)})
    else:
        print(sites.to_text(width(), args.model), end="")
    return 0
