"""surgeon gives trained vision networks content-adaptive convolutions without changing their function."""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

_ROOT = Path(__file__).resolve().parent.parent
_BESIDE = frozenset({"surgeon.layers", "surgeon.search", "surgeon.zoo", "surgeon.cli"})


class _Checkout:
    """Finds the parts of the package that a checkout keeps next to this folder, and nothing else there."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(_ROOT)]) if name in _BESIDE else None


if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "layers").is_dir():  # a wheel has them in this folder
    sys.meta_path.append(_Checkout)

__version__ = "0.1.0"

if TYPE_CHECKING:
    from surgeon.collapsing.collapse import collapse as collapse
    from surgeon.costs import Cost as Cost
    from surgeon.costs import cost as cost
    from surgeon.costs import cost_table as cost_table
    from surgeon.errors import SurgeonError as SurgeonError
    from surgeon.exporting.export import export as export
    from surgeon.models.checkpoint import load as load
    from surgeon.models.checkpoint import save as save
    from surgeon.models.hub import from_pretrained as from_pretrained
    from surgeon.models.hub import push_to_hub as push_to_hub
    from surgeon.models.names import open_model as open_model
    from surgeon.records.collapse_report import CollapseReport as CollapseReport
    from surgeon.records.recipe import Recipe as Recipe
    from surgeon.records.report import Report as Report
    from surgeon.sites.sites import ConvSite as ConvSite
    from surgeon.surgery.convert import convert as convert
    from surgeon.surgery.convert import inspect as inspect
    from surgeon.surgery.rewrite import dynamic_layers as dynamic_layers
    from surgeon.surgery.rewrite import revert as revert
    from surgeon.surgery.rewrite import static as static
    from surgeon.surgery.verify import verify as verify
    from surgeon.zoo.evaluate import evaluate as evaluate
    from surgeon.zoo.finetune import finetune as finetune
    from surgeon.zoo.finetune.parameters import parameter_groups as parameter_groups
    from surgeon.zoo.tasks import create_task as create_task

# Public name -> module that defines it. Nothing is imported before use: `surgeon --help` must not load torch.
_EXPORTS = {
    "CollapseReport": "surgeon.records.collapse_report",
    "ConvSite": "surgeon.sites.sites",
    "Cost": "surgeon.costs",
    "Recipe": "surgeon.records.recipe",
    "Report": "surgeon.records.report",
    "SurgeonError": "surgeon.errors",
    "collapse": "surgeon.collapsing.collapse",
    "convert": "surgeon.surgery.convert",
    "cost": "surgeon.costs",
    "cost_table": "surgeon.costs",
    "create_task": "surgeon.zoo.tasks",
    "dynamic_layers": "surgeon.surgery.rewrite",
    "evaluate": "surgeon.zoo.evaluate",
    "export": "surgeon.exporting.export",
    "finetune": "surgeon.zoo.finetune",
    "from_pretrained": "surgeon.models.hub",
    "inspect": "surgeon.surgery.convert",
    "load": "surgeon.models.checkpoint",
    "open_model": "surgeon.models.names",
    "parameter_groups": "surgeon.zoo.finetune.parameters",
    "push_to_hub": "surgeon.models.hub",
    "revert": "surgeon.surgery.rewrite",
    "save": "surgeon.models.checkpoint",
    "static": "surgeon.surgery.rewrite",
    "verify": "surgeon.surgery.verify",
}

__all__ = sorted(["__version__", *_EXPORTS])


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'surgeon' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
