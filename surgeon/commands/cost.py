"""`surgeon cost`: a model's cost, printed, plotted, compared, and optionally measured. Imports torch when it runs."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from surgeon.commands.common import checks
from surgeon.commands.common.arguments import (
    add_amp,
    add_batch_size,
    add_model_options,
    add_trust,
    not_negative,
    print_json,
    size,
    weights_for_shapes,
    whole,
)
from surgeon.errors import ConfigError, InputError
from surgeon.util.outputs import is_surgeon_folder
from surgeon.util.parse import parse_bytes, parse_count
from surgeon.util.waiting import waiting

if TYPE_CHECKING:
    from torch import nn

    from surgeon.costs import Cost

DESCRIPTION = "FLOPs, parameters and peak GPU memory of a model, without a GPU"
EXAMPLES = """  surgeon cost resnet50 --batch-size 32 --optimizer sgd --amp
  surgeon cost runs/resnet50-acda --batch-size 32 --compare
  surgeon cost resnet50 --batch-size 64 --table --layers stage3,stage4
  surgeon cost resnet50 --batch-size 32 --plot memory.png --max-memory 8GiB
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `surgeon cost`; --json, --quiet and --debug are common to all commands."""
    parser.add_argument("model", metavar="MODEL|RUN", help="a model's name, or a folder written by surgeon")
    add_model_options(parser)
    add_step_arguments(parser)
    parser.add_argument("--infer", action="store_true", help="inference instead of a training step")
    parser.add_argument(
        "--accumulate", type=whole, default=1, metavar="N", help="micro-steps per optimizer step (default: 1)"
    )
    parser.add_argument("--checkpointing", action="store_true", help="use gradient checkpointing (timm models)")
    parser.add_argument("--weight-decay", type=not_negative, default=1e-4, metavar="X", help="default: 1e-4")
    parser.add_argument("--strict", action="store_true", help="fail on an operator without a FLOP formula")
    parser.add_argument("--max-flops", metavar="N", help="exit 1 if an image costs more (4.5G; 1 MAC = 2 FLOPs)")
    parser.add_argument(
        "--max-memory", metavar="N", help="exit 1 if a step needs more, including margin and reserve (8GiB)"
    )
    parser.add_argument(
        "--compare",
        nargs="?",
        const="",
        metavar="ORIGINAL",
        help="compare with another model (default: the run's base model)",
    )
    parser.add_argument("--table", action="store_true", help="cost of every layer as every layer type")
    parser.add_argument("--layers", metavar="SELECTION", help="for --table (default: all with k >= 2)")
    parser.add_argument("--plot", metavar="FILE", help="plot memory over the step, and the layers' shares (png)")
    parser.add_argument("--measure", action="store_true", help="run the step on the CUDA device and compare")


def add_step_arguments(parser: argparse.ArgumentParser, *, batch_size: int = 1, optimizer: str = "sgd") -> None:
    """Options of a step, with these defaults; shared with `surgeon bench` and `surgeon place`."""
    add_batch_size(parser, f"images per step (default: {batch_size})", batch_size)
    parser.add_argument("--input-size", type=size, metavar="SIZE", help="224, 320x240 (HxW) or 3x224x224 (CxHxW)")
    names = f"sgd (momentum), sgd-plain, adam, adamw (default: {optimizer})"
    parser.add_argument("--optimizer", default=optimizer, metavar="NAME", help=names)
    add_amp(parser)
    parser.add_argument("--channels-last", action="store_true", help="channels-last memory format")
    add_trust(parser)


def check(args: argparse.Namespace) -> None:
    """Refuse invalid arguments before torch is loaded."""
    checks.positives(args, ("accumulate",))
    _budgets(args)
    checks.model_of(args)
    if args.compare:
        checks.model(args.compare)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code: 1 over budget, or --measure without CUDA."""
    from surgeon.costs import cost
    from surgeon.models.names import size_of

    budgets = _budgets(args)
    settings = _settings(args, args.input_size or size_of(args.model))
    _check_device(args)
    other = None
    with waiting("counting", quiet=args.quiet):
        options: dict[str, Any] = {"num_classes": args.num_classes, "options": dict(args.model_args)}
        model, found = _cost_of(args.model, args, options, strict=args.strict, **settings)
        if args.compare:
            other = _cost_of(args.compare, args, {}, **settings)[1]
        elif args.compare is not None:
            other = cost(original_of(args), **settings)
        document: dict[str, Any] = {"model": args.model, **found.to_dict()}
        if other is not None:
            document["compared_with"] = {"model": args.compare or "base model", **other.to_dict()}
        if args.table:
            document["table"] = _table(model, args, settings)
    if args.plot:
        from surgeon.costs.plot import draw

        draw(found, args.plot, title=args.model)
        document["plot"] = args.plot
    if args.measure:
        document["measured"] = _measured(model, settings, found)
    over = [name for name, limit in budgets.items() if getattr(found, name) > limit]
    document["over_budget"] = over
    _print(document, found, other, args)
    return 1 if over else 0


def _budgets(args: argparse.Namespace) -> dict[str, int]:
    """The limits given, by the names of their costs."""
    given = {
        "flops": (parse_count, args.max_flops, "--max-flops"),
        "needed_bytes": (parse_bytes, args.max_memory, "--max-memory"),
    }
    return {name: parse(text, flag) for name, (parse, text, flag) in given.items() if text}


def _cost_of(spec: str, args: argparse.Namespace, options: dict[str, Any], **settings: Any) -> "tuple[nn.Module, Cost]":
    """A model and its cost. Weights are created only for --measure, and if the model cannot be traced without data.

    `options` are the model's own, as of `build_model`.
    """
    from surgeon.costs import cost
    from surgeon.models.hub import folder_if_any
    from surgeon.models.names import shapes_of

    spec = folder_if_any(spec)
    if not args.measure and not is_surgeon_folder(spec):
        model = shapes_of(spec, **options)
        try:
            return model, cost(model, **settings)
        except InputError:
            if not any(parameter.is_meta for parameter in model.parameters()):
                raise
    model = build(spec, trust_factory=args.trust_factory, **options)
    return model, cost(model, **settings)


def build(spec: str, **options: Any) -> "nn.Module":
    """A model for its shapes only: the weights do not matter, so none are fetched. `options` as of `build_model`."""
    from surgeon.models.names import build_model

    return build_model(spec, weights=weights_for_shapes(spec), **options)[0]


def original_of(args: argparse.Namespace) -> "nn.Module":
    """The unconverted model behind a run, with arbitrary weights; raises `ConfigError` if it is unknown."""
    from surgeon.models.hub import folder_if_any
    from surgeon.models.names import build_structure
    from surgeon.records.recipe import Recipe

    folder = folder_if_any(getattr(args, "run", None) or args.model)
    if not is_surgeon_folder(folder):
        raise ConfigError(f"{folder} was not written by surgeon; name the model to compare with: --compare ORIGINAL")
    base = Recipe.read(folder).base
    if base is None:
        raise ConfigError(
            f"{folder} does not record its base model; name the model to compare with: --compare ORIGINAL"
        )
    return build_structure(base, trust_factory=args.trust_factory)


def _settings(args: argparse.Namespace, size: tuple[int, ...] | None) -> dict[str, Any]:
    return {
        "input_size": size,
        "batch_size": args.batch_size,
        "mode": "infer" if args.infer else "train",
        "optimizer": args.optimizer,
        "amp": args.amp or False,
        "channels_last": args.channels_last,
        "weight_decay": args.weight_decay,
        "accumulate": args.accumulate,
        "checkpointing": args.checkpointing,
    }


def _check_device(args: argparse.Namespace) -> None:
    if not args.measure:
        return
    from surgeon.costs.measure import NoDeviceError, has_device

    if not has_device():
        raise NoDeviceError(
            "--measure needs a CUDA device, and this machine has none; omit it for the prediction alone"
        )


def _table(model: "nn.Module", args: argparse.Namespace, settings: dict[str, Any]) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from surgeon.costs.build import cost_table
    from surgeon.costs.table import KEEP

    table = cost_table(model, layers=args.layers, **settings)
    return [asdict(row) for row in table.rows if row.option != KEEP]


def _measured(model: "nn.Module", settings: dict[str, Any], found: "Cost") -> dict[str, float]:
    from surgeon.costs.measure import measure
    from surgeon.costs.settings import make_settings

    real = measure(model, make_settings(model, **settings))
    return {
        "peak_bytes": real.peak_bytes,
        "reserved_bytes": real.reserved_bytes,
        "error": found.peak_bytes / real.peak_bytes - 1,
    }


# --- text ---------------------------------------------------------------------------------------------------------


def _print(document: dict[str, Any], found: "Cost", other: "Cost | None", args: argparse.Namespace) -> None:
    if args.json:
        print_json(document)
        return
    from surgeon.costs.text import cost_lines
    from surgeon.util.parse import mebibytes

    print("\n".join(cost_lines(args.model, found, other, args.compare)))
    for row_text in _table_text(document.get("table")):
        print(row_text)
    if "measured" in document:
        real = document["measured"]
        mib = 2**20
        print(
            f"\nmeasured    peak {real['peak_bytes'] / mib:,.1f} MiB, predicted {found.peak_bytes / mib:,.1f} MiB "
            f"({real['error']:+.1%}); reserved {real['reserved_bytes'] / mib:,.1f} MiB"
        )
    for name in document["over_budget"]:
        limit, needed = _budgets(args)[name], getattr(found, name)
        if name == "flops":
            print(f"over budget: {needed:,} FLOPs per image, above {limit:,} FLOPs")
        else:
            print(f"over budget: {mebibytes(needed)} of memory with margin, above {mebibytes(limit)}")
    if args.plot:
        print(f"drawn to    {args.plot}", file=sys.stderr)


def _table_text(rows: list[dict[str, Any]] | None) -> list[str]:
    if rows is None:
        return []
    from surgeon.util.tables import shorten, table

    def line(row: dict[str, Any]) -> list[str]:
        if row["reasons"]:
            return [row["layer"], row["option"], shorten("no: " + "; ".join(row["reasons"]), 40), "", "", ""]
        numbers = [f"{row['flops'] / 1e6:+,.1f}", f"{row['params'] / 1e3:+,.1f}"]
        return [
            row["layer"],
            row["option"],
            *numbers,
            *(f"{row[k] / 2**20:+,.1f}" for k in ("saved_bytes", "transient_bytes")),
        ]

    header = ["layer", "becomes", "MFLOP", "kparams", "saved MiB", "transient MiB"]
    return ["", table(header, [line(row) for row in rows], left=2, width=100)]
