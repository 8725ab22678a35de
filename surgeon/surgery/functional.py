"""Functional convolutions of a graph: `F.conv2d`, `aten.conv2d`, `aten.convolution`, with a weight stored in the graph.

A module tree has no module to replace there. When raised, such a convolution becomes an `nn.Conv2d` called by the graph, placed at
its weight (`layer1.0.conv1` for `layer1.0.conv1.weight`) and with the same parameter objects, so that everything that applies to
convolutions applies to it (`surgeon.surgery.raised`). Those not replaced in the end are turned back.

Graphs are those of `torch.fx.GraphModule`s anywhere in a model (from `symbolic_trace`, `create_feature_extractor`, timm's fx
features, `ExportedProgram.module()`), and of the modules of `torch.export.unflatten`.
"""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from surgeon.sites.sites import ConvSite
from surgeon.surgery.rewrite import ORIGIN
from surgeon.util.copying import seeded

_PLAIN = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_GENERAL = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups")
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1, "transposed": False}
_PARAMETRIZED = re.compile(r"(?P<owner>.*?)\.?parametrizations\.(?P<leaf>\w+)\..*")


@cache
def _functions() -> dict[Any, tuple[str, ...]]:
    """The functions that compute a convolution, with the names of their arguments; () for those of other dimensions."""
    aten = torch.ops.aten
    known: dict[Any, tuple[str, ...]] = {
        F.conv2d: _PLAIN,
        aten.conv2d: _PLAIN,
        aten.conv2d.default: _PLAIN,
        aten.conv2d.padding: _PLAIN,
        torch.convolution: _GENERAL,
        aten.convolution: _GENERAL,
        aten.convolution.default: _GENERAL,
        torch._convolution: _GENERAL,
        aten._convolution: _GENERAL,
        aten._convolution.default: _GENERAL,
        aten._convolution.deprecated: _GENERAL,
    }
    for name in ("conv1d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
        packet = getattr(aten, name)
        known |= dict.fromkeys((getattr(F, name), packet, *(getattr(packet, o) for o in packet.overloads())), ())
    return known


@dataclass(kw_only=True)
class Functional:
    """A functional convolution of one graph: its calls and parameters; `reasons` prevent raising it."""

    holder: nn.Module  # the module with the graph
    place: str  # of the module that represents it, relative to the holder; "" for the holder itself
    nodes: list[fx.Node]
    weight: Tensor | None = None
    bias: Tensor | None = None
    targets: tuple[str, ...] = ()  # the attributes from which these are made
    settings: dict[str, Any] = field(default_factory=dict)
    cone: set[fx.Node] = field(default_factory=set)  # nodes that compute the weight and the bias
    notes: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def module(self) -> nn.Conv2d:
        """The convolution as a module, with the graph's own parameters if it uses them directly."""
        assert self.weight is not None
        outputs, inputs, *kernel = self.weight.shape
        options = self.settings | {"bias": self.bias is not None, "device": "meta"}
        conv = nn.Conv2d(inputs * self.settings["groups"], outputs, (kernel[0], kernel[1]), **options)
        conv.weight = _parameter(self.weight)
        conv.bias = None if self.bias is None else _parameter(self.bias)
        conv.train(self.holder.training)
        setattr(conv, ORIGIN, "conv2d")
        return conv


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=tensor.requires_grad)


def find_functional(holder: nn.Module, graph: fx.Graph, *, is_root: bool) -> list[Functional]:
    """The functional convolutions of a graph by first call, each with its place and the reasons against raising it."""
    groups: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _functions():
            weight = arguments(node).get("weight")
            key = weight.target if isinstance(weight, fx.Node) and weight.op == "get_attr" else (weight or node)
            groups.setdefault(key, []).append(node)
    found: list[Functional] = []
    for nodes in groups.values():
        conv = _read(holder, graph, nodes, is_root)
        while any(conv.place == other.place for other in found):
            conv.place += "_"
        found.append(conv)
    for conv in found:
        makers = [other.place for other in found if not other.reasons and not other.cone.isdisjoint(conv.nodes)]
        conv.reasons += [f"it helps compute the weight of {place}" for place in makers]
    return found


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a convolution's call by name, with defaults; empty for other dimensions."""
    names = _functions()[node.target]
    return _DEFAULTS | dict(zip(names, node.args, strict=False)) | dict(node.kwargs) if names else {}


def _read(holder: nn.Module, graph: fx.Graph, nodes: list[fx.Node], is_root: bool) -> Functional:
    conv = Functional(holder=holder, place=nodes[0].name, nodes=nodes)
    given = [arguments(node) for node in nodes]
    first = given[0]
    if not first or first["transposed"]:
        name = getattr(nodes[0].target, "__name__", str(nodes[0].target)).partition(".")[0]
        conv.reasons.append(f"it is a {'transposed ' if first else ''}{name}: only 2-D convolutions are replaced")
        return conv
    conv.settings = _settings(first)
    if any(value is None for value in conv.settings.values()):
        conv.reasons.append("its stride, padding, dilation or groups are computed")
    weight, bias = (_held(holder, graph, first[name]) for name in ("weight", "bias"))
    conv.reasons += [f"its {name} {why}" for name, part in (("weight", weight), ("bias", bias)) for why in part.reasons]
    if not conv.reasons:
        conv.targets = (*weight.targets, *bias.targets)
        conv.place = _place(holder, graph, nodes, weight, is_root)
        conv.cone = weight.cone | bias.cone
        conv.reasons += _shared(graph, nodes, conv.targets, conv.cone)
    same = [_settings(one) | {"bias": _target(one["bias"])} for one in given]
    if any(one != same[0] for one in same):
        conv.reasons.append(f"its weight is shared by {len(nodes)} convolutions with other settings or biases")
    conv.weight, conv.bias = weight.value, bias.value
    if conv.weight is not None and conv.weight.dim() != 4:
        conv.reasons.append(f"it is a {conv.weight.dim() - 2}-D convolution: only 2-D convolutions are replaced")
    conv.notes = _notes(weight)
    return conv


def _notes(weight: "_Held") -> list[str]:
    if not weight.folded:
        return []
    made = ", ".join(weight.targets)
    return [f"its weight is computed from {made}: the new layer starts from the effective weight in eval mode"]


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    pairs = {key: _setting(given[key]) for key in ("stride", "padding", "dilation")}
    return pairs | {"groups": given["groups"] if isinstance(given["groups"], int) else None}


def _setting(value: Any) -> Any:
    """A pair of numbers or a word; None if the graph computes it."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(v, int | str) for v in values):
        return None
    return value if isinstance(value, str) else values * (2 if len(values) == 1 else 1)


def _target(node: Any) -> Any:
    return node.target if isinstance(node, fx.Node) and node.op == "get_attr" else node


@dataclass(kw_only=True)
class _Held:
    """A tensor used by a graph: its value, the attributes from which it is made, and the nodes that compute it."""

    value: Tensor | None = None
    targets: tuple[str, ...] = ()
    cone: set[fx.Node] = field(default_factory=set)
    folded: bool = False
    reasons: list[str] = field(default_factory=list)


def _held(holder: nn.Module, graph: fx.Graph, node: Any) -> _Held:
    if node is None:
        return _Held()
    if not isinstance(node, fx.Node):
        return _Held(reasons=[f"is not a tensor of the graph but {node!r}"])
    cone = _cone(node)
    targets = tuple(dict.fromkeys(str(n.target) for n in graph.nodes if n in cone and n.op == "get_attr"))
    inputs = [n.name for n in graph.nodes if n in cone and n.op == "placeholder"]
    held = _Held(targets=targets, cone=cone, folded=node.op != "get_attr")
    if inputs:
        held.reasons.append(
            f"is computed from the input {', '.join(inputs)}: only tensors stored in the graph can be used"
        )
    elif not targets:
        held.reasons.append("is not made from a parameter or buffer")
    elif not held.folded:
        found = attrgetter(str(node.target))(holder)
        if isinstance(found, Tensor):
            held.value = found
        else:
            held.reasons.append(f"is a {type(found).__name__}, not a tensor")
    else:
        _fold(holder, graph, node, held)
    return held


def _cone(node: fx.Node) -> set[fx.Node]:
    """A node and everything from which it is computed."""
    cone: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one not in cone:
            cone.add(one)
            waiting += one.all_input_nodes
    return cone


def _fold(holder: nn.Module, graph: fx.Graph, node: fx.Node, held: _Held) -> None:
    """Compute a tensor that depends only on parameters and buffers; the graph's own are not modified."""
    own = {target: attrgetter(target)(holder) for target in held.targets}
    order = [n for n in graph.nodes if n in held.cone]
    results = []
    try:
        for seed in (0, 1):
            interpreter = fx.Interpreter(holder, garbage_collect_values=False, graph=graph)
            copies = {target: value.detach().clone() for target, value in own.items()}
            with torch.no_grad(), seeded(seed):
                for n in order:
                    known = n.op == "get_attr"
                    interpreter.env[n] = copies[str(n.target)] if known else _run(interpreter, n)
            results.append(interpreter.env[node])
            if any(not torch.equal(copies[target], own[target]) for target in own):
                held.reasons.append(f"is computed by writing to {', '.join(held.targets)}")
                return
    except Exception as error:
        held.reasons.append(f"cannot be computed ahead ({type(error).__name__}: {error})")
        return
    if not isinstance(results[0], Tensor) or not torch.equal(*results):
        held.reasons.append("is random, or no tensor")
        return
    held.value = results[0].requires_grad_(any(value.requires_grad for value in own.values()))


def _run(interpreter: fx.Interpreter, node: fx.Node) -> Any:
    """The result of a node; modules run as copies in eval mode, so that no statistics are updated."""
    if node.op != "call_module":
        return interpreter.run_node(node)
    args, kwargs = interpreter.fetch_args_kwargs_from_env(node)
    return copy.deepcopy(interpreter.fetch_attr(str(node.target))).eval()(*args, **kwargs)


def is_assertion(node: fx.Node) -> bool:
    """Whether a node only asserts tensor metadata, as before every cast in exported graphs, and computes nothing."""
    return node.target in (torch.ops.aten._assert_tensor_metadata, torch.ops.aten._assert_tensor_metadata.default)


def _shared(graph: fx.Graph, nodes: list[fx.Node], targets: Iterable[str], cone: set[fx.Node]) -> list[str]:
    """The reason against a convolution whose parameters are used elsewhere, too."""
    wanted = set(targets)
    others = [
        user.name
        for node in graph.nodes
        if node.op == "get_attr" and node.target in wanted
        for user in node.users
        if user not in cone and user not in nodes and not is_assertion(user)
    ]
    inner = [n.name for node in cone for n in node.users if n not in cone and n not in nodes and not is_assertion(n)]
    inputs = [(node, arguments(node)["input"]) for node in nodes]
    inner += [node.name for node, x in inputs if x in cone or (x.op == "get_attr" and x.target in wanted)]
    told = list(dict.fromkeys([*others, *inner]))
    return [f"the tensors behind its weight are also used by {', '.join(told[:3])}"] if told else []


def _place(holder: nn.Module, graph: fx.Graph, nodes: list[fx.Node], weight: _Held, is_root: bool) -> str:
    """Where a module represents the convolution: at its weight's owner if that contains nothing else, otherwise next to it."""
    size = None if weight.value is None else weight.value.numel()
    own = [t for t in weight.targets if size is None or attrgetter(t)(holder).numel() == size] or list(weight.targets)
    owner, _, leaf = own[0].rpartition(".")
    if found := _PARAMETRIZED.fullmatch(own[0]):
        owner, leaf = found["owner"], found["leaf"]
    if not owner:
        return "" if not is_root and _is_all(graph, nodes, weight.cone) else f"{leaf}_conv"
    mine = {t for n in nodes for m in n.all_input_nodes if m is not arguments(n)["input"] for t in _targets(_cone(m))}
    for node in graph.nodes:
        target = str(node.target)
        inside = target == owner or target.startswith(f"{owner}.")
        if inside and node.op in ("get_attr", "call_module") and target not in mine:
            return f"{owner}.{leaf}_conv"
    return owner


def _targets(cone: set[fx.Node]) -> set[str]:
    return {str(n.target) for n in cone if n.op == "get_attr"}


def _is_all(graph: fx.Graph, nodes: list[fx.Node], cone: set[fx.Node]) -> bool:
    """Whether the graph consists of this convolution of its only input."""
    if len(nodes) != 1:
        return False
    own = cone | set(nodes[0].all_input_nodes) | {nodes[0]}
    rest = [n for n in graph.nodes if n not in own and n.op not in ("placeholder", "output", "get_attr")]
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    output = next(iter(reversed(graph.nodes)))
    return not rest and inputs == [arguments(nodes[0])["input"]] and output.args[0] is nodes[0]


def refused_site(name: str, conv: Functional) -> ConvSite:
    """A convolution that cannot be raised, as a site with the reasons."""
    weight = conv.weight
    if weight is None:
        argument = (arguments(conv.nodes[0]) or dict(zip(_PLAIN, conv.nodes[0].args, strict=False))).get("weight")
        weight = argument.meta.get("val") if isinstance(argument, fx.Node) else None
    shape = tuple(int(n) for n in weight.shape) if isinstance(weight, Tensor) and weight.dim() > 2 else (0, 0, 0, 0)
    groups = conv.settings.get("groups") or 1
    return ConvSite(
        name=name,
        module="conv2d",
        geometry=None,
        in_channels=shape[1] * groups,
        out_channels=shape[0],
        kernel_size=shape[2:],
        stride=_numbers(conv.settings.get("stride")),
        dilation=_numbers(conv.settings.get("dilation")),
        groups=groups,
        params=0 if conv.weight is None else conv.weight.numel(),
        reasons=tuple(conv.reasons),
        notes=tuple(conv.notes),
    )


def _numbers(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, tuple) else (value,)
    return tuple(v for v in values if isinstance(v, int)) or (1,)
