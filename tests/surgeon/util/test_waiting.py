"""What is waited for is said: on a terminal by one line that goes away, in a pipe by lines that get rarer."""

import argparse
import io
import re
import time

import pytest

from surgeon import cli
from surgeon.commands import export
from surgeon.commands.common import console
from surgeon.util.waiting import waiting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_short_wait_is_silent() -> None:
    for file in (Terminal(), io.StringIO()):
        with waiting("loading torch", file=file, after=5.0):
            pass
        assert file.getvalue() == ""


def test_a_long_wait_is_told() -> None:
    terminal, pipe, quiet = Terminal(), io.StringIO(), Terminal()
    with (
        waiting("loading torch", file=terminal, after=0.01),
        waiting("loading torch", file=pipe, after=0.01),
        waiting("loading torch", file=quiet, after=0.01, quiet=True),
    ):
        time.sleep(0.2)
    assert terminal.getvalue() == "\r\x1b[2Ksurgeon: loading torch ... 0 s\r\x1b[2K"
    assert pipe.getvalue() == "surgeon: loading torch ... 0 s\n"
    assert quiet.getvalue() == ""


def test_loading_libraries_is_told_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "waiting", lambda what, *, quiet, after: waiting(what, quiet=quiet, after=0.01))
    monkeypatch.setattr(cli, "import_module", lambda name: time.sleep(0.2))
    for quiet, told in ((False, "surgeon: loading slowly ... 0 s\n"), (True, "")):
        cli._load(argparse.Namespace(needs=("slowly", "slowly.part"), quiet=quiet))
        assert capsys.readouterr().err == told


def test_a_stage_that_takes_long_is_told_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_FIRST", 0.1)
    with console.Progress() as progress:
        progress("trace", 0, 1)
        time.sleep(0.8)
        progress("check", 0, 4)
    assert re.fullmatch(r"surgeon: trace, \d s so far\n", capsys.readouterr().err), "the next comes ten seconds later"
    with console.Progress(enabled=False) as progress:
        progress("trace", 0, 1)
        time.sleep(0.4)
    assert capsys.readouterr().err == ""


def test_lines_in_a_pipe_become_rare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture took several lines in a log, one every two seconds. The seconds are those of the stage."""
    now = [0.0]
    monkeypatch.setattr(console, "time", argparse.Namespace(monotonic=lambda: now[0]))
    progress = console.Progress()
    for _ in range(2):
        for done in range(200):
            now[0] += 1
            progress("draw", done, 200)
    first = [f"surgeon: draw {n}/200, {n} s so far" for n in (1, 11, 31, 71, 131, 191)]
    again = [f"surgeon: draw {n}/200, {n} s so far" for n in (51, 111, 171)]
    assert capsys.readouterr().err.splitlines() == first + again, "the second begins anew"


def test_a_slow_export_names_what_is_faster(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "_SLOW", 0.1)

    def told(free: str, *stages: str) -> str:
        args = argparse.Namespace(free=free, quiet=False)
        with console.Progress(enabled=False) as bars, export._Patience(args, bars) as progress:
            for stage in stages:
                progress(stage, 0, 1)
            time.sleep(0.3)
        return capsys.readouterr().err

    assert told("auto", "load", "trace with free batch", "write onnx").count("--free none") == 1
    assert told("auto", "trace with free batch", "check against the model") == ""
    assert told("none", "trace at one size") == ""


def test_a_terminal_gets_one_bar_per_stage_and_it_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setenv("COLUMNS", "60")
    with console.Progress() as progress:
        progress("trace", 0, 1)
        progress("build", 1, 4)
        progress("build", 4, 4)
    drawn = shown.getvalue().split("\r")
    assert [line.split("|")[0].split()[0] for line in drawn if "|" in line][:2] == ["trace", "trace"]
    assert any("build" in line and "4/4" in line for line in drawn)
    assert drawn[-1].strip() == ""
