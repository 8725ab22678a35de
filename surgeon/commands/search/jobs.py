"""Several workers of one search on this machine: separate processes with the same arguments.

They share only a study. If one dies, the others resume its trial; the search continues while one of them lives.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

_PATIENCE = 5.0  # seconds for workers to end on their own


def threads_of(jobs: int) -> int:
    """Number of threads for each of several workers."""
    return max(len(os.sched_getaffinity(0)) // jobs, 1) if hasattr(os, "sched_getaffinity") else 1


@contextmanager
def helpers(
    args: argparse.Namespace, output: Path, join: str | None, tell: Callable[[str], None]
) -> Iterator[list[BaseProcess]]:
    """Start --jobs - 1 additional workers; wait for them at the end, or ask them to stop after an error.

    `output` is the search's folder, `join` the study's name in a database; None: it is in the folder.
    """
    processes: list[BaseProcess] = []
    if args.jobs == 1:
        yield processes
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(before, threads_of(args.jobs)))
    context = multiprocessing.get_context("spawn")  # torch and CUDA cannot be forked
    for number in range(1, args.jobs):
        changed = {
            "jobs": 1,
            "finals": 0,
            "output": output,
            "join": join,
            "resume": join is None,
            "handler": None,
            "check": None,
        }
        own = argparse.Namespace(**vars(args) | changed)
        process: BaseProcess = context.Process(target=_work, args=(own, number, args.jobs), name=f"worker {number + 1}")
        process.start()
        processes.append(process)
    failed = True
    try:
        yield processes
        failed = False
    finally:
        if failed:
            interrupt(processes)
        for process in processes:
            process.join()
        torch.set_num_threads(before)
    for process in processes:
        if process.exitcode:
            tell(f"{process.name} ended with exit code {process.exitcode}; its trial stays open for --resume")


def interrupt(processes: list[BaseProcess]) -> None:
    """Ask the workers to stop. Ctrl-C in a terminal has already asked them, and a second time would stop them at once."""
    deadline = time.monotonic() + _PATIENCE
    for process in processes:
        process.join(timeout=max(deadline - time.monotonic(), 0.0))
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGINT)


def _work(args: argparse.Namespace, number: int, jobs: int) -> None:
    """Main function of an additional worker's process."""
    _choose_device(number)
    import torch

    from surgeon.commands.search.search import work
    from surgeon.errors import SurgeonError

    torch.set_num_threads(threads_of(jobs))
    try:
        sys.exit(work(args))
    except SurgeonError as error:
        print(f"surgeon: worker {number + 1}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _choose_device(number: int) -> None:
    """Assign the GPUs to the workers in turn, before a process has touched any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        devices = [str(i) for i in range(torch.cuda.device_count())]  # counts without creating a context
    else:
        devices = [part for part in visible.split(",") if part]
    if len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
