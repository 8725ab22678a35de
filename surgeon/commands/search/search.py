"""`surgeon search`: find the placement that trains best within the budgets. Imports torch when it runs."""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.commands.common import checks
from surgeon.commands.common.arguments import model_name, model_options, print_json, tell, whole
from surgeon.commands.search.place import add_budget_arguments, add_space_arguments, read_budgets, space_config
from surgeon.commands.search.setup import GAINS, add_task_arguments, add_training_arguments, check_task
from surgeon.errors import ConfigError
from surgeon.search.gains.names import ESTIMATORS, METHODS, check_gains
from surgeon.util.bounds import FLAGS
from surgeon.util.outputs import check_no_search
from surgeon.util.parse import parse_time
from surgeon.util.tables import counted
from surgeon.util.waiting import waiting

if TYPE_CHECKING:
    from surgeon.commands.search.setup import Setup
    from surgeon.search.evaluate.training import TrainingEvaluator
    from surgeon.search.gains.gain import GainTable
    from surgeon.search.gate import Gate
    from surgeon.search.run import Outcome, Search
    from surgeon.search.study.board import Board
    from surgeon.search.study.folder import SearchFolder
    from surgeon.search.study.record import Record
    from surgeon.search.study.study import Study
    from surgeon.zoo.tasks import Task

NEEDS = ("torch", "timm", "accelerate", "torchmetrics", "optuna")  # libraries
DESCRIPTION = "find the placement that trains best within budgets; crash-safe, resumable"
EXAMPLES = """  surgeon search zoo/resnet20_cifar --task classification --data cifar/ --max-flops +10% --finals 3
  surgeon search resnet50 --task classification --data imagenet/ --max-memory 8GiB --types acda,pafu --trials 40
  surgeon search resnet50 --task classification --data imagenet/ --max-memory 8GiB --types acda,pafu --trials 80 --resume
  surgeon search resnet50 --task classification --data imagenet/ --max-flops +10% --jobs 2
  surgeon search resnet50 --task classification --data imagenet/ --max-flops +20% --objective metric,flops
  surgeon search resnet50 --task classification --data imagenet/ --max-flops +10% --sampler optuna.samplers:GPSampler
  surgeon search resnet50 --task classification --data imagenet/ --storage postgresql://me@host/db -o runs/r50
  surgeon search resnet50 --task classification --data imagenet/ --storage postgresql://me@host/db --join r50
  surgeon study status runs/resnet50-classification-search
  surgeon study report runs/resnet50-classification-search
  surgeon study export runs/resnet50-classification-search -o runs/resnet50-found

The same command with --resume continues a search; in a second terminal it adds a worker to the same search.
With --storage the study is in a database, under the name of the folder; --join NAME adds a worker on another machine.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `surgeon search`; --json, --quiet and --debug are common to all commands."""
    add_task_arguments(parser)
    add_budget_arguments(parser)
    add_space_arguments(parser)
    add_training_arguments(parser)
    group = parser.add_argument_group("search")
    group.add_argument(
        "--trials", type=whole, default=30, metavar="N", help="number of placements to train (default: 30)"
    )
    group.add_argument("--steps", type=whole, default=200, metavar="N", help="optimizer steps per trial (default: 200)")
    group.add_argument("--rung", type=whole, default=0, metavar="R", help="train trials for steps x 2^R (default: 0)")
    group.add_argument(
        "--evaluations", type=whole, default=4, metavar="N", help="values reported per trial (default: 4)"
    )
    group.add_argument("--no-pruning", action="store_true", help="train every trial to its end")
    group.add_argument("--gains", default=GAINS, metavar="FILE|METHOD", help=f"see surgeon gains (default: {GAINS})")
    group.add_argument(
        "--sampler",
        default="posterior",
        metavar="NAME",
        help="posterior (the default), decoder, tpe, nsga2, random, or any Optuna sampler as module:Class",
    )
    group.add_argument(
        "--objective",
        default="metric",
        metavar="LIST",
        help="metric (the default), or a Pareto front: metric,flops; also params, memory",
    )
    group.add_argument("--max-time", metavar="TIME", help="time for the trials, after costs and gains: 90s, 30m, 1.5h")
    group.add_argument("--finals", type=whole, default=0, metavar="K", help="retrain the best K in full (default: 0)")
    group.add_argument("--seeds", type=whole, default=3, metavar="S", help="seeds of the finals (default: 3)")
    group.add_argument(
        "--final-rung", type=whole, default=2, metavar="R", help="train finals for steps x 2^R (default: 2)"
    )
    group.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="default: runs/MODEL-TASK-search")
    group.add_argument("--resume", action="store_true", help="resume the search in FOLDER")
    group.add_argument("--jobs", type=whole, default=1, metavar="N", help="workers on this machine (default: 1)")
    group.add_argument("--storage", metavar="URL", help="store the trials in a database: postgresql://me@host/db")
    group.add_argument("--join", metavar="NAME", help="add a worker to the study NAME in --storage")


def check(args: argparse.Namespace) -> None:
    """Refuse invalid arguments before torch is loaded; settles the task."""
    if args.join and not args.storage:
        raise ConfigError("--join needs --storage, the database of the study; in a folder, --resume adds a worker")
    _resources(args)
    checks.positives(args, ("trials", "steps", "evaluations", "seeds", "jobs"))
    checks.positives(args, ("rung", "finals", "final_rung"), least=0)
    for name, most in (("rung", 20), ("final_rung", 20), ("jobs", 1024)):
        if getattr(args, name) > most:
            raise ConfigError(f"--{name.replace('_', '-')} must be at most {most}, got {getattr(args, name)}")
    if args.jobs > 1 and ":" in (args.device or ""):
        raise ConfigError(
            f"--device {args.device} names one GPU, but --jobs {args.jobs} workers share all of them: use cuda"
        )
    if args.max_time is not None:
        parse_time(args.max_time, "--max-time")
    checks.budgets(args)
    check_gains(args.gains)
    if not (_going_on(args) or args.storage):
        check_no_search(_folder(args))
    check_task(args)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code: 1 for budgets that nothing meets, 130 when interrupted, with a hint on how to resume."""
    from surgeon.search.sampling.tuners import check_name
    from surgeon.search.study.folder import SearchFolder

    check_name(args.sampler)
    folder = SearchFolder(_folder(args))
    file = _study(args, folder)
    try:
        return _search(args, folder, file)
    finally:
        file.close()


def _folder(args: argparse.Namespace) -> Path:
    return args.output or Path("runs", args.join or f"{model_name(args.model)}-{args.task}-search")


def _search(args: argparse.Namespace, folder: "SearchFolder", file: "Study") -> int:
    from surgeon.commands.search.jobs import helpers, interrupt
    from surgeon.commands.search.setup import make_setup
    from surgeon.search.evaluate.evaluator import StoppedError

    setup = make_setup(args)
    search, evaluator = _make(args, folder, file, setup)
    _begin(args, folder, search, setup)
    name = file.name if file.shared else None
    if name is not None:
        tell(args, f"the study is {file}; other machines join with --join {name}")
    try:
        with helpers(args, folder.path, name, lambda text: tell(args, text)) as processes:
            outcome = search.run()
            if outcome.stopped == "interrupted":
                interrupt(processes)
        if outcome.stopped == "interrupted":
            return _interrupted(outcome.evaluated)
        tell(args, f"{_ENDS[outcome.stopped]}; trained here: {outcome.evaluated}")
        if args.finals:
            _finals(args, folder, search, evaluator)
    except (KeyboardInterrupt, StoppedError):  # a second Ctrl-C, or one in the finals
        return _interrupted()
    _print(args, folder, outcome, evaluator)
    return 0


def _resources(args: argparse.Namespace) -> tuple[str, ...]:
    """The costs among the objectives. Raises `ConfigError`."""
    first, *rest = args.objective.split(",")
    known = ("flops", "params", "memory")
    if first != "metric" or len(set(rest)) != len(rest) or not set(rest) <= set(known):
        raise ConfigError(
            f"--objective: expected metric, alone or with some of {', '.join(known)} after it, as in metric,flops; got "
            f"{args.objective!r}"
        )
    return tuple(rest)


def work(args: argparse.Namespace) -> int:
    """Run one more worker of an existing search, for trials only. Returns the exit code."""
    from surgeon.commands.search.setup import make_setup
    from surgeon.search.study.folder import SearchFolder

    folder = SearchFolder(args.output)
    file = _study(args, folder)
    try:
        setup = make_setup(args)
        search, _ = _make(args, folder, file, setup)
        _begin(args, folder, search, setup)
        return 130 if search.run().stopped == "interrupted" else 0
    finally:
        file.close()


def _study(args: argparse.Namespace, folder: "SearchFolder") -> "Study":
    """The study to start or resume. Conflicts are reported before anything is built."""
    from surgeon.search.study.journal import StudyError
    from surgeon.search.study.study_file import StudyFile

    if not args.storage:
        folder.check(resume=args.resume)
        return StudyFile(folder.study)
    from surgeon.search.study.database import StudyDatabase

    file = StudyDatabase(args.storage, args.join or folder.study_name)
    if file.on_disk is not None:
        file.on_disk.parent.mkdir(parents=True, exist_ok=True)
    going_on = _going_on(args)
    folder.check(resume=going_on, storage=file.address)
    try:
        if going_on:
            file.read_notes()
        elif file.exists():
            raise StudyError(f"the study {file} already exists; continue it (--join {file.name}) or choose another -o")
    except StudyError:
        file.close()
        raise
    return file


def _going_on(args: argparse.Namespace) -> bool:
    return bool(args.resume or args.join)


def _make(
    args: argparse.Namespace, folder: "SearchFolder", file: "Study", setup: "Setup"
) -> "tuple[Search, TrainingEvaluator]":
    import optuna

    from surgeon.search.evaluate.training import ShortConfig, TrainingEvaluator
    from surgeon.search.gate import Gate
    from surgeon.search.run import Search, SearchConfig
    from surgeon.search.study.board import Board

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    budgets = read_budgets(args)
    short = ShortConfig(steps=args.steps, evaluations=args.evaluations, base=setup.config)
    with waiting("counting the costs of every replacement", quiet=args.quiet):
        gate = Gate(setup.model, space_config(args), budgets, **setup.cost_settings(args))
    gate.check_feasible()
    evaluator = TrainingEvaluator(
        setup.model,
        setup.task,
        gate.space,
        short,
        base=setup.base,
        keep=folder.best,
        costs=lambda placement: gate.check(placement).traced,
    )
    config = SearchConfig(
        trials=args.trials,
        sampler=args.sampler,
        resources=_resources(args),
        seed=args.seed,
        rung=args.rung,
        max_time=None if args.max_time is None else parse_time(args.max_time, "--max-time"),
    )
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if not args.no_pruning:
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=short.interval(args.rung), reduction_factor=2)
    identity: dict[str, Any] = {"name": args.model, "rung": args.rung, "pruning": not args.no_pruning}
    if options := model_options(args):
        identity["model options"] = options
    if file.shared:  # data paths differ between machines: the numbers of samples must agree
        identity["samples"] = {"train": len(setup.task.dataset("train")), "val": len(setup.task.dataset("val"))}
    about = contextlib.nullcontext() if _going_on(args) else folder.preparing(_about(args, gate, setup.task, file))
    with about:
        gains = _gains(args, folder, file, gate, evaluator)
        search = Search(
            file,
            gate.space,
            gains,
            evaluator,
            gate,
            config,
            identity=identity,
            pruner=pruner,
            progress=_Progress(args, gate, setup.task, Board(folder.tensorboard, gate, setup.task.primary)),
        )
    return search, evaluator


def _gains(
    args: argparse.Namespace, folder: "SearchFolder", file: "Study", gate: "Gate", evaluator: "TrainingEvaluator"
) -> "GainTable":
    """The gain table of the search; a resumed or joined search keeps its original one."""
    from surgeon.commands.common.console import Progress
    from surgeon.search.gains.gain import GainTable
    from surgeon.search.gains.method import gains_of
    from surgeon.search.study.database import StudyDatabase

    if isinstance(file, StudyDatabase):
        noted = file.notes.get("gains")
        if noted is not None and file.notes["about"]["gains"] == args.gains:
            return GainTable.from_dict(noted, str(file)).for_space(gate.space)
    elif args.resume and args.gains in METHODS and folder.gains.is_file():
        kept = GainTable.read(folder.gains)
        if kept.estimator == args.gains:
            return kept.for_space(gate.space)
    if args.gains in METHODS:
        tell(args, f"before the first trial: what each replacement gains, by {args.gains}{_length(args, gate)}")
    with Progress(enabled=not args.quiet) as progress:
        gains = gains_of(args.gains, evaluator, progress=progress)
    if gains.cached:
        tell(args, "these gains were estimated earlier for the same model, data and options")
    if (doubt := gains.doubt()) is not None:
        tell(args, f"note: {doubt}")
    return gains


def _length(args: argparse.Namespace, gate: "Gate") -> str:
    """How much a gain method takes relative to a trial, where that is known beforehand, and how to do without it."""
    from surgeon.search.gains.method import GRADIENT_BATCHES

    batches = (len(gate.space.labels) - 1) * GRADIENT_BATCHES if args.gains in ESTIMATORS else 0
    takes = f"{batches} batches forward and backward, a trial takes {args.steps << args.rung}; " if batches else ""
    return f" ({takes}--gains uniform skips this)"


def _begin(args: argparse.Namespace, folder: "SearchFolder", search: "Search", setup: "Setup") -> None:
    """Write the search's record, then the study: a study without its record could not be read.

    Workers that join a database's study copy the record from there once they are admitted.
    """
    from surgeon.search.study.database import StudyDatabase
    from surgeon.search.study.folder import write_json

    gate, task, file = search.gate, setup.task, search.file
    assert gate is not None
    going_on, gains = _going_on(args), search.sampler.gains
    if not going_on:
        values = _about(args, gate, task, file)
        if isinstance(file, StudyDatabase):
            file.notes = {"about": values, "gains": gains.to_dict()}
        write_json(folder.about, values)
        gains.write(folder.gains)
    search.open(resume=going_on)
    if going_on and isinstance(file, StudyDatabase) and not folder.about.is_file():
        write_json(folder.about, {**file.notes["about"], "storage": file.address})
        gains.write(folder.gains)


def _about(args: argparse.Namespace, gate: "Gate", task: "Task", file: "Study") -> dict[str, Any]:
    """The record of the search: what its folder says without building anything."""
    from surgeon.search.study.database import StudyDatabase
    from surgeon.search.study.folder import FORMAT, VERSION, space_values

    original, limits = gate.original, {name: gate.problem.limit(name) for name in dict.fromkeys(gate.problem.names)}
    limits["memory"] = gate.budgets.memory_limit(original, gate.calibration)
    needed = gate.calibration.needed(original.peak_bytes, sum(original.reserve.values()))
    values = {
        "format": FORMAT,
        "version": VERSION,
        "model": {"name": args.model},
        "task": {
            "name": task.name,
            "primary": task.primary,
            "higher_is_better": task.higher_is_better,
            "val_samples": len(task.dataset("val")),
        },
        "budgets": gate.budgets_text,
        "limits": limits,
        "original": {"flops": original.flops, "params": original.params, "memory": needed},
        "space": space_values(gate.space),
        "sampler": args.sampler,
        "objectives": args.objective.split(","),
        "seed": args.seed,
        "steps": args.steps << args.rung,
        "trials": args.trials,
        "gains": args.gains,
    }
    return values | ({"storage": file.address} if isinstance(file, StudyDatabase) else {})


def _finals(args: argparse.Namespace, folder: "SearchFolder", search: "Search", evaluator: "TrainingEvaluator") -> None:
    from surgeon.search.evaluate.finals import run_finals
    from surgeon.search.study.folder import read_search

    assert search.gate is not None
    run_finals(
        folder,
        evaluator,
        search.gate,
        read_search(folder.path, args.storage),
        count=args.finals,
        seeds=args.seeds,
        rung=args.final_rung,
        tell=lambda text: tell(args, text),
    )


_ENDS = {  # why a worker stops
    "trials": "all trials are done",
    "time": "--max-time is over",
    "exhausted": "there is no other placement within the budgets",
}


# --- output -------------------------------------------------------------------------------------------------------


class _Progress:
    """Prints a line per trial on stderr (its value, the best so far, the budgets used), and logs the same to TensorBoard."""

    def __init__(self, args: argparse.Namespace, gate: "Gate", task: "Task", board: "Board") -> None:
        self.args, self.gate, self.primary, self.board = args, gate, task.primary, board

    def __call__(self, one: "Record", best: "Record | None") -> None:
        self.board.add(one, best)
        value = f"{self.primary} {one.values[0]:.5g}" if one.state == "complete" and one.values else one.state
        if one.state in ("refused", "failed"):
            why = one.attributes.get("refused") or [one.attributes.get("error", "")]
            value += f" ({'; '.join(why)})"
        if not one.placement and "start" in one.attributes:
            value += f" ({one.attributes['start']:.5g} before training)"
        known = f"; best so far {best.values[0]:.5g}, trial {best.number}" if best is not None and best.values else ""
        shares = self.gate.use(one.attributes.get("traced")).items()
        used = ", ".join(f"{share:.0%} of {FLAGS[name]}" for name, share in shares)
        replaced = f"{counted(len(one.placement), 'layer')} ({one.source})" if one.placement else "original"
        told = f"trial {one.number}: {replaced}, {value}{known}"
        tell(self.args, told + (f"; uses {used}" if used else ""))


def _interrupted(trained: int | None = None) -> int:
    told = "" if trained is None else f"; trained here: {trained}"
    print(f"surgeon: interrupted{told}; resume with the same command and --resume", file=sys.stderr)
    return 130


def _print(
    args: argparse.Namespace, folder: "SearchFolder", outcome: "Outcome", evaluator: "TrainingEvaluator"
) -> None:
    from surgeon.search.results.summary import status_lines, status_values
    from surgeon.search.study.folder import read_search

    found = read_search(folder.path, args.storage)
    values: dict[str, Any] = {"output": str(folder.path), "stopped": outcome.stopped, **status_values(found)}
    if args.json:
        print_json(values)
    else:
        print("\n".join([*status_lines(found), f"written to  {folder.path}"]))
        print(f"a page      surgeon study report {folder.path}\nthe best    surgeon study export {folder.path} -o OUT")
