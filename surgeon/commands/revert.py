"""`surgeon revert`: turn dynamic layers into plain convolutions."""

import argparse

from surgeon.commands.common import checks
from surgeon.commands.common.arguments import add_output, add_run, print_json
from surgeon.util.outputs import check_output
from surgeon.util.waiting import waiting

DESCRIPTION = "turn dynamic layers back into plain convolutions"
EXAMPLES = (
    "  surgeon revert runs/resnet50-acda -o runs/resnet50-plain\n"
    "  surgeon revert runs/resnet50-acda --layers layer4 -o runs/resnet50-stage3\n"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `surgeon revert`; --json, --quiet and --debug are common to all commands."""
    add_run(parser)
    parser.add_argument("--layers", metavar="SELECTION", help="which dynamic layers (default: all)")
    add_output(parser, required=True, help_="folder to write")


def check(args: argparse.Namespace) -> None:
    """Refuse invalid arguments before torch is loaded."""
    check_output(args.output, force=args.force)
    checks.run_folder(args.run)
    checks.converted(args.run, "revert")


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    import surgeon
    from surgeon.models.checkpoint import load, save
    from surgeon.models.hub import folder
    from surgeon.surgery.rewrite import dynamic_layers

    with waiting(f"reverting {args.run}", quiet=args.quiet):
        model = load(folder(args.run), trust_factory=args.trust_factory)
        names = list(dynamic_layers(model, args.layers))
        model = surgeon.revert(model, args.layers)
        left = len(dynamic_layers(model))
        save(model, args.output, force=args.force)
    if args.json:
        print_json({"output": args.output, "reverted": names, "remaining": left})
        return 0
    said = f"dynamic layers that remain: {left}" if left else "no dynamic layer remains: these are plain model weights"
    plural = "s" if len(names) != 1 else ""
    print(f"{len(names)} layer{plural} reverted to plain convolutions: {', '.join(names)}")
    print(f"{said}\nwritten to  {args.output}")
    return 0
