"""Processes of their own that start at once: forks of a server that has imported already what they need.

For tests of what a process leaves behind when it is killed, or shares with others. What an interpreter imports when it is started
is not seen by them.
"""

import io
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from tests.support.places import ROOT

# What forks would otherwise import themselves, each for seconds.
PRELOADED = ["tests.support.search.toys", "tests.support.training.driver", "tests.support.forked"]

CACHE = os.environ.get("SURGEON_CACHE")  # before any test has one of its own, in which nothing is compiled yet

Main = Callable[[Sequence[str]], int | None]


class Fork:
    """`main(arguments)` in a process of its own, with what tests use of a `subprocess.Popen`: text, and both pipes.

    It works in `folder`, with the environment of now.
    """

    def __init__(self, main: Main, arguments: Sequence[str], folder: Path = ROOT) -> None:
        self.stdout, out = _pipe()
        self.stderr, err = _pipe()
        told = (main, list(arguments), str(folder), dict(os.environ), out, err)
        self._process = context().Process(target=_run, args=told)
        self._process.start()
        out.close()
        err.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """What it writes to its end. Both pipes hold what these tests let them write, so one after the other is read."""
        with self.stdout, self.stderr:
            told = self.stdout.read(), self.stderr.read()
        self._process.join(timeout)
        if self._process.is_alive():
            self._process.kill()
            raise subprocess.TimeoutExpired("a fork", timeout)
        return told


def context() -> ForkServerContext:
    """That of the server, which is started here, once."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
        patched.delenv("SURGEON_CACHE", raising=False)
        if CACHE is not None:
            patched.setenv("SURGEON_CACHE", CACHE)
        forkserver.ensure_running()
    return found


def _pipe() -> tuple[io.TextIOWrapper, Connection]:
    reader, writer = multiprocessing.Pipe(duplex=False)
    with reader:
        return os.fdopen(os.dup(reader.fileno()), encoding="utf-8"), writer


def _run(
    main: Main, arguments: list[str], folder: str, environment: dict[str, str], out: Connection, err: Connection
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for pipe, number in ((out, 1), (err, 2)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    sys.exit(main(arguments))
