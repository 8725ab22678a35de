"""FLOPs, parameters and GPU memory of a model, computed without running it.

The package is called `costs` because `surgeon.cost` is the function.
"""

from surgeon.costs.build import cost_table
from surgeon.costs.estimate import Cost, LayerCost, cost
from surgeon.costs.flops import FlopCounter, UnknownOperatorError, register_formula
from surgeon.costs.settings import OPTIMIZERS
from surgeon.costs.table import CostTable, Option
from surgeon.util.parse import parse_input_size, parse_quantity

__all__ = [
    "OPTIMIZERS",
    "Cost",
    "CostTable",
    "FlopCounter",
    "LayerCost",
    "Option",
    "UnknownOperatorError",
    "cost",
    "cost_table",
    "parse_input_size",
    "parse_quantity",
    "register_formula",
]
