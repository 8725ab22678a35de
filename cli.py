"""The `surgeon` command: its subcommands, each in its own file, and the handling of their errors.

The result goes to stdout (`--json`: one document), everything else to stderr. Exit codes: 0 done, 1 a check failed or nothing
could be replaced, 2 wrong usage or input, 130 interrupted. Nothing here imports torch before a command runs.
"""

import argparse
import os
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from importlib import import_module
from typing import Any, NoReturn

from surgeon.commands import (
    bench,
    collapse,
    convert,
    cost,
    doctor,
    evaluate,
    export,
    finetune,
    inspect,
    models,
    push,
    revert,
    try_,
    verify,
    visualize,
    zoo,
)
from surgeon.commands.common import checks
from surgeon.commands.common.arguments import one_document
from surgeon.commands.search import (
    gains,
    place,
    search,
    study,
)
from surgeon.errors import SurgeonError, in_terminal
from surgeon.util import declared
from surgeon.util.interrupt import caught
from surgeon.util.near import did_you_mean
from surgeon.util.waiting import waiting

EPILOG = """examples:
  surgeon models 'resnet*'
  surgeon inspect resnet50
  surgeon convert resnet50 --layers stage3,stage4 --type acda
  surgeon try resnet18 --task classification --data photos/ --max-time 30m
  surgeon verify runs/resnet50-acda
  surgeon revert runs/resnet50-acda --layers stage3 -o runs/resnet50-stage4
  surgeon collapse runs/resnet50-pafu --images photos/ -o runs/resnet50-lean
  surgeon cost runs/resnet50-acda --batch-size 32 --optimizer sgd --amp
  surgeon export runs/resnet50-acda -o model.onnx

exit codes: 0 done; 1 a check failed, or nothing could be replaced; 2 wrong usage or input; 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. SIGTERM ends it as Ctrl-C does."""
    owner = os.getpid()

    def terminated(number: int, before: Any) -> None:
        if os.getpid() == owner:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)  # a forked worker has nothing to say
        os.kill(os.getpid(), number)

    with caught((signal.SIGTERM,), terminated):
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    began = time.monotonic()
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed why
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:
        return _closed()
    handler: Callable[[argparse.Namespace], int] = args.handler
    args.began, args.argv = began, list(sys.argv[1:] if argv is None else argv)
    try:
        _start_logging(args)
        with in_terminal(args.flags), one_document() if args.json else nullcontext():
            if args.check is not None:
                args.check(args)  # what can be refused before the libraries are loaded
            checks.trust(args)
            _load(args)
            code = handler(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        if argv is None:  # another one would cause a traceback at interpreter exit
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        done = "changed" if getattr(args, "resume", False) else "written"
        print(f"surgeon: interrupted, nothing was {done}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return _closed()
    except (SurgeonError, OSError, MemoryError) as error:
        if args.debug:
            traceback.print_exc()
        print(f"surgeon: error: {_told(error)}", file=sys.stderr)
        return getattr(error, "exit_code", 2)


def _closed() -> int:
    """The end of a command whose reader has gone: `surgeon models | head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _load(args: argparse.Namespace) -> None:
    """The libraries that a command needs, with a line where that takes long."""
    names = [name for name in args.needs if name not in sys.modules]
    told = f"loading {', '.join(dict.fromkeys(name.partition('.')[0] for name in names))}"
    with waiting(told, quiet=args.quiet or not names, after=1.0 if sys.stderr.isatty() else 2.0), suppress(ImportError):
        for name in names:
            import_module(name)


def _told(error: BaseException) -> str:
    """An operating-system error (full disk, no permission, no memory) in one line, worded like surgeon's own."""
    if isinstance(error, SurgeonError):
        return str(error)
    if isinstance(error, OSError):
        from surgeon.util.files import shortened

        return f"{shortened(error.filename)}: {error.strerror}" if error.filename else error.strerror or str(error)
    return "this machine does not have enough memory"


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


# --- arguments ----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="surgeon",
        description="Give trained vision networks content-adaptive convolutions without changing their function.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    from surgeon import __version__

    parser.add_argument("--version", action="version", version=f"surgeon {__version__}")
    shells = ("bash", "zsh", "tcsh")
    completion = 'print the shell completion script for commands and options: eval "$(surgeon --print-completion bash)"'
    parser.add_argument(
        "--print-completion", action=_Completion, choices=shells, metavar="|".join(shells), help=completion
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    modules = {
        "models": models,
        "inspect": inspect,
        "convert": convert,
        "verify": verify,
        "revert": revert,
        "try": try_,
        "finetune": finetune,
        "evaluate": evaluate,
        "collapse": collapse,
        "visualize": visualize,
        "export": export,
        "push": push,
        "cost": cost,
        "bench": bench,
        "zoo": zoo,
        "doctor": doctor,
        "place": place,
        "gains": gains,
        "search": search,
        "study": study,
    }
    for name, module in modules.items():
        command = _command(commands, name, module)
        module.add_arguments(command)
        command.set_defaults(flags=frozenset(command._option_string_actions))
    return parser


_USUAL = {  # names of timm's, Transformers' and Ultralytics' scripts, as ours
    "learning_rate": ("--lr",),
    "optimizer": ("--opt",),
    "optim": ("--opt", "--optimizer"),
    "opt": ("--optimizer",),
    "checkpoint": ("--weights",),
    "pretrained": ("--weights",),
    "output_dir": ("--output",),
    "num_train_epochs": ("--epochs",),
    "gpu": ("--device",),
}


class _Parser(argparse.ArgumentParser):
    """As argparse's own, but an error is one line with the nearest name and where help is, and each command tells its own.

    `-10%` is a value, like `-10`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)%?$")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"surgeon: error: {message} ({self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            unknown = next((one for one in rest if one.startswith("-")), None)
            if unknown is None:
                self.error(f"unexpected {', '.join(map(repr, rest))}")
            flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            hint = _of_task(unknown, list(args or ()), found) or self._other_name(unknown.partition("=")[0], flags)
            self.error(f"there is no option {unknown}.{hint}".rstrip("."))
        return found, rest

    def _other_name(self, unknown: str, flags: list[str]) -> str:
        """The hint for a name that other programs use, for one of what is given without an option, or for the nearest name."""
        name = unknown.lstrip("-").replace("-", "_")
        if name in ("o", "output") and "--json" in flags:
            return f" {self.prog} writes no file: {self.prog} ... --json > FILE keeps what it prints"
        places = {action.dest: str(action.metavar) for action in self._actions if not action.option_strings}
        if name in places:
            return f" {places[name]} is given without an option"
        usual = next((flag for flag in _USUAL.get(name, ()) if flag in flags), None)
        return f" Did you mean {usual!r}?" if usual else did_you_mean(unknown, flags)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            what = "command" if isinstance(action, argparse._SubParsersAction) else "choice"
            told = f"there is no {what} {value!r}; there are {', '.join(known)}.{did_you_mean(str(value), known)}"
            raise argparse.ArgumentError(None if what == "command" else action, told)


def _of_task(unknown: str, words: list[str], found: argparse.Namespace) -> str:
    """` An option of the task is given with ...` if a task has an option of this name: the named one, or any if none is named."""
    if not hasattr(found, "task_options"):
        return ""
    flag, given, value = unknown.partition("=")
    name, known = flag.removeprefix("--").replace("-", "_"), declared.tasks()
    named = [known[found.task]] if found.task in known else list(known.values()) if found.task is None else []
    if not any(name in task.options for task in named):
        return ""
    after = words[words.index(unknown) + 1 :][:1]
    value = value if given else next((word for word in after if not word.startswith("--")), "...")
    return f" A task's options are given so: --task-option {shlex.quote(f'{name}={value}')}"


class _Completion(argparse.Action):
    """Prints a shell completion script for `surgeon`, made by shtab, and exits."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            import shtab
        except ImportError:
            parser.error("--print-completion needs the package shtab, which is not installed: pip install shtab")
        print(shtab.complete(parser, values))
        parser.exit()


class _Store(argparse._StoreAction):
    """Like argparse's own, but `-o=--` is an option without its value, not an empty list."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values == [] and self.nargs is None:
            raise argparse.ArgumentError(self, "expected one argument, got '--'")
        super().__call__(parser, namespace, values, option_string)


def _command(commands: Any, name: str, module: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=module.DESCRIPTION,
        description=module.DESCRIPTION,
        epilog=f"examples:\n{module.EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.register("action", None, _Store)
    needs = getattr(module, "NEEDS", ("torch", "timm"))
    parser.set_defaults(handler=module.run, check=getattr(module, "check", None), needs=needs)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    sys.exit(main())
