"""What a model costs: FLOPs, parameters and GPU memory, before anything is run.

The package is called `costs` because `surgeon.cost` is the function.
"""

from surgeon.costs.estimate import OPTIMIZERS, Cost, LayerCost, cost
from surgeon.costs.flops import FlopCounter, UnknownOperatorError, register_formula
from surgeon.costs.parse import parse_input_size, parse_quantity

__all__ = [
    "OPTIMIZERS",
    "Cost",
    "FlopCounter",
    "LayerCost",
    "UnknownOperatorError",
    "cost",
    "parse_input_size",
    "parse_quantity",
    "register_formula",
]
