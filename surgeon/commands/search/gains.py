"""`surgeon gains`: the expected gain of every layer and option, printed and plotted. Imports torch when it runs."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from surgeon.commands.common import checks
from surgeon.commands.common.arguments import print_json, whole
from surgeon.commands.search.place import add_space_arguments, space_config
from surgeon.commands.search.setup import GAINS, add_task_arguments, add_training_arguments, check_task
from surgeon.errors import ConfigError

if TYPE_CHECKING:
    from surgeon.search.gains.gain import GainTable

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


def check(args: argparse.Namespace) -> None:
    """Refuse invalid arguments before torch is loaded; settles the task."""
    plot = _plot(args)
    if plot is not None and plot.suffix.lower() != ".png":
        raise ConfigError(f"a plot must be a .png file, got {plot.name!r}")
    checks.positives(args, ("batches", "steps", "seeds"))
    check_task(args)


def _plot(args: argparse.Namespace) -> Path | None:
    plot: Path | None = args.plot or (args.output.with_suffix(".png") if args.output else None)
    return plot


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    from surgeon.commands.common.console import Progress
    from surgeon.commands.search.setup import make_setup
    from surgeon.search.evaluate.training import ShortConfig, TrainingEvaluator
    from surgeon.search.gains.method import METHODS, make_gains
    from surgeon.search.gains.probe import ProbeConfig
    from surgeon.search.space import make_space
    from surgeon.sites.sites import find_sites

    if args.method not in METHODS:
        raise ConfigError(f"there is no gain method {args.method!r}; there are {', '.join(METHODS)}")
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
    print("\n".join(lines(gains)))
    for path in (args.output, plot):
        if path is not None:
            print(f"written to  {path}", file=sys.stderr if args.json else sys.stdout)
    return 0


def lines(gains: "GainTable") -> list[str]:
    """The table as text: a row per layer, a column per option, `gain ± standard error`."""
    from surgeon.commands.common.console import width
    from surgeon.util.tables import table

    facts = gains.facts
    about = [f"{facts['seconds']:.1f} s"] if "seconds" in facts else []
    about += [f"{facts[name]} {name}" for name in ("batches", "trainings", "steps", "seeds") if name in facts]
    if "unit" in facts:
        about.append(f"in {facts['unit']}, higher is better")
    rows = [
        [layer, *(_entry(gains.gain[i, j], gains.error[i, j]) for j in range(1, len(gains.options)))]
        for i, layer in enumerate(gains.layers)
    ]
    return [f"{gains.estimator}: {', '.join(about)}", table(["layer", *gains.options[1:]], rows, width=width())]


def _entry(gain: float, error: float) -> str:
    return "-" if gain == 0 and error == 0 else f"{gain:.3g} ± {error:.1g}"
