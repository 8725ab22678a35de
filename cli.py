"""The `surgeon` command: its arguments, and handlers that return an exit code.

The result goes to stdout (`--json`: one document), everything else to stderr. Exit codes: 0 done, 1 a check failed or nothing
could be replaced, 2 wrong usage or input, 130 interrupted. Nothing here imports torch before a command runs.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from surgeon import (
    bench_command,
    collapse_command,
    cost_command,
    doctor_command,
    evaluate_command,
    export_command,
    finetune_command,
    visualize_command,
    zoo_command,
)
from surgeon.arguments import assignment, positive
from surgeon.errors import CheckpointError, ConfigError, SurgeonError, VerificationError
from surgeon.search import gains_command, place_command, search_command, study_command

if TYPE_CHECKING:
    from torch import nn

    from surgeon.recipe import BaseModel

EPILOG = """examples:
  surgeon models 'resnet*'
  surgeon inspect resnet50
  surgeon convert resnet50 --layers stage3,stage4 --type acda
  surgeon verify runs/resnet50-acda
  surgeon revert runs/resnet50-acda --layers stage3 -o runs/resnet50-stage4
  surgeon collapse runs/resnet50-pafu --images photos/ -o runs/resnet50-lean
  surgeon cost runs/resnet50-acda --batch-size 32 --optimizer sgd --amp
  surgeon export runs/resnet50-acda -o model.onnx

exit codes: 0 done; 1 a check failed, or nothing could be replaced; 2 wrong usage or input; 130 interrupted
"""

LAYERS_HELP = """selections (--layers), joined by commas:
  names and prefixes   layer3, layer4.0.conv2      globs, regexes   'blocks.*.conv_dw', 're:conv[23]$'
  stages               stem, stage1 ... , all      predicates       k>=3, k=1, in>=64, stride=1, groups=1
  kinds                depthwise, dense, first-of-stage             exclusion        '!layer4.2'
  Names and stages add up, predicates narrow down. 1x1 convolutions are taken only by full name or with k=1.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said why
        return stop.code if isinstance(stop.code, int) else 2
    handler: Callable[[argparse.Namespace], int] = args.handler
    try:
        _start_logging(args)
        code = handler(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("surgeon: interrupted, nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `surgeon models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SurgeonError as error:
        if args.debug:
            traceback.print_exc()
        print(f"surgeon: error: {error}", file=sys.stderr)
        return error.exit_code


def _start_logging(args: argparse.Namespace) -> None:
    import logging

    logger = logging.getLogger("surgeon")
    for old in [handler for handler in logger.handlers if handler.name == "surgeon-cli"]:
        logger.removeHandler(old)
    handler = logging.StreamHandler(sys.stderr)
    handler.name = "surgeon-cli"
    handler.setFormatter(logging.Formatter("surgeon: %(levelname)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if args.debug else logging.WARNING)


# --- commands -----------------------------------------------------------------------------------------------------


def _models(args: argparse.Namespace) -> int:
    from surgeon.models import model_names, nearest

    names = model_names(args.pattern)
    if not names:
        raise ConfigError(f"no model matches {args.pattern!r}{nearest(args.pattern)}")
    if args.json:
        _print_json(names)
    else:
        print("\n".join(names))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    import surgeon
    from surgeon.console import inspection_text, inspection_values, width

    model, base = _build(args)
    sites = surgeon.inspect(model, input_size=_size(args, base))
    if args.json:
        _print_json({"model": args.model, "convolutions": inspection_values(sites)})
    else:
        print(inspection_text(sites, args.model, width()), end="")
    return 0


def _convert(args: argparse.Namespace) -> int:
    import surgeon
    from surgeon.checkpoint import check_output, save
    from surgeon.console import Progress, width
    from surgeon.recipe import Recipe

    recipe = Recipe.read(args.recipe) if args.recipe else None
    options = _layer_options(args)
    if recipe is not None and (args.layers or args.type or options):
        raise ConfigError(
            "--recipe says layers, types and options itself: leave out --layers, --type and layer options"
        )
    if recipe is None and not args.type:
        raise ConfigError("say what the layers become: --type acda, pafu or sekg (or --recipe FILE)")
    output = args.output or _default_output(args.model, args.type or "recipe")
    if not args.dry_run:
        check_output(output, force=args.force)
    _check_options(args.type, options)
    model, base = _build(args)
    calibration = _calibration(args, model, base)
    with Progress(enabled=not args.quiet) as progress:
        model, report = surgeon.convert(
            model,
            layers=None if recipe else args.layers or "all",
            type=args.type,
            recipe=recipe,
            input_size=_size(args, base),
            calibration=calibration,
            seed=args.seed,
            inplace=True,
            progress=progress,
            **options,
        )
        report.model = args.model
        if not args.dry_run:
            progress("save", 0, 1)
            save(model, output, report=report, base=base, force=args.force)
    written = None if args.dry_run else str(output)
    if args.json:
        _print_json({"output": written, **report.to_dict()})
    else:
        print(report.to_text(width()), end="")
        print(f"written to  {written}" if written else "dry run: nothing was written")
    return 0


def _verify(args: argparse.Namespace) -> int:
    import surgeon
    from surgeon.checkpoint import load
    from surgeon.console import Progress, verification_text, verification_values, width
    from surgeon.models import restore
    from surgeon.recipe import get_recipe
    from surgeon.weights import changed_tensors

    with Progress(enabled=not args.quiet) as progress:
        progress("load", 0, 2)
        converted = load(args.run, trust_factory=args.trust_factory)
        recipe = get_recipe(converted)
        if recipe is None or recipe.base is None:
            raise CheckpointError(f"{args.run} does not know its base model: there is nothing to compare it with")
        progress("load", 1, 2)
        original = restore(recipe.base, weights=args.weights, trust_factory=args.trust_factory)
        progress("verify", 0, 1)
        result = surgeon.verify(original, converted, input_size=args.input_size or recipe.base.input_size or None)
        changed = changed_tensors(original, converted)
    if changed:
        shown = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
        raise VerificationError(f"{args.run} was changed outside its dynamic layers: {len(changed)} tensors ({shown})")
    if args.json:
        _print_json({"run": args.run, **verification_values(result)})
    else:
        print(verification_text(result, args.run, width()), end="")
    return 0 if result.exact else 1


def _revert(args: argparse.Namespace) -> int:
    import surgeon
    from surgeon.checkpoint import check_output, load, save
    from surgeon.rewrite import dynamic_layers

    check_output(args.output, force=args.force)
    model = load(args.run, trust_factory=args.trust_factory)
    names = list(dynamic_layers(model, args.layers))
    model = surgeon.revert(model, args.layers)
    left = len(dynamic_layers(model))
    save(model, args.output, force=args.force)
    if args.json:
        _print_json({"output": args.output, "reverted": names, "remaining": left})
        return 0
    said = f"dynamic layers that remain: {left}" if left else "no dynamic layer remains: these are plain model weights"
    plural = "s" if len(names) != 1 else ""
    print(f"{len(names)} layer{plural} reverted to plain convolutions: {', '.join(names)}")
    print(f"{said}\nwritten to  {args.output}")
    return 0


# --- what the commands share --------------------------------------------------------------------------------------


def _print_json(values: Any) -> None:
    print(json.dumps(values, indent=2))


def _build(args: argparse.Namespace) -> "tuple[nn.Module, BaseModel | None]":
    from surgeon.models import build_model

    return build_model(
        args.model,
        weights=args.weights,
        seed=args.seed,
        num_classes=args.num_classes,
        input_size=args.input_size,
        options=dict(args.model_args),
    )


def _size(args: argparse.Namespace, base: "BaseModel | None") -> tuple[int, ...] | None:
    given: tuple[int, ...] | None = args.input_size
    return given or (base.input_size or None if base is not None else None)


def _layer_options(args: argparse.Namespace) -> dict[str, Any]:
    names = ("atoms", "scales", "basis_size", "group_size", "kernel_groups")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.compress:
        if args.type != "acda":
            raise ConfigError(f"--compress drops the static atoms of acda layers; it has no meaning for {args.type}")
        options["static_atoms"] = 0
    return options | dict(args.options)


def _check_options(kind: str | None, options: dict[str, Any]) -> None:
    """Refuse wrong types and options before a model is built."""
    if kind is not None:
        from surgeon.layers.registry import layer_class
        from surgeon.plan import read_config
        from surgeon.recipe import Rule

        read_config(layer_class(kind), Rule(layers="all", type=kind, options=options))


def _calibration(args: argparse.Namespace, model: "nn.Module", base: "BaseModel | None") -> Any:
    if args.calibrate is None:
        return None
    from surgeon.images import read_images

    if base is None:
        raise ConfigError("--calibrate needs to know the base model, for its transform; this folder does not name it")
    return read_images(args.calibrate, model, base)


def _default_output(model: str, kind: str) -> str:
    """`runs/NAME-TYPE`, the name being the last part of how the model was named."""
    name = model.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return f"runs/{name}-{kind}"


# --- arguments ----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="surgeon",
        description="Give trained vision networks content-adaptive convolutions without changing what they compute.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    from surgeon import __version__

    parser.add_argument("--version", action="version", version=f"surgeon {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_models(commands)
    _add_inspect(commands)
    _add_convert(commands)
    _add_verify(commands)
    _add_revert(commands)
    modules = {
        "finetune": finetune_command,
        "evaluate": evaluate_command,
        "collapse": collapse_command,
        "visualize": visualize_command,
        "export": export_command,
        "cost": cost_command,
        "bench": bench_command,
        "zoo": zoo_command,
        "doctor": doctor_command,
        "place": place_command,
        "gains": gains_command,
        "search": search_command,
        "study": study_command,
    }
    for name, module in modules.items():
        module.add_arguments(_command(commands, name, module.run, module.DESCRIPTION, module.EXAMPLES))
    return parser


def _command(
    commands: Any, name: str, handler: Callable[[argparse.Namespace], int], description: str, examples: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=description,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(handler=handler)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_models(commands: Any) -> None:
    examples = "  surgeon models 'resnet*'\n  surgeon models torchvision/ --json\n"
    parser = _command(commands, "models", _models, "list the models that can be named", examples)
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="a glob, or a part of the name")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a timm name, torchvision/NAME, zoo/NAME, hf-hub:ID, a surgeon folder, or package.module:factory",
    )
    group = parser.add_argument_group("model")
    group.add_argument("--weights", default="auto", metavar="auto|pretrained|random|FILE", help="default: auto")
    group.add_argument("--seed", type=int, default=0, help="of random weights and of the conversion (default: 0)")
    group.add_argument("--num-classes", type=positive, metavar="N", help="classes of the model's head")
    group.add_argument("--input-size", type=_input_size, metavar="SIZE", help="224, 320x240 (HxW) or 3x224x224 (CxHxW)")
    group.add_argument(
        "--model-args",
        type=assignment,
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="further options of the model",
    )


def _add_inspect(commands: Any) -> None:
    examples = "  surgeon inspect resnet50\n  surgeon inspect torchvision/densenet121 --json\n"
    description = "list every convolution: stage, shapes, FLOPs, memory, what it can become and why not"
    parser = _command(commands, "inspect", _inspect, description, examples)
    _add_model(parser)


def _add_convert(commands: Any) -> None:
    examples = (
        "  surgeon convert resnet50 --layers stage3,stage4 --type acda\n"
        "  surgeon convert mobilenetv2_100 --layers depthwise --type sekg -o runs/mobile\n"
        "  surgeon convert resnet50 --layers first-of-stage --type pafu -n 4 --dry-run\n"
        "  surgeon convert resnet18 --layers stage4 --type acda -m 4 --compress --calibrate photos/\n"
        "  surgeon convert resnet50 --recipe recipe.json\n"
        f"  surgeon convert zoo/sidd_conv --recipe zoo/acda_sidd\n\n{LAYERS_HELP}"
    )
    parser = _command(commands, "convert", _convert, "make chosen convolutions content-adaptive", examples)
    _add_model(parser)
    group = parser.add_argument_group("what becomes what")
    group.add_argument("--layers", metavar="SELECTION", help="which convolutions (default: all with k >= 2)")
    group.add_argument("--type", metavar="TYPE", help="acda, pafu or sekg")
    group.add_argument(
        "--recipe",
        metavar="FILE|zoo/NAME",
        help="rules from a recipe, or those of a zoo network, instead of --layers and --type",
    )
    group.add_argument("--atoms", "-m", type=int, metavar="M", help="acda: dynamic atoms")
    group.add_argument("--scales", "-S", type=int, metavar="S", help="acda: scales of the basis, 3x3, 5x5, ...")
    group.add_argument("--basis-size", type=int, metavar="M'", help="acda: basis elements a scale")
    group.add_argument("--group-size", "-n", type=int, metavar="N", help="pafu: kernels in a group")
    group.add_argument("--kernel-groups", type=int, metavar="G", help="sekg: channels that share a kernel, as groups")
    group.add_argument("--compress", action="store_true", help="acda: drop the static atoms; smaller, not exact")
    group.add_argument("--calibrate", metavar="DIR", help="pictures for an activation-aware --compress")
    group.add_argument(
        "--option",
        type=assignment,
        dest="options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="any layer option",
    )
    _add_output(parser, required=False, help_="folder to write (default: runs/NAME-TYPE)")
    parser.add_argument("--dry-run", action="store_true", help="convert and report, but write nothing")


def _add_verify(commands: Any) -> None:
    examples = "  surgeon verify runs/resnet50-acda\n  surgeon verify runs/mine --weights mine.safetensors --json\n"
    description = "compare a converted model with its original, layer by layer"
    parser = _command(commands, "verify", _verify, description, examples)
    _add_run(parser)
    parser.add_argument("--weights", metavar="FILE", help="the original's weights, where the recipe cannot find them")
    parser.add_argument(
        "--input-size", type=_input_size, metavar="SIZE", help="224, 320x240 (HxW) or 3x224x224 (CxHxW)"
    )


def _add_revert(commands: Any) -> None:
    examples = (
        "  surgeon revert runs/resnet50-acda -o runs/resnet50-plain\n"
        "  surgeon revert runs/resnet50-acda --layers layer4 -o runs/resnet50-stage3\n"
    )
    parser = _command(commands, "revert", _revert, "turn dynamic layers back into plain convolutions", examples)
    _add_run(parser)
    parser.add_argument("--layers", metavar="SELECTION", help="which dynamic layers (default: all)")
    _add_output(parser, required=True, help_="folder to write")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a folder that surgeon wrote")
    parser.add_argument(
        "--trust-factory", action="store_true", help="run the package.module:factory that the recipe names"
    )


def _add_output(parser: argparse.ArgumentParser, *, required: bool, help_: str) -> None:
    parser.add_argument("-o", "--output", required=required, metavar="OUT", help=help_)
    parser.add_argument("--force", action="store_true", help="replace OUT if surgeon wrote it")


def _input_size(text: str) -> tuple[int, ...]:
    parts = text.lower().replace(",", "x").split("x")
    try:
        values = tuple(positive(part) for part in parts)
    except argparse.ArgumentTypeError:
        values = ()
    if len(values) == 1:
        values *= 2
    if len(values) not in (2, 3):
        raise argparse.ArgumentTypeError(f"expected SIZE, HxW or CxHxW, got {text!r}")
    return values
