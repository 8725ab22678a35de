"""Workers of a search in processes of their own, which can be killed."""

import signal
import time
from pathlib import Path

from tests.support.forks import Fork
from tests.support.search import toys


def worker(
    path: Path,
    mode: str,
    trials: int,
    pause: float,
    how: str = "resume",
    share: float = toys.SHARE,
    storage: str | None = None,
) -> Fork:
    """`toys.main` with these arguments."""
    told = [str(path), mode, str(trials), str(pause), how, str(share), *([] if storage is None else [storage])]
    return Fork(toys.main, told)


def finish(child: Fork, timeout: float = 120) -> str:
    """Why it stopped, by its own word."""
    output, error = child.communicate(timeout=timeout)
    assert child.returncode == 0, error
    return output.split()[-1]


def kill_midway(child: Fork, after: float) -> None:
    """`kill -9` so many seconds after it has opened its study."""
    assert child.stdout.readline() == "open\n"
    time.sleep(after)
    child.send_signal(signal.SIGKILL)
    child.communicate()
