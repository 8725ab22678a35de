"""Workers of a search in processes of their own, which can be killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support.places import ROOT
from tests.support.search.toys import SHARE

Worker = subprocess.Popen[bytes]


def worker(
    path: Path,
    mode: str,
    trials: int,
    pause: float,
    how: str = "resume",
    share: float = SHARE,
    storage: str | None = None,
) -> Worker:
    """`python -m tests.support.search.toys` with these arguments."""
    told = [str(path), mode, str(trials), str(pause), how, str(share), *([] if storage is None else [storage])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "tests.support.search.toys", *told]
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment)


def finish(child: Worker, timeout: float = 120) -> str:
    """Why it stopped, by its own word."""
    output, _ = child.communicate(timeout=timeout)
    assert child.returncode == 0
    return output.decode().split()[-1]


def kill_midway(child: Worker, after: float) -> None:
    """`kill -9` so many seconds after it has opened its study."""
    assert child.stdout is not None
    assert child.stdout.readline() == b"open\n"
    time.sleep(after)
    child.send_signal(signal.SIGKILL)
    child.communicate()
