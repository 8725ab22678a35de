"""Database URLs and the drivers they need."""

import contextlib
import importlib.util
import sqlite3
from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from surgeon.search.study.journal import StudyError

DRIVERS = {  # by dialect: (module, name in a URL, package); a URL without a driver uses the first one installed
    "postgresql": (("psycopg", "psycopg", "psycopg[binary]"), ("psycopg2", "psycopg2", "psycopg2-binary")),
    "mysql": (("pymysql", "pymysql", "pymysql"), ("MySQLdb", "mysqldb", "mysqlclient")),
    "mariadb": (("pymysql", "pymysql", "pymysql"), ("MySQLdb", "mysqldb", "mysqlclient")),
}


def parse_url(text: str) -> URL:
    """A database URL with its driver. Raises `StudyError` for an invalid URL, and if the driver is not installed."""
    try:
        url = make_url(text)
    except ArgumentError as error:
        raise StudyError(f"--storage: expected a URL such as postgresql://user@host/database, got {text!r}") from error
    if url.get_backend_name() == "postgres":  # spelling used by some services
        url = url.set(drivername=url.drivername.replace("postgres", "postgresql", 1))
    backend = url.get_backend_name()
    if backend == "sqlite" and url.database in (None, "", ":memory:"):
        raise StudyError("--storage: a SQLite database in memory is lost with its process; name a file: sqlite:///FILE")
    if backend == "sqlite":
        url = url.set(database=str(Path(url.database or "").absolute()))
    if "+" not in url.drivername and backend in DRIVERS:
        known = DRIVERS[backend]
        found = next((name for module, name, _ in known if importlib.util.find_spec(module)), None)
        if found is None:
            packages = " or ".join(f"pip install '{package}'" for _, _, package in known)
            raise StudyError(f"--storage: no driver for {backend} is installed: {packages}")
        url = url.set(drivername=f"{backend}+{found}")
    try:
        url.get_dialect().import_dbapi()
    except NoSuchModuleError as error:
        raise StudyError(
            f"--storage: there is no database {url.drivername!r}; expected postgresql, mysql, ..."
        ) from error
    except ImportError as error:
        package = next((p for m, name, p in DRIVERS.get(backend, ()) if url.get_driver_name() == name), None)
        hint = f": pip install '{package or error.name or url.get_driver_name()}'"
        raise StudyError(f"--storage: the driver of {url.drivername} is not installed{hint}") from error
    return url


def check_named(text: str, where: str) -> None:
    """Raise `StudyError` unless a database named by an untrusted folder is a local file with studies in it.

    A server could receive passwords from the environment, driver options could name files, and any file could become a database.
    """
    try:
        url = make_url(text)
        backend = url.get_backend_name()
    except (ArgumentError, ValueError) as error:
        raise StudyError(f"{where} names a database by {text[:80]!r}, which is not a URL") from error
    if backend != "sqlite" or url.query:
        raise StudyError(
            f"{where} names the database {shown(url)}, which is not on this machine: give it with --storage if you trust it"
        )
    path = Path(url.database or "")
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            found = connection.execute("SELECT name FROM sqlite_master WHERE name = 'studies'").fetchone()
    except sqlite3.Error as error:
        raise StudyError(f"cannot read the database {path} named by {where}: {error}") from error
    if found is None:
        raise StudyError(f"the database {path} named by {where} contains no studies")


def shown(url: URL) -> str:
    """The URL without the password."""
    return url.render_as_string(hide_password=True)
