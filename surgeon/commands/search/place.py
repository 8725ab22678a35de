"""`surgeon place`: the best placement under budgets for given gains, without any training. Imports torch when it runs."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.commands.common import checks
from surgeon.commands.common.arguments import (
    add_seed,
    add_weights,
    build,
    input_size,
    positive,
    print_json,
    weights_for_shapes,
    whole,
)
from surgeon.commands.cost import add_step_arguments
from surgeon.commands.search.setup import BATCH_SIZE, OPTIMIZER
from surgeon.errors import ConfigError
from surgeon.util.bounds import FLAGS
from surgeon.util.files import told, write_text
from surgeon.util.waiting import waiting

if TYPE_CHECKING:
    from surgeon.search.budget import Budgets
    from surgeon.search.gains.gain import GainTable
    from surgeon.search.gate import Gate, Verdict
    from surgeon.search.placement.problem import Ints, Problem
    from surgeon.search.space import SpaceConfig

DESCRIPTION = "find the best placement of dynamic layers under budgets for given gains; no training"
EXAMPLES = """  surgeon place resnet50 --max-flops +10% --max-memory 8GiB --batch-size 32 -o recipe.json
  surgeon place resnet50 --types acda,pafu --atoms 4,6 --group-sizes 4,8 --max-params +20% --gains gains.json
  surgeon place convnext_atto --max-flops +5% --max-layers 4 --count 3 --json
  surgeon convert resnet50 --recipe recipe.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `surgeon place`; --json, --quiet and --debug are common to all commands."""
    parser.add_argument("model", metavar="MODEL", help="a model's name, or a folder written by surgeon; not converted")
    add_step_arguments(parser, batch_size=BATCH_SIZE, optimizer=OPTIMIZER)
    add_weights(parser, "random; a folder has its own")
    add_seed(parser, "for the recipe")
    add_space_arguments(parser)
    add_budget_arguments(parser)
    group = parser.add_argument_group("request")
    group.add_argument("--gains", default="uniform", metavar="FILE|uniform", help="a gain table (default: uniform)")
    group.add_argument(
        "--count", type=whole, default=1, metavar="K", help="number of different placements (default: 1)"
    )
    group.add_argument(
        "--distance",
        type=whole,
        default=1,
        metavar="D",
        help="minimum number of layers in which they differ (default: 1)",
    )
    group.add_argument("-o", "--output", metavar="FILE", help="write the best as a recipe for surgeon convert --recipe")
    group.add_argument("--force", action="store_true", help="replace FILE")


def add_space_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the search space; shared by all commands that search."""
    group = parser.add_argument_group("space")
    group.add_argument("--space", metavar="FILE", help="a description in YAML or JSON, instead of these options")
    group.add_argument("--layers", metavar="SELECTION", help="which convolutions (default: all with k >= 2)")
    group.add_argument("--types", type=_names, default=(), metavar="A,B", help="acda, pafu, sekg (default: all)")
    for flag, what in (
        ("--atoms", "acda: dynamic atoms"),
        ("--scales", "acda: scales of the basis"),
        ("--group-sizes", "pafu: kernels in a group"),
        ("--kernel-groups", "sekg: generated kernels per pixel"),
    ):
        group.add_argument(flag, type=_numbers, default=(), metavar="N,M", help=what)


def add_budget_arguments(parser: argparse.ArgumentParser) -> None:
    """Budget options; shared by all commands that search."""
    group = parser.add_argument_group("budgets, absolute or relative to the original")
    group.add_argument("--max-flops", metavar="N|+P%", help="per image (4.5G, +10%%; 1 MAC = 2 FLOPs)")
    group.add_argument("--max-params", metavar="N|+P%", help="parameters (30M, +20%%)")
    group.add_argument(
        "--max-memory",
        metavar="N|+P%",
        help="device memory of a step with --batch-size, --optimizer and --amp, including margin and reserve (8GiB)",
    )
    group.add_argument("--memory-mode", choices=("train", "infer"), default="train", help="which step (default: train)")
    group.add_argument("--max-latency", metavar="T|+P%", help="per inference, measured on this machine (20ms, +30%%)")
    group.add_argument("--max-layers", type=positive, metavar="K", help="maximum number of replaced layers")


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(positive(part) for part in text.split(","))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 4,6,9, got {told(text)}") from error


def read_budgets(args: argparse.Namespace) -> "Budgets":
    """The budgets given by the arguments."""
    from surgeon.search.budget import Budgets

    return Budgets.parse(
        flops=args.max_flops,
        params=args.max_params,
        memory=args.max_memory,
        latency=args.max_latency,
        mode=args.memory_mode,
        max_layers=args.max_layers,
    )


def space_config(args: argparse.Namespace) -> "SpaceConfig":
    """The search space given by the arguments."""
    from surgeon.search.space import SpaceConfig

    if args.space is None:
        return SpaceConfig(
            types=args.types,
            atoms=args.atoms,
            scales=args.scales,
            group_sizes=args.group_sizes,
            kernel_groups=args.kernel_groups,
            layers=args.layers,
        )
    if args.types or args.atoms or args.scales or args.group_sizes or args.kernel_groups or args.layers:
        raise ConfigError("--space defines types, options and layers: leave out the other options")
    return SpaceConfig.read(args.space)


def check(args: argparse.Namespace) -> None:
    """Refuse invalid arguments before torch is loaded."""
    checks.positives(args, ("count", "distance"))
    checks.budgets(args)
    if args.output and Path(args.output).exists() and not args.force:
        raise ConfigError(f"{args.output} exists already; --force replaces it")
    checks.model_of(args)
    checks.plain(args.model, "a placement")
    for kind in args.types:
        checks.layer_type(kind)
    checks.file(args.space, "--space")
    if args.gains != "uniform":
        checks.file(args.gains, "--gains")


def run(args: argparse.Namespace) -> int:
    """Returns the exit code: 1 if no placement with replacements is within the budgets."""
    from surgeon.search.gains.gain import GainTable, uniform_gains
    from surgeon.search.gate import Gate

    budgets = read_budgets(args)
    config = space_config(args)
    args.weights = weights_for_shapes(args.model, args.weights)
    with waiting(f"building {args.model}", quiet=args.quiet):
        model, base = build(args)
    table = None if args.gains == "uniform" else GainTable.read(args.gains)
    if table is not None:
        table.check_network([name for name, _ in model.named_modules()], args.gains)
    with waiting("counting the costs of every replacement", quiet=args.quiet):
        gate = Gate(
            model,
            config,
            budgets,
            input_size=input_size(args, base),
            batch_size=args.batch_size,
            optimizer=args.optimizer,
            amp=args.amp,
            channels_last=args.channels_last,
        )
    gains = uniform_gains(gate.space) if table is None else table.for_space(gate.space, args.gains)
    gate.check_feasible()
    with waiting("placing", quiet=args.quiet):
        chosen = choose(gate, gains, args.count, args.distance)
    if not chosen:
        raise _nothing(gate, gains, args)
    if args.output:
        _write(gate, chosen[0][0], args)
    document = _document(gate, gains, chosen, args)
    if args.json:
        print_json(document)
    else:
        print("\n".join(_lines(document)))
    return 0


def choose(gate: "Gate", gains: "GainTable", count: int, distance: int) -> "list[tuple[Ints, Verdict]]":
    """The best placements accepted by the gate, with its verdicts; refused ones update the calibration and are avoided."""
    from surgeon.search.placement.place import Cut, gain_of, optimum

    found: list[tuple[Ints, Verdict]] = []
    refused: list[Ints] = []
    while len(found) < count and len(refused) < 20:
        cuts = [*(Cut(one, distance) for one, _ in found), *(Cut(one) for one in refused)]
        placement = optimum(gate.problem, gains.gain, cuts=cuts, at_least=1)
        if placement is None or gain_of(gains.gain, placement) <= 0:
            break
        verdict = gate.check(placement)
        if verdict.fits:
            found.append((placement, verdict))
        else:
            refused.append(placement)
            gate.refused(verdict)
    return found


def _nothing(gate: "Gate", gains: "GainTable", args: argparse.Namespace) -> Exception:
    """The error for budgets that only allow the original, or gains of which none is above 0."""
    from surgeon.search.budget import as_budget
    from surgeon.search.placement.place import nearest
    from surgeon.search.placement.problem import InfeasibleError

    if not (gains.gain > 0).any():
        return InfeasibleError(
            f"nothing was placed in {args.model}: no replacement has a gain above 0 in {args.gains} ({gains.estimator})"
        )
    problem: Problem = gate.problem
    numbers = nearest(problem, at_least=1)
    if "memory" in numbers:
        numbers["memory"] = gate.calibration.needed(numbers["memory"], sum(gate.original.reserve.values()))
    needed = ", ".join(f"{FLAGS[name]} {as_budget(name, value)}" for name, value in numbers.items())
    return InfeasibleError(
        f"nothing was placed in {args.model}: within {gate.budgets_text} there is no replacement that gains anything"
        + (f"; the cheapest one needs {needed}" if needed else "")
    )


def _write(gate: "Gate", placement: "Ints", args: argparse.Namespace) -> None:
    write_text(args.output, gate.space.recipe(placement, seed=args.seed).to_json(), ConfigError)


# --- output -------------------------------------------------------------------------------------------------------


def _document(
    gate: "Gate", gains: "GainTable", chosen: "list[tuple[Ints, Verdict]]", args: argparse.Namespace
) -> dict[str, Any]:
    from surgeon.search.placement.place import gain_of

    original = gate.original
    reserve = sum(original.reserve.values())
    return {
        "model": args.model,
        "budgets": gate.budgets_text,
        "estimator": gains.estimator,
        "space": {"hash": gate.space.hash, "layers": len(gate.space.layers), "options": list(gate.space.labels)},
        "input_size": list(original.input_size),
        "step": original.step,
        "original": {
            "flops": original.flops,
            "params": original.params,
            "needed": gate.calibration.needed(original.peak_bytes, reserve),
        },
        "placements": [
            {
                "hash": gate.space.hash_of(placement),
                "gain": gain_of(gains.gain, placement),
                "replaced": gate.space.names(placement),
                "predicted": dict(verdict.predicted),
                "traced": dict(verdict.traced),
                "latency": verdict.latency,
            }
            for placement, verdict in chosen
        ],
        "output": args.output,
    }


def _lines(document: dict[str, Any]) -> list[str]:
    from surgeon.commands.common.console import width
    from surgeon.search.budget import told as amount
    from surgeon.util.tables import counted, paragraph, table

    space, before = document["space"], document["original"]
    head = (
        f"{document['model']}: {counted(space['layers'], 'layer')}, {counted(len(space['options']) - 1, 'option')}, "
        f"{document['budgets']}"
    )
    lines = [paragraph(head, width=width(), hang="  "), f"gains: {document['estimator']}"]
    rows = []
    for number, one in enumerate([{"traced": before, "replaced": {}, "gain": 0.0}, *document["placements"]]):
        found = one["traced"]
        rows.append(
            [
                "original" if not number else f"placement {number}",
                str(len(one["replaced"])),
                f"{one['gain']:.4g}",
                *(amount(kind, found[key]) for kind, key in (("flops", "flops"), ("params", "params"))),
                amount("memory", found["needed"]),
            ]
        )
    lines += ["", table(["", "replaced", "gain", "FLOPs", "parameters", "memory needed"], rows)]
    best = document["placements"][0]["replaced"]
    lines += ["", table(["layer", "becomes"], [[layer, label] for layer, label in best.items()], left=2)]
    if document["output"]:
        lines += ["", f"written to  {document['output']}"]
    if document["estimator"] == "uniform":
        told = (
            "note: uniform gains mean as many replacements as the budgets allow, whatever each brings. surgeon gains "
            f"{document['model']} --task TASK --data DIR -o gains.json measures what they bring, for --gains gains.json"
        )
        lines += ["", paragraph(told, width=width(), hang="  ")]
    size = "x".join(map(str, document["input_size"]))
    of = f"FLOPs (1 MAC = 2 FLOPs) at {size}; memory of one {document['step']}, with margin and reserve"
    lines += ["", paragraph(of, width=width(), hang="  ")]
    return lines
