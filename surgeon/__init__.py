"""surgeon gives trained vision networks content-adaptive convolutions without changing what they compute."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

# A checkout keeps `layers`, `search`, `zoo` and `cli.py` beside this folder; the wheel keeps them inside it.
_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "layers").is_dir():
    __path__.append(str(_ROOT))

__version__ = "0.1.0"

if TYPE_CHECKING:
    from surgeon.checkpoint import load as load
    from surgeon.checkpoint import save as save
    from surgeon.collapse import collapse as collapse
    from surgeon.collapse_report import CollapseReport as CollapseReport
    from surgeon.convert import convert as convert
    from surgeon.convert import inspect as inspect
    from surgeon.costs import Cost as Cost
    from surgeon.costs import cost as cost
    from surgeon.costs import cost_table as cost_table
    from surgeon.errors import SurgeonError as SurgeonError
    from surgeon.export import export as export
    from surgeon.hub import from_pretrained as from_pretrained
    from surgeon.hub import push_to_hub as push_to_hub
    from surgeon.models import open_model as open_model
    from surgeon.recipe import Recipe as Recipe
    from surgeon.report import Report as Report
    from surgeon.rewrite import dynamic_layers as dynamic_layers
    from surgeon.rewrite import revert as revert
    from surgeon.rewrite import static as static
    from surgeon.sites import ConvSite as ConvSite
    from surgeon.verify import verify as verify
    from surgeon.zoo.evaluate import evaluate as evaluate
    from surgeon.zoo.finetune import finetune as finetune
    from surgeon.zoo.tasks import create_task as create_task

# Public name -> module that defines it. Nothing is imported before it is used: `surgeon --help` must not load torch.
_EXPORTS = {
    "CollapseReport": "surgeon.collapse_report",
    "ConvSite": "surgeon.sites",
    "Cost": "surgeon.costs",
    "Recipe": "surgeon.recipe",
    "Report": "surgeon.report",
    "SurgeonError": "surgeon.errors",
    "collapse": "surgeon.collapse",
    "convert": "surgeon.convert",
    "cost": "surgeon.costs",
    "cost_table": "surgeon.costs",
    "create_task": "surgeon.zoo.tasks",
    "dynamic_layers": "surgeon.rewrite",
    "evaluate": "surgeon.zoo.evaluate",
    "export": "surgeon.export",
    "finetune": "surgeon.zoo.finetune",
    "from_pretrained": "surgeon.hub",
    "inspect": "surgeon.convert",
    "load": "surgeon.checkpoint",
    "open_model": "surgeon.models",
    "push_to_hub": "surgeon.hub",
    "revert": "surgeon.rewrite",
    "save": "surgeon.checkpoint",
    "static": "surgeon.rewrite",
    "verify": "surgeon.verify",
}

__all__ = [
    "CollapseReport",
    "ConvSite",
    "Cost",
    "Recipe",
    "Report",
    "SurgeonError",
    "__version__",
    "collapse",
    "convert",
    "cost",
    "cost_table",
    "create_task",
    "dynamic_layers",
    "evaluate",
    "export",
    "finetune",
    "from_pretrained",
    "inspect",
    "load",
    "open_model",
    "push_to_hub",
    "revert",
    "save",
    "static",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'surgeon' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """`surgeon.convert` is the function, also after the file of the same name was imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _EXPORTS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
