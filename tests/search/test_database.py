"""A search in a database: SQLite always, a real PostgreSQL where there is one. Several workers, kills, servers that go away."""

import random
import signal
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from surgeon.search.run import Outcome, Search
from surgeon.search.study import database, database_url, study
from surgeon.search.study.database import StudyDatabase
from surgeon.search.study.database_url import parse_url
from surgeon.search.study.journal import StudyError
from surgeon.search.study.record import Record
from surgeon.search.study.study import OtherStudyError
from tests.support.search.records import proposals
from tests.support.search.servers import Server, free_port, postgresql, why_no_postgresql
from tests.support.search.toys import toy_problem, toy_search, toy_space
from tests.support.search.workers import finish, kill_midway, worker

# A database server is the system's, not a package that `pip install ".[dev]"` could bring.
NO_SERVER = why_no_postgresql()
needs_postgresql = pytest.mark.skipif(NO_SERVER is not None, reason=NO_SERVER or "")
POSTGRESQL = pytest.param("postgresql", marks=needs_postgresql)


@pytest.fixture(autouse=True, scope="module")
def _no_plug_is_pulled() -> Iterator[None]:
    """SQLite waits for the disk as little as the server does."""

    def connected(connection: Any, record: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", connected)
    yield
    sqlalchemy.event.remove(sqlalchemy.Engine, "connect", connected)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with postgresql() as running:
        yield running


# Processes that are killed: a file of SQLite is among the slow tests, a server and (test_search_study) a journal are not.
ON_A_SERVER = pytest.mark.parametrize(
    "storage", [pytest.param("sqlite", marks=pytest.mark.slow), POSTGRESQL], indirect=True
)


@pytest.fixture(params=["sqlite", POSTGRESQL])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'study.db'}"
    url: str = request.getfixturevalue("server").url
    _empty(url)
    return url


def _empty(url: str) -> None:
    engine = sqlalchemy.create_engine(parse_url(url))
    with engine.begin() as connection:
        for line in ("DROP SCHEMA public CASCADE", "CREATE SCHEMA public"):
            connection.execute(sqlalchemy.text(line))
    engine.dispose()


def read(url: str) -> list[Record]:
    study = StudyDatabase(url, "toy")
    try:
        return study.view()
    finally:
        study.close()


def run(search: Search, *, resume: bool = False) -> Outcome:
    try:
        search.open(resume=resume)
        return search.run()
    finally:
        search.file.close()


TRIALS = 10  # eight that every search begins with, and two of its own


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What a search in a file proposes that nothing interrupts."""
    whole = toy_search(tmp_path_factory.mktemp("whole") / "w.jsonl", sampler="decoder", trials=TRIALS, seed=3)
    run(whole)
    return proposals(whole.file.records())


# --- one worker ---------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_search_is_the_same_in_a_database_and_in_a_file(storage: str, undisturbed: list[Any], tmp_path: Path) -> None:
    search = toy_search(tmp_path / "a" / "s", storage=storage, sampler="decoder", trials=TRIALS, seed=3)
    (tmp_path / "a").mkdir()
    assert run(search).evaluated == TRIALS
    assert proposals(read(storage)) == undisturbed
    again = toy_search(tmp_path / "a" / "s", storage=storage, sampler="decoder", trials=TRIALS + 1, seed=3)
    assert run(again, resume=True).evaluated == 1


def test_what_is_refused(storage: str, tmp_path: Path) -> None:
    run(toy_search(tmp_path / "s", storage=storage, trials=2))
    before = proposals(read(storage))
    with pytest.raises(StudyError, match="already exists; continue it"):
        run(toy_search(tmp_path / "s", storage=storage, trials=2))
    with pytest.raises(OtherStudyError, match="seed is 0 in the study and 1 here"):
        run(toy_search(tmp_path / "s", storage=storage, seed=1), resume=True)
    tight = toy_search(tmp_path / "s", storage=storage, problem=toy_problem(toy_space(), share=0.3))
    with pytest.raises(OtherStudyError, match=r"budgets\.flops"):
        run(tight, resume=True)
    other = toy_search(tmp_path / "s", storage=storage)
    other.file.name = "nobody's"
    with pytest.raises(StudyError, match=r"no study .*nobody's.*Existing studies: toy"):
        run(other, resume=True)
    assert proposals(read(storage)) == before


def test_a_study_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'x.db'}"
    theirs = optuna.create_study(storage=url, study_name="toy")
    theirs.enqueue_trial({"x": 1})
    with pytest.raises(StudyError, match="not one created by surgeon"):
        run(toy_search(tmp_path / "s", storage=url))
    assert len(theirs.trials) == 1
    theirs._storage.remove_session()


def test_a_beginning_that_was_killed_is_begun_anew(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = optuna.Study.set_user_attr

    def killed(self: optuna.Study, key: str, value: Any) -> None:
        if key != study._NOTES:  # after the study itself, and its notes
            raise KeyboardInterrupt
        write(self, key, value)

    search = toy_search(tmp_path / "s", storage=storage, trials=9)
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "set_user_attr", killed)
        with pytest.raises(KeyboardInterrupt):
            run(search)
    with pytest.raises(StudyError, match="no study"):
        run(toy_search(tmp_path / "s", storage=storage, trials=9), resume=True)
    assert run(toy_search(tmp_path / "s", storage=storage, trials=9)).evaluated == 9
    assert sum(one.source == "original" for one in read(storage)) == 1


@pytest.mark.parametrize(
    "moment", [pytest.param(moment, marks=() if moment in (0, 4, 8) else pytest.mark.slow) for moment in range(9)]
)
def test_a_proposal_that_was_half_written_is_taken_up(
    moment: int, storage: str, undisturbed: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a database what belongs together is not written together: a kill leaves any part of it."""
    path = tmp_path / "s"
    search = toy_search(path, storage=storage, sampler="decoder", trials=TRIALS, seed=3)
    search.open()
    left = TRIALS - 2  # trials that go well
    write = optuna.Trial.set_user_attr

    def killed(self: optuna.Trial, key: str, value: Any) -> None:
        if self.number >= left and len(self.user_attrs) >= moment:
            raise KeyboardInterrupt
        write(self, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Trial, "set_user_attr", killed)
        with pytest.raises(KeyboardInterrupt):
            search.run()
    search.file.close()
    monkeypatch.setattr(database, "_is_gone", lambda name: True)  # this process was the dead one
    again = toy_search(path, storage=storage, sampler="decoder", trials=TRIALS, seed=3)
    assert run(again, resume=True).stopped == "trials"
    assert proposals(read(storage)) == undisturbed


@ON_A_SERVER
def test_a_killed_worker_goes_on_as_if_nothing_had_happened(storage: str, tmp_path: Path) -> None:
    path, moments = tmp_path / "s", random.Random(7)
    completed: list[Any] = []
    for kill in range(2):
        child = worker(path, "decoder", 14, 0.08, "resume" if kill else "new", storage=storage)
        kill_midway(child, moments.uniform(0.2, 0.9))
        now = [one for one in proposals(read(storage)) if one[2] is not None]
        assert now[: len(completed)] == completed
        completed = now
    assert finish(worker(path, "decoder", 14, 0.0, storage=storage), timeout=300) == "trials"
    whole = toy_search(tmp_path / "w.jsonl", sampler="decoder", trials=14, seed=3)
    run(whole)
    killed = read(storage)
    assert proposals(killed) == proposals(whole.file.records())
    assert sum(one.attempts - 1 for one in killed) <= 2


# --- several ------------------------------------------------------------------------------------------------------


@ON_A_SERVER
def test_three_workers_share_a_study_and_one_dies(storage: str, tmp_path: Path) -> None:
    path, trials = tmp_path / "s", 24
    search = toy_search(path, storage=storage, sampler="decoder", trials=trials, seed=3)
    search.open()
    search.file.close()
    children = [worker(path, "decoder", trials, 0.2, "wait", storage=storage) for _ in range(3)]
    for child in children:
        assert child.stdout.readline() == "open\n"
    (tmp_path / "go").touch()  # all at once, however long they took to start
    time.sleep(0.5)
    children[2].send_signal(signal.SIGKILL)
    children[2].communicate()
    for child in children[:2]:
        assert finish(child, timeout=300) == "trials"
    last = worker(path, "decoder", trials, 0.0, storage=storage)
    finish(last, timeout=300)  # whatever the dead one left when the others had nothing to do any more
    records = read(storage)
    assert {one.state for one in records} == {"complete"}
    assert sum(one.counts for one in records) == trials
    assert set(Counter(one.hash for one in records if one.counts).values()) == {1}  # no duplicates
    calls = Counter((tmp_path / "calls.txt").read_text().split())
    assert len(calls) == trials  # none lost
    assert sum(calls.values()) - len(calls) <= 1  # what was in flight was begun twice
    assert len({one.worker for one in records}) >= 2


def impatient(path: Path, url: str) -> Search:
    """A search whose workers are taken for dead after 4 seconds of silence."""
    search = toy_search(path, storage=url, trials=8)
    assert isinstance(search.file, StudyDatabase)
    search.file.grace = 4
    return search


def was_silent(path: Path, seconds: int) -> None:
    """All signs of life in this file of SQLite came so much earlier."""
    with closing(sqlite3.connect(path)) as connection, connection:
        moved = connection.execute(
            "UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, ?)", (f"-{seconds} seconds",)
        )
        assert moved.rowcount == 1


def test_a_silent_worker_loses_its_trial_and_its_late_result(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'x.db'}"
    slow, other = (impatient(tmp_path / "s", url) for _ in range(2))
    slow.open()
    claim: Any
    with slow.file.working():
        claim = slow._next()
        was_silent(tmp_path / "x.db", 60)
        assert run(other, resume=True).evaluated == 8
        told = slow.file.tell(claim.trial, [99.0])
    assert not told
    slow.file.close()
    assert read(url)[claim.trial.number].values != (99.0,)
    assert read(url)[claim.trial.number].attempts == 2


def test_a_worker_that_gives_signs_of_life_keeps_its_trial(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'x.db'}"
    search = impatient(tmp_path / "s", url)
    search.open()
    claim: Any
    with search.file.working():
        claim = search._next()
        with search.file.alive(claim.trial):
            was_silent(tmp_path / "x.db", 60)
            time.sleep(2.5)  # two further ones
            with search.file.exclusive():
                assert search.file.orphans() == []
            assert search.file.running() == {search.file.worker}
    search.file.close()


def test_the_lock_is_one_for_all_processes(storage: str, tmp_path: Path) -> None:
    first, second = StudyDatabase(storage, "toy"), StudyDatabase(storage, "toy")
    inside, order = threading.Event(), list[str]()

    def hold() -> None:
        with first.exclusive(), first.exclusive():
            inside.set()
            time.sleep(0.4)
            order.append("first")

    thread = threading.Thread(target=hold)
    first.storage()
    second.storage()
    thread.start()
    inside.wait()
    with second.exclusive():
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
    first.close()
    second.close()


# --- servers that are not there -----------------------------------------------------------------------------------


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    url = f"postgresql://me:secret@127.0.0.1:{free_port()}/x"
    with pytest.raises(StudyError, match=r"cannot reach the database .*refused") as caught:
        run(toy_search(tmp_path / "s", storage=url))
    assert "secret" not in str(caught.value)


@needs_postgresql
def test_a_server_that_comes_back_gets_the_result(tmp_path: Path) -> None:
    with postgresql() as own:
        search = toy_search(tmp_path / "s", storage=own.url, trials=8)
        search.open()
        with search.file.working():
            claim: Any = search._next()
            own.stop()
            back = threading.Timer(1.5, own.start)
            back.start()
            assert search.file.tell(claim.trial, [1.5])
            back.join()
        search.file.close()
        assert read(own.url)[claim.trial.number].values == (1.5,)


@pytest.mark.long
@needs_postgresql
def test_a_server_that_goes_away_costs_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_PATIENCE", 0.5)
    with postgresql() as own:
        search = toy_search(tmp_path / "s", storage=own.url, trials=12)
        search._progress = lambda one, best: own.stop() if one.number == 3 else None
        search.open()
        with pytest.raises(
            StudyError, match=r"cannot reach the database .*finished trials are kept, resume with --join toy"
        ):
            search.run()
        search.file.close()
        own.start()
        kept = [one for one in read(own.url) if one.state == "complete"]
        assert len(kept) == 4
        assert run(toy_search(tmp_path / "s", storage=own.url, trials=12), resume=True).stopped == "trials"
        records = read(own.url)
        assert [records[one.number].values for one in kept] == [one.values for one in kept]
        assert sum(one.counts for one in records) == 12


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "expected a URL such as postgresql://"),
        ("sqlite://", "in memory is lost"),
        ("sqlite:///:memory:", "in memory is lost"),
        ("nothing://host/x", "there is no database 'nothing'"),
        ("postgresql+pg8000://host/x", "not installed: pip install 'pg8000'"),
    ],
)
def test_urls_that_lead_nowhere(url: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pg8000", None)
    with pytest.raises(StudyError, match=said):
        parse_url(url)


def test_a_driver_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_url.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StudyError, match=r"no driver for postgresql is installed: pip install 'psycopg\[binary\]' or"):
        parse_url("postgres://me@host/x")


def test_states_as_optuna_names_them(storage: str, tmp_path: Path) -> None:
    run(toy_search(tmp_path / "s", storage=storage, sampler="random", trials=9))
    study = optuna.load_study(storage=parse_url(storage).render_as_string(hide_password=False), study_name="toy")
    assert Counter(trial.state for trial in study.trials) == {TrialState.COMPLETE: 9}
    study._storage.remove_session()
    study._storage._backend.engine.dispose()
