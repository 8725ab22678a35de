"""`surgeon.convert` as a pass over torch.fx graphs."""

from collections.abc import Sequence
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from surgeon.errors import ConfigError, ModelError, NothingReplacedError, VerificationError
from surgeon.layers.base import DynamicConv2d, LayerConfig
from surgeon.records.recipe import Recipe
from surgeon.records.report import Report
from surgeon.surgery.convert import convert
from surgeon.surgery.rewrite import dynamic_layers


class DynamicConvPass(PassBase):
    """Replace convolutions of a `GraphModule`, modules and functions, by equivalent dynamic layers.

    Requires a `GraphModule` with parameters or buffers that runs on the example inputs, or on inputs derived from its placeholders.
    Does what `surgeon.convert` does, in place: the same selectors, plan, reasons and check; a functional convolution is named by
    its weight, `layer1.0.conv1` for `layer1.0.conv1.weight`. Ensures that every layer of `report.replaced` is called in the
    graph, which is linted and compiled. After an error the graph is unchanged.

    If nothing is left to replace, as in a second run, nothing is changed: `modified` is False, `report` None, and
    `unchanged` states for every selected convolution that it is already a dynamic layer, or why it cannot become one.
    """

    def __init__(
        self,
        layers: str | Sequence[str] | Recipe | None = None,
        type: str | LayerConfig | None = None,
        *,
        pattern: str | None = None,
        recipe: Recipe | None = None,
        example_inputs: Any = None,
        input_size: Sequence[int] | int | None = None,
        calibration: Any = None,
        seed: int = 0,
        check: bool = True,
        **layer_options: Any,
    ) -> None:
        """Arguments as for `surgeon.convert`."""
        super().__init__()
        self.arguments: dict[str, Any] = {
            "layers": layers,
            "type": type,
            "pattern": pattern,
            "recipe": recipe,
            "example_inputs": example_inputs,
            "input_size": input_size,
            "calibration": calibration,
            "seed": seed,
            "check": check,
            **layer_options,
        }
        self.report: Report | None = None  # of the last call
        self.unchanged = ""

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raises `ConfigError` for anything but a `GraphModule`, `ModelError` for one without parameters or buffers."""
        if not isinstance(graph_module, fx.GraphModule):
            raise ConfigError(
                f"the pass rewrites a torch.fx.GraphModule, got a {type(graph_module).__name__}: trace it first "
                f"(torch.fx.symbolic_trace, torch.export), or call surgeon.convert"
            )
        if not any(True for _ in graph_module.parameters()) and not any(True for _ in graph_module.buffers()):
            raise ModelError(
                "the graph has no parameters or buffers, so no convolution in it has a weight to start from: its "
                "weights may be inputs of it, as in ExportedProgram.graph_module; use ExportedProgram.module()"
            )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Convert in place. Raises the errors of `surgeon.convert`."""
        self.report, self.unchanged = None, ""
        try:
            _, self.report = convert(graph_module, inplace=True, **self.arguments)
        except NothingReplacedError as error:
            if not error.already:
                raise
            self.unchanged = str(error)
            return PassResult(graph_module, False)
        return PassResult(graph_module, True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Raises `VerificationError` unless the graph is well-formed and calls every new layer that it called before."""
        graph_module.graph.lint()
        if self.report is None:
            return
        layers = dynamic_layers(graph_module)
        missing = [
            entry.name for entry in self.report.replaced if not isinstance(layers.get(entry.name), DynamicConv2d)
        ]
        if missing:
            raise VerificationError(f"the graph has lost new layers: {', '.join(missing[:3])}")
