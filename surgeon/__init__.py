"""surgeon gives trained vision networks content-adaptive convolutions without changing what they compute."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# A checkout keeps `layers`, `search`, `zoo` and `cli.py` beside this folder; the wheel keeps them inside it.
_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "layers").is_dir():
    __path__.append(str(_ROOT))

__version__ = "0.1.0"

if TYPE_CHECKING:
    from surgeon.errors import SurgeonError as SurgeonError

# Public name -> module that defines it. Nothing is imported before it is used: `surgeon --help` must not load torch.
_EXPORTS = {
    "SurgeonError": "surgeon.errors",
}

__all__ = ["SurgeonError", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'surgeon' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
