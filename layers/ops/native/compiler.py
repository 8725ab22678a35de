"""From C sources to a loaded library: compiled once per machine by the system's compiler, cached in a folder owned by the user.

A library is named after its inputs (sources, flags, CPU, compiler) and its own SHA-256, so that one rename publishes it
atomically, processes that compile at the same time do not interfere, and a damaged file is detected before it is loaded.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock

from surgeon.errors import BackendError
from surgeon.util.files import cache_folder, write_bytes

SOURCES = ("lanes.h", "gemm.h", "window.h", "acda.h", "dconv.h", "dconv_layer.h", "pafu.h", "pafu_back.h", "native.c")
MAIN = "native.c"
ABI = 1  # what `surgeon_abi` of native.c returns
TIME_LIMIT = 120.0  # seconds per compiler run
COMPILERS = ("cc", "gcc", "clang")
LANES = "SURGEON_LANES"  # environment variable: floats in a vector, if not as many as this CPU has
NARROWER = {"16": (), "8": ("-mno-avx512f",), "4": ("-mno-avx",)}  # flags for x86-64
UNUSED_DAYS = 60  # after which a library is removed when another is compiled
INSTALL = "install gcc or clang (Debian and Ubuntu: apt install gcc; macOS: xcode-select --install), or name one in CC"


# --- the compiler -------------------------------------------------------------------------------------------------


def compiler() -> list[str]:
    """The command of the C compiler: CC, else the first of `COMPILERS` on the PATH. Raises `BackendError`."""
    try:
        given = shlex.split(os.environ.get("CC", ""))
    except ValueError as problem:
        raise BackendError(f"CC is not a command ({problem}): {os.environ['CC']}") from problem
    if given:
        if shutil.which(given[0]) is None:
            raise BackendError(f"C compiler {given[0]} (from CC) not found: {INSTALL}")
        return given
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        raise BackendError(f"no C compiler found ({', '.join(COMPILERS)}): {INSTALL}")
    return [found]


def flags() -> list[str]:
    """Flags for this machine's CPU, with `LANES` of them; 64-bit ARM has what the sources use without any, and not every
    compiler knows "native" there.

    Raises `BackendError` for a number of lanes that no CPU has.
    """
    lanes, arm = os.environ.get(LANES, ""), platform.machine() in ("arm64", "aarch64")
    if lanes and lanes not in NARROWER:
        raise BackendError(f"{LANES} must be {', '.join(NARROWER)} or unset, got {lanes!r}")
    own = [] if arm else ["-march=native", *NARROWER.get(lanes, ())]
    return ["-std=gnu11", "-O3", *own, "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math"]


def _run(command: Sequence[str]) -> str:
    """Output of a command. Raises `BackendError` if it fails or takes longer than `TIME_LIMIT`.

    On a timeout, the command and its child processes are killed.
    """
    name = Path(command[0]).name
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as problem:
        raise BackendError(f"C compiler {name} did not start: {problem.strerror or problem}") from problem
    try:
        told, _ = process.communicate(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise BackendError(f"C compiler {name} timed out after {TIME_LIMIT:g} s") from None
    text = told.decode("utf-8", "replace")
    if process.returncode:
        lines = [line for line in text.splitlines() if "error" in line] or text.splitlines() or ["no output"]
        raise BackendError(f"C compiler {name} failed (exit code {process.returncode}): {lines[0].strip()[:200]}")
    return text


# --- names --------------------------------------------------------------------------------------------------------


def sources() -> dict[str, bytes]:
    """The C files, by name."""
    folder = Path(__file__).resolve().parent
    return {name: (folder / name).read_bytes() for name in SOURCES}


@cache
def _cpu() -> str:
    """Inputs of "native": the CPU's name and instruction sets."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    wanted = ("model name", "flags", "Features", "CPU part")
    told = sorted({line for line in lines if line.startswith(wanted)})
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *told])


def _digest(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()


def machine_key() -> str:
    """Key of the sources, flags and CPU."""
    return _digest(*sources().values(), " ".join(flags()).encode(), _cpu().encode())[:20]


def compiler_key(command: Sequence[str]) -> str:
    """Key of a compiler and its version."""
    return _digest(" ".join(command).encode(), _run([*command, "--version"]).encode())[:12]


# --- the folder ---------------------------------------------------------------------------------------------------


def library_folder() -> Path:
    """Folder of the compiled libraries: `native` in the cache folder."""
    return cache_folder() / "native"


def check_own(path: Path) -> None:
    """Raise `BackendError` unless only the user can write to the file or folder: it contains code."""
    found = path.stat()
    if found.st_uid != os.geteuid():
        raise BackendError(
            f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}; refusing to load code from it"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BackendError(f"{path} is writable by others; refusing to load code from it (fix: chmod go-w)")


def _cached(pattern: str) -> Path | None:
    """A cached library of that name, verified. Raises `BackendError` if its content does not match its name."""
    folder = library_folder()
    if not folder.is_dir():
        return None
    check_own(folder)
    found = sorted(folder.glob(pattern))
    if not found:
        return None
    path = found[0]
    check_own(path)
    if path.stem.rpartition("-")[2] != _digest(path.read_bytes())[:20]:
        raise BackendError(f"compiled library {path} is damaged; delete it to have it recompiled")
    with suppress(OSError):  # a cache that cannot be written to keeps its times
        os.utime(path)
    return path


def _remove_unused(folder: Path) -> None:
    """Remove libraries that were last loaded more than `UNUSED_DAYS` ago; a process that has one loaded keeps it."""
    oldest = time.time() - UNUSED_DAYS * 86_400
    for path in folder.glob("*.so"):
        with suppress(OSError):  # another process was faster
            if path.stat().st_mtime < oldest:
                path.unlink()


# --- compiling and loading ----------------------------------------------------------------------------------------


def _compile(command: list[str], key: str) -> Path:
    folder = library_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    check_own(folder)
    print(f"surgeon: compiling the CPU operators with {command[0]} (once on this machine)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="surgeon-native-") as work:
        for name, text in sources().items():
            (Path(work) / name).write_bytes(text)
        made = Path(work) / "native.so"
        _run([*command, *flags(), "-o", str(made), str(Path(work) / MAIN)])
        if not made.is_file():
            raise BackendError(f"C compiler {command[0]} reported success but wrote nothing")
        content = made.read_bytes()
        _open(made)  # do not keep a library that cannot be loaded
    path = folder / f"{key}-{_digest(content)[:20]}.so"
    write_bytes(path, content, BackendError)
    path.chmod(0o700)
    _remove_unused(folder)
    return path


def _open(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        version = int(library.surgeon_abi())
    except (OSError, AttributeError) as problem:
        raise BackendError(f"cannot load the compiled library: {str(problem)[:200]}") from problem
    if version != ABI:
        raise BackendError(f"compiled library {path} has ABI version {version}, expected {ABI}")
    wanted = os.environ.get(LANES)
    if wanted and int(library.surgeon_lanes()) != int(wanted):
        raise BackendError(f"this CPU has vectors of {library.surgeon_lanes()} floats, not of {wanted} ({LANES})")
    return library


def find_or_compile() -> ctypes.CDLL:
    """The library, from the cache or compiled now. Raises `BackendError` with the reason if there is none."""
    if os.name != "posix":
        raise BackendError("compiled operators need Linux or macOS")
    try:
        machine = machine_key()
        try:
            command = compiler()
        except BackendError:
            kept = _cached(f"{machine}-*.so")
            if kept is None:
                raise
            return _open(kept)
        key = f"{machine}-{compiler_key(command)}"
        return _open(_cached(f"{key}-*.so") or _compile(command, key))
    except OSError as problem:
        if isinstance(problem, BackendError):
            raise
        raise BackendError(f"cannot use the library folder {library_folder()}: {problem}") from problem


class _State:
    """Result of one attempt per process: the library, or the reason why there is none."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.library: ctypes.CDLL | None = None
        self.reason = ""

    def settled(self) -> bool:
        return self.library is not None or self.reason != ""

    def settle(self) -> None:
        if self.settled():
            return
        with self.lock:
            if self.settled():  # by another thread, in the meantime
                return
            try:
                self.library = find_or_compile()
            except BackendError as problem:
                self.reason = " ".join(str(problem).split())
                print(f"surgeon: falling back to torch's operators on the CPU: {self.reason}", file=sys.stderr)


_state = _State()


def forget_lock() -> None:
    """After a fork, the lock's holder does not exist in the child."""
    _state.lock = Lock()


def library() -> ctypes.CDLL:
    """The loaded library. Raises `BackendError` if there is none."""
    _state.settle()
    if _state.library is None:
        raise BackendError(f"no compiled operators: {_state.reason}")
    return _state.library


def why_no_library() -> tuple[str, ...]:
    """The reason why there is no library; empty if there is one. Tries to compile it on the first call."""
    _state.settle()
    return () if _state.library is not None else (_state.reason,)


def told_library() -> str:
    """Status line for `surgeon doctor`: the library in use, or why there is none and what one would gain."""
    reasons = why_no_library()
    if not reasons:
        sizes = [path.stat().st_size for path in library_folder().glob("*.so")]
        return f"{library()._name} ({len(sizes)} in its folder, {sum(sizes) / 1e6:.1f} MB)"
    return f"none: {reasons[0]}. With it, ACDA, PAFU and DConv run about 1.2 to 4 times as fast on the CPU"


# Equivalent to torch.compiler.assume_constant_result, which would load all of torch._dynamo (2 s) on every import of surgeon.
vars(why_no_library)["_dynamo_marked_constant"] = True
