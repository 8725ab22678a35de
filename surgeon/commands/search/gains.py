"""`surgeon gains`: the expected gain of every layer and option, printed and plotted. Imports torch when it runs."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.commands.common import checks
from surgeon.commands.common.arguments import print_json, whole
from surgeon.commands.search.place import add_space_arguments, space_config
from surgeon.commands.search.setup import GAINS, add_task_arguments, add_training_arguments, check_task
from surgeon.errors import ConfigError
from surgeon.search.gains.names import LEAST_BATCHES, LEAST_SEEDS, TRAINED, check_method

if TYPE_CHECKING:
    from surgeon.search.gains.gain import GainTable
    from surgeon.search.space import Space

NEEDS = ("torch", "timm", "accelerate", "torchmetrics")  # libraries
DESCRIPTION = "estimate the gain of every layer from every layer type, with errors"
EXAMPLES = """  surgeon gains zoo/resnet20_cifar --task classification --data cifar/ -o gains.json
  surgeon gains zoo/resnet20_cifar --task classification --data cifar/ --method probe --steps 20 --seeds 3 -o gains.json
  surgeon place zoo/resnet20_cifar --max-flops +10% --gains gains.json -o recipe.json

methods: gradient, fisher, snr, nqm (no training: gradients at initialization; nqm predicts the training's own steps);
probe (a few steps of one layer); halving (fine-tuning with one layer replaced, the worse half dropped after every round);
ablation (all layers replaced and fine-tuned, then switched off one at a time)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `surgeon gains`; --json, --quiet and --debug are common to all commands."""
    add_task_arguments(parser)
    add_space_arguments(parser)
    add_training_arguments(parser)
    group = parser.add_argument_group("estimate")
    group.add_argument("--method", default=GAINS, metavar="METHOD", help=f"default: {GAINS}")
    group.add_argument(
        "--batches", type=whole, default=16, metavar="N", help="batches for the gradient methods (default: 16)"
    )
    group.add_argument("--steps", type=whole, default=20, metavar="N", help="steps per training (default: 20)")
    group.add_argument("--seeds", type=whole, default=2, metavar="S", help="seeds per training (default: 2)")
    group.add_argument("--fresh", action="store_true", help="ignore the cache")
    group.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write the table (JSON), and FILE's plot (PNG)"
    )
    group.add_argument("--plot", type=Path, metavar="FILE", help="path of the plot")
    group.add_argument("--force", action="store_true", help="replace these files")


def check(args: argparse.Namespace) -> None:
    """Refuse invalid arguments before torch is loaded; settles the task."""
    plot = _plot(args)
    if plot is not None and plot.suffix.lower() != ".png":
        raise ConfigError(f"a plot must be a .png file, got {plot.name!r}")
    for path in (args.output, plot):
        if path is not None and path.exists() and not args.force:
            raise ConfigError(f"{path} exists already; --force replaces it")
    checks.positives(args, ("batches", "steps", "seeds"))
    check_method(args.method)
    if args.method in TRAINED and args.seeds < LEAST_SEEDS:
        raise ConfigError(f"--seeds must be at least {LEAST_SEEDS}, got {args.seeds}: the standard error is over seeds")
    if args.method not in TRAINED and args.batches < LEAST_BATCHES:
        raise ConfigError(
            f"--batches must be at least {LEAST_BATCHES}, got {args.batches}: the standard error is over batches"
        )
    check_task(args)


def _plot(args: argparse.Namespace) -> Path | None:
    plot: Path | None = args.plot or (args.output.with_suffix(".png") if args.output else None)
    return plot


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    from surgeon.commands.common.console import Progress
    from surgeon.commands.search.setup import make_setup
    from surgeon.search.evaluate.training import ShortConfig, TrainingEvaluator
    from surgeon.search.gains.method import make_gains
    from surgeon.search.gains.probe import ProbeConfig
    from surgeon.search.space import make_space
    from surgeon.sites.sites import find_sites

    plot = _plot(args)
    probe = ProbeConfig(steps=args.steps, seeds=args.seeds)
    setup = make_setup(args)
    sites = find_sites(setup.model, input_size=setup.size).convs
    space = make_space(setup.model, space_config(args), sites=sites)
    short = ShortConfig(steps=args.steps, base=setup.config)
    evaluator = TrainingEvaluator(setup.model, setup.task, space, short, base=setup.base)
    with Progress(enabled=not args.quiet) as progress:
        gains = make_gains(args.method, evaluator, probe, batches=args.batches, progress=progress, fresh=args.fresh)
    if args.output is not None:
        gains.write(args.output)
    if plot is not None:
        from surgeon.search.results.figures import gain_bars, write_png

        write_png(gain_bars(gains), plot)
    if args.json:
        print_json(gains.to_dict())
        return 0
    print("\n".join(lines(gains, space)))
    for path in (args.output, plot):
        if path is not None:
            print(f"written to  {path}", file=sys.stderr if args.json else sys.stdout)
    return 0


def lines(gains: "GainTable", space: "Space") -> list[str]:
    """The table as text: a row per layer, a column per option, `gain ± standard error`; what it leaves to say below it.

    Columns that do not fit beside each other are in further tables below.
    """
    from surgeon.commands.common.console import width
    from surgeon.records.report import letters_text
    from surgeon.util.tables import paragraph

    facts = gains.facts
    about = [f"{facts['seconds']:.1f} s"] if "seconds" in facts else []
    about += [f"{facts[name]} {name}" for name in ("batches", "trainings", "steps", "seeds") if name in facts]
    if "unit" in facts:
        about.append(f"gain = {facts['unit']}, higher is better")
    if "loss" in facts:
        about.append(f"the loss is {facts['loss']:.3g}")
    options = [(one.type, dict(one.options)) for one in space.options]
    columns = [
        [
            name,
            *(
                f"{gains.gain[i, j]:.3g} ± {gains.error[i, j]:.1g}" if space.allowed[i, j] else "-"
                for i in range(len(gains.layers))
            ),
        ]
        for j, name in enumerate(_names(gains, options), start=1)
    ]
    notes = [letters] if (letters := letters_text(options)) else []
    if not space.allowed.all():
        notes.append("-: the layer cannot become this")
    if not gains.gain.any():
        notes.append(
            "note: no replacement changed the metric. It is too coarse for so short a training: more --steps, more validation "
            "samples, or --method nqm, which reads gradients of the loss"
        )
    if (doubt := gains.doubt()) is not None:
        notes.append(f"note: {doubt}")
    if gains.cached:
        notes.append("note: estimated earlier for the same model, data and options; --fresh estimates anew")
    told = [paragraph(note, width=width(), hang="  ") for note in notes]
    head = paragraph(f"{gains.estimator}: {', '.join(about)}", width=width(), hang="  ")
    return [head, _tables(["layer", *gains.layers], columns, width()), *told]


def _names(gains: "GainTable", options: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """The options in compact form, `acda m6 S3`; in full where several would have the same one."""
    from surgeon.records.report import options_text

    short = [options_text(*one) for one in options]
    return [name if short.count(name) == 1 else label for name, label in zip(short, gains.options[1:], strict=True)]


def _tables(first: list[str], columns: list[list[str]], width: int) -> str:
    """Tables of these columns, each with its heading on top, as many in one as fit beside the first column in `width`."""
    from surgeon.util.tables import GAPS, table

    parts: list[list[list[str]]] = [[]]
    for column in columns:
        wide = [max(map(len, one)) + len(GAPS[0]) for one in (*parts[-1], column)]
        if parts[-1] and max(map(len, first)) + sum(wide) > width:
            parts.append([])
        parts[-1].append(column)
    texts = []
    for part in parts:
        header, *rows = zip(first, *part, strict=True)
        texts.append(table(header, rows, width=width))
    return "\n\n".join(texts)
