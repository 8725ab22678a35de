"""torch.fx on any model: what feeds every convolution and what follows it.

timm's leaf modules and functions are leaves here, too. A module that cannot be traced becomes a leaf, and its children are
traced separately, so one untraceable block does not hide the rest.
"""

import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from surgeon.errors import ModelError
from surgeon.layers.base import DynamicConv2d

_DEPTH = 4  # number of operations reported after a convolution


@dataclass(frozen=True, kw_only=True)
class Neighbors:
    """A convolution's neighbors in the graph: what feeds it, and the operations after it until they fan out."""

    producer: str
    followers: tuple[str, ...]


def trace_neighbors(model: nn.Module) -> dict[str, Neighbors]:
    """Neighbors of every convolution and dynamic layer visible to torch.fx, by first name.

    What cannot be traced is left out. The model may be on the meta device, and should be a copy: untraceable modules may keep
    proxies in their attributes.
    """
    found: dict[str, Neighbors] = {}
    first_name = {id(module): name for name, module in model.named_modules()}
    pending = [("", model)]
    while pending:
        prefix, root = pending.pop()
        tracer = RobustTracer()
        try:
            graph = tracer.trace_quietly(root)
        except Exception:
            pending.extend((_join(prefix, name), child) for name, child in root.named_children() if _holds_conv(child))
            continue
        _collect(graph, root, first_name, found)
        for module in tracer.untraceable:
            name = first_name[id(module)]
            pending.extend((_join(name, part), child) for part, child in module.named_children() if _holds_conv(child))
    return found


def trace_graph(model: nn.Module) -> fx.GraphModule:
    """The model as a linted `GraphModule` with dynamic layers as leaves, traced in its current mode.

    Modules inside that cannot be traced stay leaves. Raises `ModelError` if the model's own forward cannot be traced.
    """
    tracer = RobustTracer()
    try:
        graph = tracer.trace_quietly(model)
    except Exception as error:
        raise ModelError(
            f"torch.fx cannot trace {type(model).__name__} ({type(error).__name__}: {error}). "
            f"Omit as_graph: the converted module tree does not need a trace."
        ) from error
    module = fx.GraphModule(tracer.root, graph, type(model).__name__)
    module.graph.lint()
    return module


class RobustTracer(fx.Tracer):
    """Tracer that keeps convolutions, dynamic layers and timm's leaves whole, and makes untraceable modules leaves."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=_timm_functions(), param_shapes_constant=True)
        self.leaves = (DynamicConv2d, _ConvNd, *_timm_modules())
        self.untraceable: list[nn.Module] = []

    def trace_quietly(self, root: nn.Module) -> fx.Graph:
        """Trace without warnings that eager code does not emit."""
        if isinstance(root, self.leaves):
            raise TypeError(f"{type(root).__name__} is a leaf: it cannot be traced alone")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.trace(root)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, self.leaves) or m in self.untraceable:
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        before = len(self.graph.nodes)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            self.untraceable.append(m)
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


def _timm_modules() -> tuple[type[nn.Module], ...]:
    try:
        timm_layers: Any = import_module("timm.layers")
    except ImportError:
        return ()
    return tuple(timm_layers.get_notrace_modules())


def _timm_functions() -> tuple[Callable[..., Any], ...]:
    try:
        timm_layers: Any = import_module("timm.layers")
    except ImportError:
        return ()
    return tuple(f for f in timm_layers.get_notrace_functions() if callable(f))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _holds_conv(module: nn.Module) -> bool:
    return any(isinstance(m, _ConvNd | DynamicConv2d) for m in module.modules())


# --- reading the graph --------------------------------------------------------------------------------------------


def _collect(graph: fx.Graph, root: nn.Module, first_name: dict[int, str], found: dict[str, Neighbors]) -> None:
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        module = root.get_submodule(str(node.target))
        if isinstance(module, _ConvNd | DynamicConv2d):
            neighbors = Neighbors(producer=_producer(node, root), followers=_followers(node, root))
            found.setdefault(first_name[id(module)], neighbors)


def _producer(node: fx.Node, root: nn.Module) -> str:
    inputs = node.all_input_nodes
    while inputs and _is_idle(inputs[0], root):
        inputs = inputs[0].all_input_nodes
    return _told(inputs[0], root) if inputs else "constant"


def _followers(node: fx.Node, root: nn.Module) -> tuple[str, ...]:
    told: list[str] = []
    while len(node.users) == 1 and len(told) < _DEPTH:
        node = next(iter(node.users))
        if not _is_idle(node, root):
            told.append(_told(node, root))
        if node.op == "output" or _is_join(node, root):
            break
    return tuple(told)


def _is_idle(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node is a module that is the identity in eval mode."""
    return node.op == "call_module" and isinstance(root.get_submodule(str(node.target)), nn.Identity | _DropoutNd)


def _is_join(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(root.get_submodule(str(node.target)), _ConvNd | DynamicConv2d)
    return _told(node, root) in ("add", "cat")


_ADDITIONS = frozenset({"add", "iadd", "add_"})


def _told(node: fx.Node, root: nn.Module) -> str:
    """One word for a node: the class of a module, the name of a function, `add` for every addition."""
    if node.op == "call_module":
        return type(root.get_submodule(str(node.target))).__name__
    if node.op in ("placeholder", "output"):
        return "input" if node.op == "placeholder" else "output"
    if node.op == "get_attr":
        return "constant"
    name = str(getattr(node.target, "__name__", node.target))
    if name in _ADDITIONS or node.target is operator.iadd:
        return "add"
    return name
