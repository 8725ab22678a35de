"""The test suite itself."""

import os

import torch


def test_the_processes_of_a_run_share_the_cores() -> None:
    """Twice as many threads as cores make some tests several times as slow. MKL has a word of its own for how many."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    assert torch.get_num_threads() <= max(1, (os.cpu_count() or 1) // processes)
