"""A PostgreSQL server on loopback for tests: in a temporary folder, ended with the tests."""

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def why_no_postgresql() -> str | None:
    """The reason why no server can be started here."""
    if _binaries() is None:
        return "PostgreSQL (Debian's package postgresql) is not installed"
    if importlib.util.find_spec("psycopg") is None and importlib.util.find_spec("psycopg2") is None:
        return "no driver for PostgreSQL is installed: pip install 'psycopg[binary]'"
    if os.geteuid() == 0 and _other_user() is None:
        return "PostgreSQL does not run as root, and there is no user postgres or nobody"
    return None


def _binaries() -> Path | None:
    """The folder of initdb and pg_ctl."""
    found = shutil.which("initdb")
    folders = [*([Path(found).resolve().parent] if found else []), *Path("/usr/lib/postgresql").glob("*/bin")]
    return next((folder for folder in folders if (folder / "pg_ctl").exists()), None)


def _other_user() -> str | None:
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in known), None)


def free_port() -> int:
    """A port of the loopback that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A running server: `url` of its database, `stop` and `start` for tests of what happens in between."""

    def __init__(self, folder: Path) -> None:
        binaries = _binaries()
        assert binaries is not None
        self.folder, self._binaries, self.port = folder, binaries, free_port()
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = pwd.getpwnam(_other_user() or "")
            self._user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(folder, user.pw_uid, user.pw_gid)
        self._run("initdb", "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-sync", "-D", str(folder / "data"))

    @property
    def url(self) -> str:
        return f"postgresql://tester@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories='' -c fsync=off"
        log = str(self.folder / "log")
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-l", log, "-w", "-o", options, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")

    def _run(self, *command: str) -> None:
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
        done = subprocess.run(
            [str(self._binaries / command[0]), *command[1:]],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # not a pipe: the server would hold it open
            stderr=subprocess.DEVNULL,
            timeout=120,
            **self._user,
        )
        assert done.returncode == 0, f"{command[0]} failed; see {self.folder / 'log'}"


@contextmanager
def postgresql() -> Iterator[Server]:
    """A fresh server; its folder is not pytest's, which other users cannot enter."""
    with tempfile.TemporaryDirectory(prefix="surgeon-postgresql-") as name:
        server = Server(Path(name))
        server.start()
        try:
            yield server
        finally:
            server.stop()
