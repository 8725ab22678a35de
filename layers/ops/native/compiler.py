"""From C sources to a loaded library: compiled once a machine by the system's compiler, kept in a folder of the user's own.

A library is named by what it was made of (sources, flags, CPU, compiler) and by its own SHA-256, so that one rename makes it
appear whole, processes that compile at the same time do each other no harm, and a damaged file is noticed before it is loaded.
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
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from threading import Lock

from surgeon.errors import BackendError
from surgeon.util.files import cache_folder, write_bytes

SOURCES = ("lanes.h", "gemm.h", "window.h", "acda.h", "dconv.h", "pafu.h", "pafu_back.h", "native.c")
MAIN = "native.c"
ABI = 1  # what `surgeon_abi` of native.c returns
TIME_LIMIT = 120.0  # seconds, of one run of the compiler
COMPILERS = ("cc", "gcc", "clang")
INSTALL = "install gcc or clang (Debian and Ubuntu: apt install gcc; macOS: xcode-select --install), or name one in CC"


# --- the compiler -------------------------------------------------------------------------------------------------


def compiler() -> list[str]:
    """The command of the C compiler: CC, else the first of `COMPILERS` on the PATH. Raises `BackendError`."""
    given = shlex.split(os.environ.get("CC", ""))
    if given:
        if shutil.which(given[0]) is None:
            raise BackendError(f"the C compiler that CC names, {given[0]}, is not there: {INSTALL}")
        return given
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        raise BackendError(f"there is no C compiler ({', '.join(COMPILERS)}): {INSTALL}")
    return [found]


def flags() -> list[str]:
    """For this machine's own CPU; GCC and Clang know "native" on ARM as a CPU."""
    own = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    return ["-std=gnu11", "-O3", own, "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math"]


def _run(command: Sequence[str]) -> str:
    """What a command prints. Raises `BackendError` where it fails, or takes longer than `TIME_LIMIT`.

    It is then ended, with what it started.
    """
    name = Path(command[0]).name
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as problem:
        raise BackendError(f"the C compiler {name} does not start: {problem.strerror or problem}") from problem
    try:
        told, _ = process.communicate(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise BackendError(f"the C compiler {name} was not done within {TIME_LIMIT:g} s") from None
    text = told.decode("utf-8", "replace")
    if process.returncode:
        lines = [line for line in text.splitlines() if "error" in line] or text.splitlines() or ["it says nothing"]
        raise BackendError(f"the C compiler {name} fails (exit code {process.returncode}): {lines[0].strip()[:200]}")
    return text


# --- names --------------------------------------------------------------------------------------------------------


def sources() -> dict[str, bytes]:
    """The C files, by name."""
    folder = Path(__file__).resolve().parent
    return {name: (folder / name).read_bytes() for name in SOURCES}


@cache
def _cpu() -> str:
    """What "native" depends on: the CPU's name and instruction sets."""
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
    """Names sources, flags and CPU."""
    return _digest(*sources().values(), " ".join(flags()).encode(), _cpu().encode())[:20]


def compiler_key(command: Sequence[str]) -> str:
    """Names a compiler and its version."""
    return _digest(" ".join(command).encode(), _run([*command, "--version"]).encode())[:12]


# --- the folder ---------------------------------------------------------------------------------------------------


def library_folder() -> Path:
    """Where compiled libraries are kept: `native` in the cache folder."""
    return cache_folder() / "native"


def check_own(path: Path) -> None:
    """Raise `BackendError` unless the file or folder is the user's own and nobody else may write to it: it holds code."""
    found = path.stat()
    if found.st_uid != os.geteuid():
        raise BackendError(
            f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}: nothing is loaded from there"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BackendError(f"others may write to {path}: nothing is loaded from there (chmod go-w makes it your own)")


def _cached(pattern: str) -> Path | None:
    """A library of that name, checked. Raises `BackendError` where it is not what its name says."""
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
        raise BackendError(f"the compiled library {path} is damaged: delete it, and it is compiled again")
    return path


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
            raise BackendError(f"the C compiler {command[0]} says that it has succeeded, but wrote nothing")
        content = made.read_bytes()
        _open(made)  # what cannot be loaded is not kept
    path = folder / f"{key}-{_digest(content)[:20]}.so"
    write_bytes(path, content, BackendError)
    path.chmod(0o700)
    return path


def _open(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        version = int(library.surgeon_abi())
    except (OSError, AttributeError) as problem:
        raise BackendError(f"the compiled library does not load: {str(problem)[:200]}") from problem
    if version != ABI:
        raise BackendError(f"the compiled library {path} is of version {version}, expected {ABI}")
    return library


def find_or_compile() -> ctypes.CDLL:
    """The library: of the cache, or compiled now. Raises `BackendError` with the reason why there is none."""
    if os.name != "posix":
        raise BackendError("it is compiled on Linux and macOS only")
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
        raise BackendError(f"the folder of compiled libraries, {library_folder()}: {problem}") from problem


class _State:
    """One try a process: the library, or the reason why there is none."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.library: ctypes.CDLL | None = None
        self.reason = ""

    def settle(self) -> None:
        with self.lock:
            if self.library is not None or self.reason:
                return
            try:
                self.library = find_or_compile()
            except BackendError as problem:
                self.reason = " ".join(str(problem).split())
                print(f"surgeon: torch's operators run on the CPU, not the compiled: {self.reason}", file=sys.stderr)


_state = _State()


def forget_lock() -> None:
    """After a fork: whoever held the lock is not in the child."""
    _state.lock = Lock()


def library() -> ctypes.CDLL:
    """The loaded library. Raises `BackendError` where there is none."""
    _state.settle()
    if _state.library is None:
        raise BackendError(f"no compiled operators: {_state.reason}")
    return _state.library


def why_no_library() -> tuple[str, ...]:
    """The reason why there is no library; empty where there is one. Compiles it where that has not been tried yet."""
    _state.settle()
    return () if _state.library is not None else (_state.reason,)


def told_library() -> str:
    """For `surgeon doctor`: which library there is, or why there is none and what one would bring."""
    reasons = why_no_library()
    if not reasons:
        return str(library()._name)
    return f"none, because {reasons[0]}. With one, ACDA, PAFU and DConv are about 1.2 to 4 times as fast on the CPU"


# What torch.compiler.assume_constant_result does; calling that would load all of torch._dynamo (2 s) for every import of surgeon.
vars(why_no_library)["_dynamo_marked_constant"] = True
