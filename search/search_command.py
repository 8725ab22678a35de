"""`surgeon search`: find the placement that trains best within the budgets. Imports torch when it runs."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.errors import ConfigError
from surgeon.search.place_command import add_budget_arguments, add_space_arguments, space_config
from surgeon.search.setup import add_task_arguments, add_training_arguments

if TYPE_CHECKING:
    from surgeon.search.folder import SearchFolder
    from surgeon.search.gain import GainTable
    from surgeon.search.gate import Gate
    from surgeon.search.run import Outcome, Search
    from surgeon.search.setup import Setup
    from surgeon.search.study import Record
    from surgeon.search.training import TrainingEvaluator

DESCRIPTION = "find the placement that trains best within budgets; crash-safe, resumable"
EXAMPLES = """  surgeon search zoo/resnet20_cifar --task classification --data cifar/ --max-flops +10% --finals 3
  surgeon search resnet50 --task classification --data imagenet/ --max-memory 8GiB --types acda,pafu --trials 40
  surgeon search resnet50 --task classification --data imagenet/ --max-memory 8GiB --types acda,pafu --trials 80 --resume
  surgeon study status runs/resnet50-classification-search
  surgeon study report runs/resnet50-classification-search
  surgeon study export runs/resnet50-classification-search -o runs/resnet50-found

The same command with --resume goes on with a search; in a second terminal it is a second worker of the same search.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `surgeon search`, beside --json, --quiet and --debug."""
    add_task_arguments(parser)
    add_budget_arguments(parser)
    add_space_arguments(parser)
    add_training_arguments(parser)
    group = parser.add_argument_group("search")
    group.add_argument("--trials", type=int, default=30, metavar="N", help="placements to train (default: 30)")
    group.add_argument("--steps", type=int, default=200, metavar="N", help="optimizer steps a trial (default: 200)")
    group.add_argument("--rung", type=int, default=0, metavar="R", help="trials of steps x 2^R (default: 0)")
    group.add_argument("--evaluations", type=int, default=4, metavar="N", help="values a trial reports (default: 4)")
    group.add_argument("--no-pruning", action="store_true", help="train every trial to its end")
    group.add_argument("--gains", default="fisher", metavar="FILE|METHOD", help="see surgeon gains (default: fisher)")
    group.add_argument("--mode", default="decoder", metavar="MODE", help="decoder, posterior, tpe, nsga2 or random")
    group.add_argument("--max-time", metavar="TIME", help="of the trials: 90s, 30m, 1.5h")
    group.add_argument(
        "--finals", type=int, default=0, metavar="K", help="train the best K again, in full (default: 0)"
    )
    group.add_argument("--seeds", type=int, default=3, metavar="S", help="of the finals (default: 3)")
    group.add_argument("--final-rung", type=int, default=2, metavar="R", help="finals of steps x 2^R (default: 2)")
    group.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="default: runs/MODEL-TASK-search")
    group.add_argument("--resume", action="store_true", help="go on with the search in FOLDER")
    group.add_argument("--storage", metavar="URL", help="not supported yet: a search lies in FOLDER")
    group.add_argument("--join", metavar="NAME", help="not supported yet: use --resume in a second terminal")


def run(args: argparse.Namespace) -> int:
    """Returns the exit code: 1 for budgets that nothing meets, 130 when interrupted, with how to go on."""
    from surgeon.search.evaluator import StoppedError
    from surgeon.search.folder import SearchFolder
    from surgeon.search.setup import make_setup

    _check(args)
    folder = SearchFolder(args.output or Path("runs", f"{model_name(args.model)}-{args.task}-search"))
    folder.check(resume=args.resume)
    setup = make_setup(args)
    search, evaluator = _make(args, folder, setup)
    _begin(args, folder, search, setup)
    outcome = search.run()
    _tell(args, f"stopped ({outcome.stopped}) after {outcome.evaluated} evaluations here")
    if outcome.stopped == "interrupted":
        return _interrupted()
    assert search.gate is not None
    if args.finals:
        try:
            _finals(args, folder, search, evaluator)
        except StoppedError:
            return _interrupted()
    _print(args, folder, outcome, evaluator)
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be refused before anything is built."""
    from surgeon.search.propose import MODES

    if args.storage or args.join:
        raise ConfigError(
            "databases (--storage, --join) are not supported yet: a search lies in a folder, and the same command with "
            "--resume is one more worker on this machine"
        )
    if args.mode not in MODES:
        raise ConfigError(f"there is no search mode {args.mode!r}; there are {', '.join(MODES)}")
    for name, least in (("trials", 1), ("steps", 1), ("evaluations", 1), ("seeds", 1), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    for name in ("rung", "finals", "final_rung"):
        if getattr(args, name) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} must not be negative, got {getattr(args, name)}")


def model_name(spec: str) -> str:
    """The last part of how a model was named."""
    return spec.rstrip("/").rpartition("/")[2].rpartition(":")[2]


def _make(args: argparse.Namespace, folder: "SearchFolder", setup: "Setup") -> "tuple[Search, TrainingEvaluator]":
    import optuna

    from surgeon.search.budget import Budgets
    from surgeon.search.gate import Gate
    from surgeon.search.run import Search, SearchConfig
    from surgeon.search.study import StudyFile
    from surgeon.search.training import ShortConfig, TrainingEvaluator
    from surgeon.zoo.finetune.config import parse_time

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    budgets = Budgets.parse(
        flops=args.max_flops,
        params=args.max_params,
        memory=args.max_memory,
        latency=args.max_latency,
        mode=args.memory_mode,
        max_layers=args.max_layers,
    )
    short = ShortConfig(steps=args.steps, evaluations=args.evaluations, base=setup.config)
    gate = Gate(setup.model, space_config(args), budgets, **setup.cost_settings(args))
    gate.check_feasible()
    evaluator = TrainingEvaluator(setup.model, setup.task, gate.space, short, base=setup.base, keep=folder.best)
    gains = _gains(args, folder, gate, evaluator)
    config = SearchConfig(
        trials=args.trials,
        mode=args.mode,
        seed=args.seed,
        rung=args.rung,
        max_time=None if args.max_time is None else parse_time(args.max_time, "--max-time"),
    )
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if not args.no_pruning:
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=short.interval(args.rung), reduction_factor=2)
    search = Search(
        StudyFile(folder.study),
        gate.space,
        gains,
        evaluator,
        gate,
        config,
        identity={"name": args.model, "rung": args.rung, "pruning": not args.no_pruning},
        pruner=pruner,
        progress=None if args.quiet else _Progress(args, gate, setup.task.primary),
    )
    return search, evaluator


def _gains(
    args: argparse.Namespace, folder: "SearchFolder", gate: "Gate", evaluator: "TrainingEvaluator"
) -> "GainTable":
    """The table that the search goes by; a resumed search keeps the one it began with."""
    from surgeon.console import Progress
    from surgeon.search.gain import GainTable
    from surgeon.search.method import METHODS, gains_of

    if args.resume and args.gains in METHODS and folder.gains.is_file():
        kept = GainTable.read(folder.gains)
        if kept.estimator == args.gains:
            return kept.for_space(gate.space)
    with Progress(enabled=not args.quiet) as progress:
        return gains_of(args.gains, evaluator, progress=progress)


def _begin(args: argparse.Namespace, folder: "SearchFolder", search: "Search", setup: "Setup") -> None:
    """Write what is searched, then the study: a study without its record could not be read."""
    from surgeon.search.folder import FORMAT, VERSION, space_values, write_json

    gate, task = search.gate, setup.task
    assert gate is not None
    if not args.resume:
        original, limits = gate.original, {name: gate.problem.limit(name) for name in dict.fromkeys(gate.problem.names)}
        limits["memory"] = gate.budgets.memory_limit(original, gate.calibration)
        needed = gate.calibration.needed(original.peak_bytes, sum(original.reserve.values()))
        values = {
            "format": FORMAT,
            "version": VERSION,
            "model": {"name": args.model},
            "task": {"name": task.name, "primary": task.primary, "higher_is_better": task.higher_is_better},
            "budgets": gate.budgets.text,
            "limits": limits,
            "original": {"flops": original.flops, "params": original.params, "memory": needed},
            "space": space_values(gate.space),
            "mode": args.mode,
            "seed": args.seed,
            "steps": args.steps << args.rung,
            "trials": args.trials,
            "gains": args.gains,
        }
        write_json(folder.about, values)
        search.proposer.gains.write(folder.gains)
    search.open(resume=args.resume)


def _finals(args: argparse.Namespace, folder: "SearchFolder", search: "Search", evaluator: "TrainingEvaluator") -> None:
    from surgeon.search.finals import run_finals
    from surgeon.search.folder import read_search

    assert search.gate is not None
    run_finals(
        folder,
        evaluator,
        search.gate,
        read_search(folder.path),
        count=args.finals,
        seeds=args.seeds,
        rung=args.final_rung,
        tell=lambda text: _tell(args, text),
    )


# --- what is said -------------------------------------------------------------------------------------------------


class _Progress:
    """A line on stderr for every trial: its value, the best so far, and what of the budgets it uses."""

    def __init__(self, args: argparse.Namespace, gate: "Gate", primary: str) -> None:
        self.args, self.gate, self.primary = args, gate, primary

    def __call__(self, one: "Record", best: "Record | None") -> None:
        value = f"{one.values[0]:.5g}" if one.state == "complete" and one.values else one.state
        if one.state in ("refused", "failed"):
            why = one.attributes.get("refused") or [one.attributes.get("error", "")]
            value += f" ({'; '.join(why)})"
        known = f", best {best.values[0]:.5g} (trial {best.number})" if best is not None and best.values else ""
        used = ", ".join(f"{name} {share:.0%}" for name, share in budget_use(one, self.gate).items())
        replaced = f"{len(one.placement)} layers" if one.placement else "original"
        told = f"trial {one.number}: {replaced} ({one.source}), {self.primary} {value}{known}"
        _tell(self.args, told + (f"; of the budgets {used}" if used else ""))


def budget_use(one: "Record", gate: "Gate") -> dict[str, float]:
    """The part of every limit that a trial uses, as the gate counted it."""
    traced = one.attributes.get("traced") or {}
    limits: dict[str, int | None] = gate.budgets.limits(gate.original, gate.calibration)
    limits["memory"] = gate.budgets.memory_limit(gate.original, gate.calibration)
    keys = {"flops": "flops", "params": "params", "memory": "needed"}
    return {name: traced[keys[name]] / limit for name, limit in limits.items() if limit and keys[name] in traced}


def _tell(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(f"surgeon: {text}", file=sys.stderr, flush=True)


def _interrupted() -> int:
    print("surgeon: interrupted; go on with the same command and --resume", file=sys.stderr)
    return 130


def _print(
    args: argparse.Namespace, folder: "SearchFolder", outcome: "Outcome", evaluator: "TrainingEvaluator"
) -> None:
    from surgeon.search.folder import read_search
    from surgeon.search.summary import status_lines, status_values

    found = read_search(folder.path)
    values: dict[str, Any] = {"output": str(folder.path), "stopped": outcome.stopped, **status_values(found)}
    if args.json:
        print(json.dumps(values, indent=2))
    else:
        print("\n".join([*status_lines(found), f"written to  {folder.path}"]))
