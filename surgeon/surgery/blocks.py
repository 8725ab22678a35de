"""Block patterns: building blocks of a network, found in its graph by torch.fx's subgraph matching.

A residual block x + conv(act(conv(x))), with or without norms after the convolutions and operations on the shortcut, becomes
ADFNet's DCB (`surgeon.layers.sekg.blocks.DCB`): a DConv after its first convolution, initialized to the identity, so that the
block's function does not change. The layer is the "sekg" layer in "dense" mode, in the order of the paper.

An existing block cannot become an MDCB: see `MDCB_REFUSED`.
"""

import itertools
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.utils.matcher_utils import SubgraphMatcher
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from surgeon.errors import ConfigError, SelectionError
from surgeon.sites.trace import RobustTracer
from surgeon.util.copying import copy_to_meta, seeded

PATTERNS = ("dcb", "mdcb")
MDCB_REFUSED = (
    "a dense block cannot become an equivalent MDCB: its convolutions read one another's outputs in turn, while those "
    "of an MDCB run in parallel at dilations 1, 3 and 5, after attention that starts at factors other than 1. A network with "
    "MDCBs is trained from scratch (zoo/rdn_mdcb); the pattern dcb takes residual blocks"
)
_ADDITIONS = frozenset({operator.add, operator.iadd, torch.add, torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor})
_ACTS = ("relu", "relu6", "leakyrelu", "prelu", "elu", "gelu", "silu", "hardswish", "mish")
_NORMS = ("batchnorm", "instancenorm", "groupnorm", "layernorm")
_REACH = 6  # maximum operations on a shortcut


# Vocabulary of a shadow graph, which keeps only the operations of a network that patterns can match.


def conv(x: Any) -> Any:
    """A convolution module."""
    return x


def norm(x: Any) -> Any:
    """A normalization."""
    return x


def act(x: Any) -> Any:
    """An activation."""
    return x


def add(x: Any, y: Any) -> Any:
    """An addition of two maps."""
    return (x, y)


def other(*inputs: Any) -> Any:
    """Any other operation."""
    return inputs


def check_pattern(pattern: str) -> None:
    """Raise `ConfigError` for an unknown pattern, or one that no block can become."""
    if pattern == "mdcb":
        raise ConfigError(MDCB_REFUSED)
    if pattern != "dcb":
        raise ConfigError(f"a pattern is one of {', '.join(PATTERNS)}, got {pattern!r}")


def find_blocks(model: nn.Module, pattern: str) -> dict[str, str]:
    """Where a pattern's dynamic part goes: name of the convolution, and of the block's last one.

    Raises `ConfigError` as `check_pattern`, and for a model that torch.fx cannot trace; `SelectionError` for one in which nothing
    matches.
    """
    check_pattern(pattern)
    shadow = _shadow(model)
    found: dict[str, str] = {}
    for form in itertools.product((True, False), repeat=4):
        body, x, y, first, last = _residual_block(*form)
        matcher = SubgraphMatcher(body, match_output=False, match_placeholder=False, remove_overlapping_matches=True)
        for match in matcher.match(shadow):
            if _is_shortcut(match.nodes_map[y], match.nodes_map[x]):
                found[match.nodes_map[first].meta["name"]] = match.nodes_map[last].meta["name"]
    if not found:
        raise SelectionError(
            f"{type(model).__name__} has no residual block of two convolutions: x + conv(act(conv(x))), with or without norms"
        )
    return found


def _residual_block(
    identity: bool, first_norm: bool, second_norm: bool, swapped: bool
) -> tuple[fx.Graph, fx.Node, fx.Node, fx.Node, fx.Node]:
    """y + conv(act(conv(x))) in one of its forms: the graph, x, y (x itself in `identity`), and both convolutions."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = x if identity else graph.placeholder("y")
    first = node = graph.call_function(conv, (x,))
    if first_norm:
        node = graph.call_function(norm, (node,))
    last = node = graph.call_function(conv, (graph.call_function(act, (node,)),))
    if second_norm:
        node = graph.call_function(norm, (node,))
    graph.output(graph.call_function(add, (y, node) if swapped else (node, y)))
    return graph, x, y, first, last


def _is_shortcut(y: fx.Node, x: fx.Node) -> bool:
    """Whether y is x, or x after a few operations on it alone."""
    for _ in range(_REACH):
        if y is x:
            return True
        if len(y.all_input_nodes) != 1:
            return False
        y = y.all_input_nodes[0]
    return y is x


# --- the shadow graph -----------------------------------------------------------------------------------------------


def _shadow(model: nn.Module) -> fx.Graph:
    twin = copy_to_meta(model)
    try:
        if isinstance(twin, fx.GraphModule):
            graph: fx.Graph = twin.graph
        else:
            with seeded(0):
                graph = RobustTracer().trace_quietly(twin.eval())
    except Exception as error:
        raise ConfigError(
            f"torch.fx cannot trace {type(model).__name__} ({type(error).__name__}: {error}), so no block can be found in it: "
            f"select its layers with layers= and type="
        ) from error
    names = {id(module): name for name, module in twin.named_modules()}
    shadow = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        inputs = [new[n] for n in node.all_input_nodes]
        word = _word(node, twin)
        if node.op == "output":
            shadow.output(tuple(inputs))
        elif node.op == "placeholder":
            new[node] = shadow.placeholder(node.name)
        elif word is None and inputs:  # identity
            new[node] = inputs[0]
        else:
            taken = inputs[:1] if word in (conv, norm, act) else inputs
            new[node] = shadow.call_function(word or other, tuple(taken))
            if word is conv:
                new[node].meta["name"] = names[id(twin.get_submodule(str(node.target)))]
    return shadow


def _word(node: fx.Node, root: nn.Module) -> Any:
    """The word for a node; None for an identity in eval mode."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if isinstance(module, nn.Identity | _DropoutNd):
            return None
        if isinstance(module, nn.Conv2d):
            return conv
        kind = type(module).__name__.lower()
        if isinstance(module, _NormBase) or kind.startswith(_NORMS):
            return norm if "act" not in kind else other
        return act if kind in _ACTS else other
    if node.op in ("call_function", "call_method"):
        if node.target in _ADDITIONS or node.target in ("add", "add_"):
            return add if len(node.all_input_nodes) == 2 else other
        name = str(getattr(node.target, "__name__", node.target)).partition(".")[0].rstrip("_").replace("_", "")
        if name in _ACTS:
            return act
        if name in _NORMS:
            return norm
    return other
