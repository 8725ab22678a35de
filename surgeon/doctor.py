"""Diagnosis of this machine: its devices, and the backend of every operator on each, as dispatched and tested."""

import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from surgeon import __version__
from surgeon.errors import BackendError
from surgeon.layers.examples import example, operators
from surgeon.layers.ops.dispatch import Operator
from surgeon.layers.ops.native.compiler import library_folder, told_library
from surgeon.surgery.compare import compare
from surgeon.util.files import cache_folder

PACKAGES = (
    *("torch", "torchvision", "timm", "triton", "accelerate", "optuna", "torchmetrics", "safetensors"),
    *("numpy", "scipy", "onnx", "onnxscript", "onnxruntime"),
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}  # relative to the reference in float32

_VARIABLES = (
    "SURGEON_BACKEND",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "TRITON_INTERPRET",
    "HF_HUB_OFFLINE",
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One operator, device and dtype: the backend that runs ("" for none) and its error relative to the reference.

    `against` lists, for every other backend, the reasons why it does not run. `problem` is set if the backend fails.
    """

    operator: str
    device: str
    dtype: str
    backend: str
    error: float | None = None
    problem: str = ""
    against: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Versions (None: not installed), devices, settings, folders, and one finding per operator, device and dtype."""

    versions: dict[str, str | None]
    devices: list[dict[str, Any]]
    settings: dict[str, Any]
    folders: dict[str, str]
    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        """Whether every operator has a backend on every device, and agrees with its reference."""
        return not any(finding.problem for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"healthy": self.healthy}


def diagnose() -> Diagnosis:
    """Diagnose the machine; runs every operator on a small input."""
    devices = _devices()
    names = [device["name"] for device in devices if device["usable"]]
    findings = [_find(o, device, dtype) for device in names for o in operators() for dtype in DTYPES]
    return Diagnosis(versions=_versions(), devices=devices, settings=_settings(), folders=_folders(), findings=findings)


# --- operators ----------------------------------------------------------------------------------------------------


def _find(operator: Operator, device: str, dtype: str) -> Finding:
    args = example(operator, device, DTYPES[dtype])
    about: dict[str, Any] = {"operator": operator.name, "device": device, "dtype": dtype}
    try:
        chosen = operator.choose(*args)
    except BackendError as error:
        return Finding(**about, backend="", problem=str(error), against=_against(operator, "", args))
    against = _against(operator, chosen.name, args)
    try:
        with torch.no_grad():
            found = chosen.run(*args)
            expected = operator(*example(operator, "cpu", torch.float32), backend="reference")
    except Exception as error:  # a kernel that does not compile, a driver that does not fit
        return Finding(**about, backend=chosen.name, problem=f"{type(error).__name__}: {error}", against=against)
    error_found = compare(expected, found.to("cpu", torch.float32)).max_rel
    wrong = not error_found <= TOLERANCE[dtype]
    problem = f"differs from the reference by {error_found:.1e} (at most {TOLERANCE[dtype]:g})" if wrong else ""
    return Finding(**about, backend=chosen.name, error=error_found, problem=problem, against=against)


def _against(operator: Operator, chosen: str, args: tuple[Any, ...]) -> dict[str, list[str]]:
    """Reasons why each of the other backends does not run."""
    return {
        name: operator.why_not(name, *args) or [f"it could run, but {chosen or 'another'} takes precedence"]
        for name in operator.backends
        if name != chosen
    }


# --- the machine --------------------------------------------------------------------------------------------------


def _versions() -> dict[str, str | None]:
    def of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    own = {"surgeon": __version__, "python": platform.python_version(), "system": platform.platform()}
    return own | {name: of(name) for name in PACKAGES}


def _devices() -> list[dict[str, Any]]:
    cpu = {
        "name": "cpu",
        "what": _cpu_name(),
        "usable": True,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    devices: list[dict[str, Any]] = [cpu | {"capability": torch.backends.cpu.get_cpu_capability()}]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        facts = {"memory_bytes": found.total_memory, "capability": f"{found.major}.{found.minor}"}
        devices.append({"name": f"cuda:{index}", "what": found.name, "usable": True} | facts)
    if len(devices) == 1:
        built = f"torch is built for CUDA {torch.version.cuda}, but finds no device" if torch.version.cuda else ""
        why = built or "this torch is built without CUDA"
        devices.append({"name": "cuda", "what": why, "usable": False})
    return devices


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _settings() -> dict[str, Any]:
    own = sorted(name for name in os.environ if name.startswith("SURGEON_"))
    return {
        "threads": torch.get_num_threads(),
        "threads between operators": torch.get_num_interop_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32 products": torch.get_float32_matmul_precision(),
        "C++ compiler (torch.compile on the CPU)": shutil.which(os.environ.get("CXX", "g++")),
        "compiled CPU operators": told_library(),
        "interpreter": sys.executable,
    } | {name: os.environ.get(name) for name in (*_VARIABLES, *own)}


def _folders() -> dict[str, str]:
    """Folders of weights and compiled kernels."""
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        home = Path.home()
    except RuntimeError:  # there is no home folder
        home = Path("~")
    return {
        "surgeon": str(Path(__file__).resolve().parent),
        "torch weights": torch.hub.get_dir(),
        "Hugging Face weights": HF_HUB_CACHE,
        "Triton kernels": os.environ.get("TRITON_CACHE_DIR", str(home / ".triton" / "cache")),
        "compiled CPU operators": str(library_folder()),
        "tables of costs and gains": str(cache_folder()),
    }
