"""Placement search: feasible placements under budgets, and an Optuna search over them. `PlacementSampler` works standalone."""

if __name__ != "surgeon.search":
    raise ImportError("this folder is a part of surgeon: import surgeon.search, not search")

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgeon.search.budget import Budgets as Budgets
    from surgeon.search.gate import Gate as Gate
    from surgeon.search.sampling.sampler import PlacementSampler as PlacementSampler
    from surgeon.search.space import SpaceConfig as SpaceConfig

# Public name -> module that defines it. Nothing is imported before use: `surgeon --help` must not load torch.
_EXPORTS = {
    "Budgets": "surgeon.search.budget",
    "Gate": "surgeon.search.gate",
    "PlacementSampler": "surgeon.search.sampling.sampler",
    "SpaceConfig": "surgeon.search.space",
}

__all__ = ["Budgets", "Gate", "PlacementSampler", "SpaceConfig"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'surgeon.search' has no attribute {name!r}")
