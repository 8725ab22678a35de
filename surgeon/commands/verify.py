"""`surgeon verify`: compare a converted model with its original."""

import argparse

from surgeon.commands.common import checks
from surgeon.commands.common.arguments import add_run, print_json, size
from surgeon.errors import CheckpointError, VerificationError

DESCRIPTION = "compare a converted model with its original, layer by layer"
EXAMPLES = "  surgeon verify runs/resnet50-acda\n  surgeon verify runs/mine --weights mine.safetensors --json\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `surgeon verify`; --json, --quiet and --debug are common to all commands."""
    add_run(parser)
    parser.add_argument("--weights", metavar="FILE", help="the original's weights, if the recipe cannot find them")
    parser.add_argument("--input-size", type=size, metavar="SIZE", help="224, 320x240 (HxW) or 3x224x224 (CxHxW)")


def check(args: argparse.Namespace) -> None:
    """Refuse invalid arguments before torch is loaded."""
    checks.run_folder(args.run)
    checks.file(args.weights, "--weights")


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    import surgeon
    from surgeon.commands.common.console import Progress, verification_text, verification_values, width
    from surgeon.models.checkpoint import load
    from surgeon.models.hub import folder
    from surgeon.models.names import restore
    from surgeon.models.weights import changed_tensors
    from surgeon.records.recipe import get_recipe

    with Progress(enabled=not args.quiet) as progress:
        progress("load", 0, 2)
        converted = load(folder(args.run), trust_factory=args.trust_factory)
        recipe = get_recipe(converted)
        if recipe is None or recipe.base is None:
            raise CheckpointError(f"{args.run} does not record its base model: there is nothing to compare it with")
        progress("load", 1, 2)
        original = restore(recipe.base, weights=args.weights, trust_factory=args.trust_factory, flag="--weights")
        progress("verify", 0, 1)
        trained = f"{args.run} was trained after its conversion, so it should differ from its original"
        try:
            result = surgeon.verify(original, converted, input_size=args.input_size or recipe.base.input_size or None)
        except VerificationError as error:
            if recipe.task is None:
                raise
            raise VerificationError(f"{trained}: {error}") from error
        changed = changed_tensors(original, converted)
    if changed:
        shown = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
        told = f"{len(changed)} tensors outside its dynamic layers were changed ({shown})"
        raise VerificationError(f"{args.run if recipe.task is None else trained}: {told}")
    if args.json:
        print_json({"run": args.run, **verification_values(result)})
    else:
        print(verification_text(result, args.run, width()), end="")
    return 0 if result.exact else 1
