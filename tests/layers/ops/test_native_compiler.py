"""Compiling the CPU operators: the cache, whom it trusts, and what is said when there is no library."""

import os
import platform
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from surgeon.errors import BackendError
from surgeon.layers.acda.operator import ACDA_CONV
from surgeon.layers.examples import example, operators
from surgeon.layers.ops.native import compiler
from tests.support.forks import Fork
from tests.support.layers.native import check_close
from tests.support.places import ROOT

Fresh = Callable[[], None]


def _has_compiler() -> bool:
    try:
        return bool(compiler.compiler())
    except BackendError:
        return False


needs_compiler = pytest.mark.skipif(not _has_compiler(), reason="needs a C compiler")

# Those on this machine; `cc` is one of the others
INSTALLED = [name for name in compiler.COMPILERS if name != "cc" and shutil.which(name)]


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fresh:
    """A cache of its own, and a process that has not tried yet; call it to forget the try again."""
    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path / "cache"))

    def forget() -> None:
        monkeypatch.setattr(compiler, "_state", compiler._State())

    forget()
    return forget


def script(path: Path, text: str) -> str:
    """A compiler that knows its version and otherwise does this."""
    path.write_text(f'#!/bin/sh\nif [ "$#" = 1 ]; then echo "a compiler, version 1"; exit 0; fi\n{text}\n')
    path.chmod(0o755)
    return str(path)


def out_of(command: str) -> str:
    """Shell that finds the file after -o and runs `command` on it as $out."""
    return f'while [ "$1" != -o ]; do shift; done; out="$2"; {command}'


@pytest.fixture(scope="module")
def built() -> Path:
    """The compiled library of this machine."""
    return Path(compiler.find_or_compile()._name)


@pytest.fixture
def at_once(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that has the library ready."""
    monkeypatch.setenv("CC", script(tmp_path / "quick-cc", out_of(f'sleep 0.2; cp {built} "$out"')))


def check_torch_runs_because(said: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = example(ACDA_CONV, "cpu", torch.float32)
    assert ACDA_CONV.choose(*arguments).name == "torch"
    ACDA_CONV(*arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if "compiling" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("surgeon: falling back to torch's operators on the CPU: ")
    assert said in lines[0]
    (reason,) = ACDA_CONV.why_not("native", *arguments)
    assert said in reason
    with pytest.raises(BackendError, match="no backend can run acda_conv"):
        ACDA_CONV(*arguments, backend="native")


@pytest.mark.long
@needs_compiler
def test_it_is_compiled_once_with_one_line(fresh: Fresh, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = example(ACDA_CONV, "cpu", torch.float32)
    assert ACDA_CONV.choose(*arguments).name == "native"
    told = capsys.readouterr().err
    assert told.startswith("surgeon: compiling the CPU operators with ")
    assert told.count("\n") == 1
    (library,) = (tmp_path / "cache" / "native").iterdir()
    assert stat.S_IMODE(library.stat().st_mode) & 0o022 == 0
    fresh()
    assert ACDA_CONV.choose(*arguments).name == "native"
    assert capsys.readouterr().err == ""


@needs_compiler
@pytest.mark.usefixtures("at_once")
def test_without_a_compiler_the_cached_library_serves(fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler.why_no_library() == ()
    fresh()
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert compiler.why_no_library() == ()


@needs_compiler
@pytest.mark.usefixtures("at_once")
def test_other_sources_are_another_library(
    fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compiler.why_no_library() == ()
    fresh()
    changed = compiler.sources() | {"native.c": compiler.sources()["native.c"] + b"\n"}
    monkeypatch.setattr(compiler, "sources", lambda: changed)
    assert compiler.why_no_library() == ()
    assert len(list((tmp_path / "cache" / "native").iterdir())) == 2
    assert capsys.readouterr().err.count("compiling") == 2


@needs_compiler
@pytest.mark.usefixtures("at_once")
def test_a_library_that_was_not_loaded_for_long_is_removed_by_the_next(fresh: Fresh, tmp_path: Path) -> None:
    assert compiler.why_no_library() == ()
    (used,) = (tmp_path / "cache" / "native").iterdir()
    long_ago, lately = (time.time() - days * 86_400 for days in (compiler.UNUSED_DAYS + 1, compiler.UNUSED_DAYS - 1))
    other, unused = used.with_name("other.so"), used.with_name("unused.so")
    for path, when in ((other, lately), (unused, long_ago), (used, long_ago)):
        path.touch()
        os.utime(path, (when, when))
    fresh()
    assert compiler.why_no_library() == ()
    assert used.stat().st_mtime > lately
    compiler._compile(compiler.compiler(), "another")
    assert other.exists()
    assert used.exists()
    assert not unused.exists()


@needs_compiler
@pytest.mark.usefixtures("at_once")
def test_lanes_are_chosen_and_checked(fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    own = compiler.library().surgeon_lanes()
    other = 4 if own != 4 else 8
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for lanes, said in (
        (other, f"has vectors of {own} floats, not of {other}"),
        (3, "must be 16, 8, 4 or unset, got '3'"),
    ):
        fresh()
        monkeypatch.setenv("SURGEON_LANES", str(lanes))
        (reason,) = compiler.why_no_library()
        assert said in reason
    monkeypatch.setenv("SURGEON_LANES", "8")
    assert "-mno-avx512f" in compiler.flags()


@needs_compiler
@pytest.mark.parametrize("machine", ["aarch64", "arm64"])  # Linux, macOS
def test_arm_needs_no_compiler_that_knows_the_cpu_by_native(
    machine: str, built: Path, fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = "error: unknown value 'native' for '-mcpu'"
    text = f'case "$*" in *native\\ *) echo "{says}"; exit 1;; esac\n' + out_of(f'cp {built} "$out"')
    monkeypatch.setenv("CC", script(tmp_path / "cc", text))
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert compiler.why_no_library() == ()
    fresh()
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    (reason,) = compiler.why_no_library()
    assert says in reason


@needs_compiler
def test_the_operators_by_every_installed_compiler(fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not optimized, which takes a second and not seven; all tests with CC=clang: docs/operators.md."""
    quick = [flag.replace("-O3", "-O0") for flag in compiler.flags()]
    monkeypatch.setattr(compiler, "flags", lambda: quick)
    for name in INSTALLED or ["cc"]:
        monkeypatch.setenv("CC", name)
        fresh()
        assert compiler.why_no_library() == (), name
        check_operators()


def check_operators() -> None:
    for operator in operators():
        results = []
        for backend in ("native", "reference"):
            arguments = example(operator, "cpu", torch.float32)
            given = [a.requires_grad_() for a in arguments if isinstance(a, torch.Tensor) and a.is_floating_point()]
            y = operator(*arguments, backend=backend)
            results.append([y, *torch.autograd.grad(y.square().sum(), given)])
        check_close(*results)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("most", [8, 4])
def test_vectors_of_any_width_are_the_reference(most: int, tmp_path: Path) -> None:
    """Narrower ones than the CPU's own, down to 4 floats; a CPU that has no wider ones runs its own."""
    lanes = min(most, compiler.library().surgeon_lanes())
    environment = os.environ | {"SURGEON_LANES": str(lanes), "SURGEON_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    files = [f"tests/layers/{method}/test_native.py" for method in ("acda", "pafu", "sekg")]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def test_no_compiler(
    fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    check_torch_runs_because("no C compiler found (cc, gcc, clang): install gcc or clang", capsys)


def test_a_compiler_that_is_not_there(
    fresh: Fresh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc")
    check_torch_runs_because("C compiler /nowhere/cc (from CC) not found", capsys)


def test_a_name_of_a_compiler_that_is_no_command(
    fresh: Fresh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", 'gcc "-m64')
    check_torch_runs_because('CC is not a command (No closing quotation): gcc "-m64', capsys)


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("echo 'native.c:3: error: no such thing'; exit 4", "failed (exit code 4): native.c:3: error: no such thing"),
        ("exit 1", "failed (exit code 1): no output"),
        ("exit 0", "reported success but wrote nothing"),
        (out_of('echo rubbish > "$out"'), "cannot load the compiled library"),
        (out_of(': > "$out"'), "cannot load the compiled library"),
    ],
)
def test_a_compiler_that_fails(
    does: str,
    said: str,
    fresh: Fresh,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CC", script(tmp_path / "cc", does))
    check_torch_runs_because(said, capsys)
    assert not list((tmp_path / "cache" / "native").iterdir()), "what cannot be loaded is not kept"


def test_a_compiler_that_hangs_is_ended_with_what_it_started(
    fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child = tmp_path / "child"
    monkeypatch.setenv("CC", script(tmp_path / "cc", f"sleep 600 & echo $! > {child}; wait"))
    monkeypatch.setattr(compiler, "TIME_LIMIT", 1.0)
    check_torch_runs_because("timed out after 1 s", capsys)
    state = Path(f"/proc/{child.read_text().strip()}/stat")
    if state.parent.parent.is_dir():
        deadline = time.monotonic() + 10
        while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not state.exists() or state.read_text().split()[2] == "Z"


@needs_compiler
@pytest.mark.usefixtures("at_once")
def test_a_truncated_library(fresh: Fresh, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compiler.why_no_library() == ()
    (library,) = (tmp_path / "cache" / "native").iterdir()
    content = library.read_bytes()
    library.unlink()  # this process has it mapped
    library.write_bytes(content[:5000])
    fresh()
    capsys.readouterr()
    check_torch_runs_because("is damaged; delete it to have it recompiled", capsys)
    library.unlink()
    fresh()
    assert compiler.why_no_library() == ()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_to(
    mode: int, fresh: Fresh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache" / "native"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    check_torch_runs_because(f"{folder} is writable by others; refusing to load code from it", capsys)


def test_a_folder_of_somebody_else(
    fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache" / "native"
    folder.mkdir(parents=True)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    check_torch_runs_because(f"{folder} belongs to user {user}, not to {user + 1}", capsys)


@needs_compiler
@pytest.mark.usefixtures("at_once")
def test_a_library_that_others_may_write_to(fresh: Fresh, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compiler.why_no_library() == ()
    (library,) = (tmp_path / "cache" / "native").iterdir()
    library.chmod(0o766)
    fresh()
    capsys.readouterr()
    check_torch_runs_because("is writable by others", capsys)


def test_a_folder_that_cannot_be_made(fresh: Fresh, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cache").write_text("a file")
    check_torch_runs_because("cannot use the library folder", capsys)


def test_naming_torch_compiles_nothing(fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGEON_BACKEND", "torch")
    ACDA_CONV(*example(ACDA_CONV, "cpu", torch.float32))
    assert not (tmp_path / "cache").exists()


def operate(arguments: Sequence[str]) -> None:
    """What a process does that needs the library, and has none yet."""
    compiler._state = compiler._State()
    operands = example(ACDA_CONV, "cpu", torch.float32)
    print(ACDA_CONV.choose(*operands).name, ACDA_CONV(*operands).sum().item())


@needs_compiler
@pytest.mark.usefixtures("at_once")
def test_processes_that_compile_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path / "cache"))
    running = [Fork(operate, []) for _ in range(2)]
    told = [process.communicate() for process in running]
    assert all(process.returncode == 0 for process in running), told
    assert len({out for out, _ in told}) == 1
    assert told[0][0].startswith("native ")
    assert not [path for path in (tmp_path / "cache" / "native").iterdir() if path.suffix != ".so"]
