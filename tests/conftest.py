"""What the tests share: quiet determinism, tiny models, and the optional data folder."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

# The processes of one run share the cores, with what they start; torch reads both when it is imported, MKL's before OpenMP's.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ |= {"OMP_NUM_THREADS": str(share), "MKL_NUM_THREADS": str(share)}

import pytest
import torch
from hypothesis import settings

from surgeon.util.copying import seed_torch
from tests.support.places import ROOT

settings.register_profile("surgeon", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("surgeon")

# A shell starts what it puts in the background with Ctrl-C ignored; the tests of interrupts need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test may wait for a network: the hub clients fail at once instead of trying again.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m gpu` skips where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What the tests have imported stays; the collection after every training need not look through it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # Triton's bindings report what is left at the end as leaked


@pytest.fixture(autouse=True)
def _seed() -> None:
    seed_torch(0)
    return


@pytest.fixture(autouse=True, scope="session")
def _compiled() -> None:
    """The library of the CPU operators is loaded before a test has a cache of its own, for which it would be compiled again."""
    from surgeon.layers.ops.native import compiler

    compiler.why_no_library()


@pytest.fixture(autouse=True, scope="session")
def _no_plug_is_pulled() -> Iterator[None]:
    """What the system was given survives a killed process; to wait for the disk, thousands of times, would show no more."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture
def nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For tests of what writes files: in a folder of their own, which holds no unfinished ones afterwards."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("*.partial*")), "nothing half-written may stay"


@pytest.fixture
def tiny_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny tasks by name, an empty cache, and an empty folder to work in."""
    from surgeon.zoo.tasks import registry
    from tests.support.search.tasks import add_tasks

    registry.task_names()  # registers the real ones
    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))
    add_tasks()
    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def data() -> Path:
    """Real evaluation material (`SURGEON_DATA`, or ../shared/data beside the checkout); skips where it is absent."""
    folder = Path(os.environ.get("SURGEON_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no evaluation data at {folder}")
    return folder


@pytest.fixture
def fake_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer type "fake", for the time of a test."""
    from surgeon.layers import registry
    from tests.support.fake_layer import FakeConv2d

    registry.layer_types()
    monkeypatch.setitem(registry._TYPES, "fake", FakeConv2d)
