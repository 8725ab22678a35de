"""`surgeon convert`: make selected convolutions content-adaptive."""

import argparse
from typing import TYPE_CHECKING, Any

from surgeon.commands.common import checks
from surgeon.commands.common.arguments import (
    add_model,
    add_output,
    add_pairs,
    build,
    building,
    input_size,
    model_name,
    print_json,
    tell,
    whole,
)
from surgeon.errors import ConfigError, InputError
from surgeon.util.outputs import check_output
from surgeon.util.waiting import waiting

if TYPE_CHECKING:
    from torch import nn

    from surgeon.records.recipe import BaseModel, Recipe

LAYERS_HELP = """selections (--layers), joined by commas:
  names and prefixes   layer3, layer4.0.conv2      globs, regexes   'blocks.*.conv_dw', 're:conv[23]$'
  stages               stem, stage1 ... , all      predicates       k>=3, k=1, in>=64, stride=1, groups=1
  kinds                depthwise, first-of-stage, last-spatial      exclusion        '!layer4.2'
  Names and stages add, predicates filter. 1x1 convolutions are selected only by full name or with k=1.
"""

DESCRIPTION = "make selected convolutions content-adaptive"
EXAMPLES = (
    "  surgeon convert resnet50 --layers stage3,stage4 --type acda\n"
    "  surgeon convert mobilenetv2_100 --layers depthwise --type sekg -o runs/mobile\n"
    "  surgeon convert resnet50 --layers first-of-stage --type pafu -n 4 --dry-run\n"
    "  surgeon convert resnet18 --layers stage4 --type acda -m 4 --compress --calibrate photos/\n"
    "  surgeon convert resnet50 --recipe recipe.json\n"
    "  surgeon convert resnet18 --pattern dcb --layers stage3,stage4\n"
    "  surgeon convert exported.pt2 --layers stage3 --type acda\n"
    f"  surgeon convert zoo/sidd_conv --recipe zoo/acda_sidd\n\n{LAYERS_HELP}"
)

FLAGS = {  # of layer options
    "atoms": "--atoms (-m)",
    "scales": "--scales (-S)",
    "basis_size": "--basis-size",
    "group_size": "--group-size (-n)",
    "kernel_groups": "--kernel-groups",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `surgeon convert`; --json, --quiet and --debug are common to all commands."""
    add_model(parser)
    group = parser.add_argument_group("what to convert")
    group.add_argument("--layers", metavar="SELECTION", help="which convolutions (default: all with k >= 2)")
    group.add_argument("--type", metavar="TYPE", help="acda, pafu or sekg")
    group.add_argument(
        "--pattern",
        metavar="dcb|mdcb",
        help="convert residual blocks to ADFNet's DCBs, instead of --type (mdcb: explains why not)",
    )
    group.add_argument(
        "--recipe",
        metavar="FILE|zoo/NAME",
        help="rules from a recipe or a zoo network, instead of --layers and --type",
    )
    group = parser.add_argument_group("layer options (others with --option)")
    group.add_argument("--atoms", "-m", type=whole, metavar="M", help="acda: dynamic atoms")
    group.add_argument("--scales", "-S", type=whole, metavar="S", help="acda: scales of the basis, 3x3, 5x5, ...")
    group.add_argument("--basis-size", type=whole, metavar="M'", help="acda: basis elements per scale")
    group.add_argument("--group-size", "-n", type=whole, metavar="N", help="pafu: kernels in a group")
    group.add_argument("--kernel-groups", type=whole, metavar="G", help="sekg: generated kernels per pixel")
    group.add_argument("--compress", action="store_true", help="acda: drop the static atoms; smaller, not exact")
    group.add_argument("--calibrate", metavar="DIR", help="images for an activation-aware --compress")
    add_pairs(group, "--option", "any layer option", dest="options")
    group = parser.add_argument_group("output")
    add_output(group, required=False, help_="folder to write (default: runs/NAME-TYPE, with --recipe runs/NAME-recipe)")
    group.add_argument("--dry-run", action="store_true", help="convert and report, but write nothing")


def check(args: argparse.Namespace) -> None:
    """Refuse conflicting options, unknown names, missing paths and an occupied output before torch is loaded."""
    options = _layer_options(args)
    if args.recipe and (args.layers or args.type or args.pattern or options):
        raise ConfigError(
            "--recipe defines layers, types and options: leave out --layers, --type, --pattern and layer options"
        )
    if args.pattern and args.type:
        raise ConfigError("--pattern determines the type: leave out --type")
    if not args.recipe and not args.type and not args.pattern:
        raise ConfigError("choose a layer type: --type acda, pafu or sekg (or --recipe FILE)")
    checks.layer_type(
        args.type, options, {name: flag for name, flag in FLAGS.items() if getattr(args, name) is not None}
    )
    if args.compress:
        checks.compression(args.type)
    checks.recipe(args.recipe)
    checks.model_of(args)
    checks.folder(args.calibrate, "--calibrate", InputError)
    if not args.dry_run:
        check_output(_output(args), force=args.force)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    from torch import fx

    import surgeon
    from surgeon.commands.common.console import Progress, width
    from surgeon.models.checkpoint import save
    from surgeon.models.programs import described
    from surgeon.records.recipe import Recipe
    from surgeon.surgery.convert import OPTIMIZER_NOTE

    recipe = Recipe.read(args.recipe) if args.recipe else None
    _take_size(args, recipe)
    options = _compressed(args, _layer_options(args))
    output = _output(args)
    _check_options(args.type, options)
    with waiting(building(args), quiet=args.quiet):
        model, base = build(args)
    read = [f"read {args.model}: {described(model)}"] if isinstance(model, fx.GraphModule) else []
    calibration = _calibration(args, model, base)
    with Progress(enabled=not args.quiet) as progress:
        model, report = surgeon.convert(
            model,
            layers=None if recipe else args.layers or "all",
            type=args.type,
            pattern=args.pattern,
            recipe=recipe,
            input_size=input_size(args, base),
            calibration=calibration,
            seed=args.seed,
            inplace=True,
            progress=progress,
            **options,
        )
        report.model = args.model
        # there is none here
        report.notes = read + [note for note in report.notes if not note.startswith(OPTIMIZER_NOTE)]
        if not args.dry_run:
            progress("save", 0, 1)
            save(model, output, report=report, base=base, force=args.force)
    written = None if args.dry_run else str(output)
    if args.json:
        print_json({"output": written, **report.to_dict()})
    else:
        print(report.to_text(width()), end="")
        print(f"written to  {written}" if written else "dry run: nothing was written")
        if written and base is not None and base.source == "factory":
            print(f"built by    {base.name}: other commands run it with --trust-factory")
    return 0


def _layer_options(args: argparse.Namespace) -> dict[str, Any]:
    options = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    for key, value in checks.layer_options(args.type, args.options).items():
        if options.setdefault(key, value) != value:
            raise ConfigError(f"{key} is given twice: {options[key]!r}, and {value!r} with --option; give it once")
    return options


def _compressed(args: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """The layer options, including those of `--compress`."""
    if not args.compress:
        return options
    from surgeon.layers.registry import layer_class

    compressed = layer_class(args.type).Config.compressed if args.type else {}
    if not compressed:
        raise checks.no_compression(args.type)
    given = [key for key, value in compressed.items() if options.get(key, value) != value]
    if given:
        raise ConfigError(f"--compress sets {given[0]}: leave it out of --option")
    return {**options, **compressed}


def _check_options(kind: str | None, options: dict[str, Any]) -> None:
    """Refuse unknown types and invalid options before a model is built."""
    if kind is not None:
        from surgeon.layers.registry import layer_class
        from surgeon.records.recipe import Rule
        from surgeon.surgery.plan import read_config

        read_config(layer_class(kind), Rule(layers="all", type=kind, options=options))


def _calibration(args: argparse.Namespace, model: "nn.Module", base: "BaseModel | None") -> Any:
    if args.calibrate is None:
        return None
    from surgeon.models.images import read_images

    if base is None:
        raise ConfigError("--calibrate needs the base model's transform, and this folder does not name its base model")
    return read_images(args.calibrate, model, base)


def _network(name: str) -> str:
    """The network of a name, without library and tag."""
    plain = name.rpartition("/")[2]
    return plain if ":" in plain else plain.partition(".")[0]


def _take_size(args: argparse.Namespace, recipe: "Recipe | None") -> None:
    """The recipe's size of inputs, which it was found or trained at, if it is one of the same network and no other is given."""
    base = None if recipe is None else recipe.base
    if (
        base is None
        or args.input_size is not None
        or _network(base.name) != _network(args.model)
        or not base.input_size
    ):
        return
    args.input_size = base.input_size
    tell(args, f"images of {'x'.join(map(str, base.input_size))}, as in the recipe; --input-size takes others")


def _output(args: argparse.Namespace) -> str:
    """As given, or `runs/NAME-TYPE`, where NAME is the last part of the model's name and TYPE is `recipe` for a recipe."""
    if args.output:
        return str(args.output)
    name = model_name(args.model.removesuffix(".pt2"))
    return f"runs/{name}-{args.type or args.pattern or 'recipe'}"
