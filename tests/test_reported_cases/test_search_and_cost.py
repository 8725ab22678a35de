"""Searches, costs and exports: what people report elsewhere, tried here."""

import os
from pathlib import Path

import pytest

from surgeon import machine as machines
from surgeon.search.study import worker_name


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a worker of a machine of the same host name, of whose process number there is none here."""
    monkeypatch.setattr(os, "getpid", lambda: 4194305)
    here = machines.machine()
    return f"{here[:-8]}{'0' * 8}-4194305-abcdef"


def test_workers_of_another_machine_of_this_name_are_not_taken_for_dead(elsewhere: str) -> None:
    """T1: containers and cloned machines have equal host names: a process number proves nothing there."""
    from surgeon.search.database import _is_gone

    assert not _is_gone(elsewhere)
    assert not _is_gone(f"{machines.machine()[:-9]}-4194305-abcdef")  # by an earlier surgeon
    assert _is_gone(worker_name())
    assert _is_gone(None)


def test_the_name_of_a_machine_tells_boots_and_containers_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """T1: boot and namespace of process numbers are part of it."""
    names = {machines.machine()}
    read, link = Path.read_text, Path.readlink
    monkeypatch.setattr(Path, "read_text", lambda self, **kw: "other" if self.name == "boot_id" else read(self, **kw))
    names.add(machines.machine.__wrapped__())
    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(Path, "readlink", lambda self: Path("pid:[1]") if self.name == "pid" else link(self))
    names.add(machines.machine.__wrapped__())
    assert len(names) == 3
