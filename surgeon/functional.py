"""Convolutions that a graph computes by a function: `F.conv2d`, `aten.conv2d`, `aten.convolution`, with a weight that it holds.

A module tree has nothing there to hold on to. Raised, such a convolution is a `nn.Conv2d` that the graph calls, at the place of
its weight (`layer1.0.conv1` for `layer1.0.conv1.weight`) and with the very same parameters, so that all that is known of
convolutions applies to it. What is not replaced in the end goes back to what it was.

Graphs are those of `torch.fx.GraphModule`s anywhere in a model (from `symbolic_trace`, `create_feature_extractor`, timm's fx
features, `ExportedProgram.module()`), and of the modules of `torch.export.unflatten`.
"""

import copy
import operator
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from surgeon.compare import Leaves, compare
from surgeon.copying import seeded
from surgeon.errors import VerificationError
from surgeon.inputs import Inputs
from surgeon.rewrite import ORIGIN, Rewrite
from surgeon.sites import ConvSite, Sites
from surgeon.verify import outputs

_PLAIN = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_GENERAL = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups")
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1, "transposed": False}
_ROUNDING = 1e-6  # that the same operations may differ by where their results lie elsewhere in memory
_PARAMETRIZED = re.compile(r"(?P<owner>.*?)\.?parametrizations\.(?P<leaf>\w+)\..*")

Slot = tuple[
    dict[str, Any], str, Any, list[str]
]  # children or tensors of a module, a name, what was there, all names in order


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
    }
    for name in ("conv1d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
        packet = getattr(aten, name)
        known |= dict.fromkeys((getattr(F, name), packet, *(getattr(packet, o) for o in packet.overloads())), ())
    return known


@dataclass(kw_only=True)
class Functional:
    """A functional convolution of one graph: its calls, and what it computes with; `reasons` forbid to raise it."""

    holder: nn.Module  # the module with the graph
    place: str  # of the module that stands for it, from the holder; "" for the holder itself
    nodes: list[fx.Node]
    weight: Tensor | None = None
    bias: Tensor | None = None
    targets: tuple[str, ...] = ()  # the attributes that these are made of
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def module(self) -> nn.Conv2d:
        """As a module, with the graph's own parameters where it computes with these."""
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


# --- raising --------------------------------------------------------------------------------------------------------


class Raised:
    """The functional convolutions of a model as modules, for the time of a conversion; `undo` puts everything back.

    `convs` are those that stand in the model as modules, by name; `refused` are those that cannot.
    """

    def __init__(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        """Raise all, or those with these names. The graphs that are there are not edited: copies take their places."""
        self.convs: dict[str, Functional] = {}
        self.refused: dict[str, Functional] = {}
        self._graphs: list[tuple[nn.Module, dict[str, fx.Graph]]] = []
        self._slots: list[Slot] = []
        self._model = model
        self._kept: Raised | None = None
        for prefix, holder in graphs_of(model):
            graphs = {key: copy.deepcopy(getattr(holder, key)) for key in ("graph", *_other_graphs(holder))}
            found = {key: find_functional(holder, graph, is_root=holder is model) for key, graph in graphs.items()}
            places = [{conv.place for conv in convs if not conv.reasons} for convs in found.values()]
            for conv in found["graph"]:
                if not conv.reasons and not all(conv.place in other for other in places):
                    conv.reasons.append("it is not the same in the graphs for training and for evaluation")
            named = {_join(prefix, conv.place): conv for conv in found["graph"]}
            wanted = {name: conv for name, conv in named.items() if names is None or name in names}
            raised = {name: conv for name, conv in wanted.items() if not conv.reasons}
            self.refused |= {name: conv for name, conv in wanted.items() if conv.reasons}
            if raised:
                chosen = {conv.place for conv in raised.values()}
                for conv in [conv for convs in found.values() for conv in convs if conv.place in chosen - {""}]:
                    _call_module(conv.nodes[0].graph, conv)
                self._raise(raised, holder, graphs)
        self.refused |= _of_several_calls(model)

    def _raise(self, convs: dict[str, Functional], holder: Any, graphs: dict[str, fx.Graph]) -> None:
        self._graphs.append((holder, {key: getattr(holder, key) for key in graphs}))
        for conv in convs.values():
            if conv.place:
                self._put(holder, conv)
            else:
                self._take_place(holder, conv.module())
        _set_graphs(holder, graphs)
        self.convs |= convs

    def _put(self, holder: nn.Module, conv: Functional) -> None:
        """A module at the place; what the graph held of it elsewhere goes, lest it count as shared."""
        owner, _, key = conv.place.rpartition(".")
        module = conv.module()
        self._set(holder.get_submodule(owner)._modules, key, module)
        for target in conv.targets:
            if not target.startswith(f"{conv.place}."):
                owner, _, key = target.rpartition(".")
                held = holder.get_submodule(owner)
                for there in (held._parameters, held._buffers):
                    if key in there:
                        self._set(there, key, None)

    def _take_place(self, holder: nn.Module, conv: nn.Module) -> None:
        for parent in list(self._model.modules()):
            for key, child in list(parent._modules.items()):
                if child is holder:
                    self._set(parent._modules, key, conv)

    def _set(self, there: dict[str, Any], key: str, value: Any) -> None:
        self._slots.append((there, key, there.get(key), list(there)))
        if value is None:
            del there[key]
        else:
            there[key] = value

    def undo(self) -> None:
        """Put back the graphs and modules that were there; may be done again."""
        if self._kept is not None:
            self._kept.undo()
        for there, key, before, order in reversed(self._slots):
            there.pop(key, None)
            now = there | ({key: before} if before is not None else {})
            there.clear()
            there.update({k: now[k] for k in (*order, *now) if k in now})
        for holder, graphs in reversed(self._graphs):
            _set_graphs(holder, graphs)

    def keep(self, layers: Mapping[str, nn.Module]) -> None:
        """Leave only the convolutions raised that these layers replace, with the layers in their places."""
        self.undo()
        chosen = {name: layer for name, layer in layers.items() if name in self.convs}
        self._kept = Raised(self._model, chosen)
        Rewrite(self._model, chosen).apply()

    def keep_checked(self, layers: Mapping[str, nn.Module], expected: Leaves, inputs: Inputs, seed: int) -> None:
        """As `keep`, where the raised model gave `expected`: the graph as it was, and as it is now, must give what they should.

        Raises `VerificationError`.
        """
        if not self.convs:
            return
        converted = outputs(self._model, inputs, seed)
        self.undo()
        _same(outputs(self._model, inputs, seed), expected, "with its convolutions as modules the graph")
        self.keep(layers)
        _same(converted, outputs(self._model, inputs, seed), "with the other convolutions put back the graph")

    def described(self, sites: Sites) -> Sites:
        """Sites that were found in the raised model, as what they are, and with those that could not be raised."""
        convs = [
            replace(site, module="conv2d", notes=(*site.notes, *self.convs[site.name].notes))
            if site.name in self.convs
            else site
            for site in sites.convs
        ]
        taken = {name for site in convs for name in site.names}
        for name, conv in self.refused.items():
            while name in taken:
                name += "_"
            taken.add(name)
            convs.append(_refused_site(name, conv))
        return replace(sites, convs=tuple(convs))


def _same(expected: Leaves, found: Leaves, what: str) -> None:
    difference = compare(expected, found)
    if not difference.max_rel <= max(_ROUNDING, 8 * difference.eps):
        raise VerificationError(
            f"{what} does not compute what it computed (relative error {difference.max_rel:.1e}): it draws random numbers, "
            f"or depends on more than its inputs. check=False converts without comparing"
        )


def graphs_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every module of a model that computes by a graph of torch.fx, with its name, outer ones first."""
    for name, module in list(model.named_modules()):
        if isinstance(getattr(module, "graph", None), fx.Graph):
            yield name, module


def _other_graphs(holder: nn.Module) -> list[str]:
    """Where torchvision's feature extractors keep a graph for each mode; `graph` is one of them."""
    return [key for key in ("train_graph", "eval_graph") if isinstance(getattr(holder, key, None), fx.Graph)]


def _set_graphs(holder: Any, graphs: Mapping[str, fx.Graph]) -> None:
    for key, graph in graphs.items():
        setattr(holder, key, graph)
    if isinstance(holder, fx.GraphModule):  # whose setter compiles it
        holder.graph.lint()
    else:
        holder.graph.owning_module = holder
        holder.finalize()


def _call_module(graph: fx.Graph, conv: Functional) -> None:
    """Call a module where the graph calls the function, and drop what only made its weight."""
    for node in conv.nodes:
        before = [n for n in node.all_input_nodes if n is not _arguments(node)["input"]]
        with graph.inserting_before(node):
            call = graph.create_node("call_module", conv.place, (_arguments(node)["input"],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        while before:
            unused = before.pop()
            if not unused.users and not unused._erased:
                before += unused.all_input_nodes
                graph.erase_node(unused)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


# --- finding --------------------------------------------------------------------------------------------------------


def find_functional(holder: nn.Module, graph: fx.Graph, *, is_root: bool) -> list[Functional]:
    """The functional convolutions of a graph in the order of their first call, each with its place and what forbids it."""
    groups: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _functions():
            weight = _arguments(node).get("weight")
            key = weight.target if isinstance(weight, fx.Node) and weight.op == "get_attr" else (weight or node)
            groups.setdefault(key, []).append(node)
    found: list[Functional] = []
    for nodes in groups.values():
        conv = _read(holder, graph, nodes, is_root)
        while any(conv.place == other.place for other in found):
            conv.place += "_"
        found.append(conv)
    return found


def _arguments(node: fx.Node) -> dict[str, Any]:
    names = _functions()[node.target]
    return _DEFAULTS | dict(zip(names, node.args, strict=False)) | dict(node.kwargs) if names else {}


def _read(holder: nn.Module, graph: fx.Graph, nodes: list[fx.Node], is_root: bool) -> Functional:
    conv = Functional(holder=holder, place=nodes[0].name, nodes=nodes)
    given = [_arguments(node) for node in nodes]
    first = given[0]
    if not first or first["transposed"]:
        name = getattr(nodes[0].target, "__name__", str(nodes[0].target)).partition(".")[0]
        conv.reasons.append(f"it is a {'transposed ' if first else ''}{name}: only 2-D convolutions are replaced")
        return conv
    keys = ("stride", "padding", "dilation", "groups")
    conv.settings = {key: _setting(first[key]) for key in keys}
    if any(value is None for value in conv.settings.values()):
        conv.reasons.append("its stride, padding, dilation or groups are computed")
    weight, bias = (_held(holder, graph, first[name]) for name in ("weight", "bias"))
    conv.reasons += [f"its {name} {why}" for name, part in (("weight", weight), ("bias", bias)) for why in part.reasons]
    if not conv.reasons:
        conv.targets = (*weight.targets, *bias.targets)
        conv.place = _place(holder, graph, nodes, weight, is_root)
        conv.reasons += _shared(graph, nodes, conv.targets, weight.cone | bias.cone)
    same = [{key: _setting(one[key]) for key in keys} | {"bias": _target(one["bias"])} for one in given]
    if any(one != same[0] for one in same):
        conv.reasons.append(f"its weight is shared by {len(nodes)} convolutions with other settings")
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


def _setting(value: Any) -> Any:
    """Plain numbers or a word; None for what the graph computes."""
    values = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(v, int | str) for v in values):
        return None
    if isinstance(value, list | tuple):
        return tuple(value) * (2 if len(value) == 1 else 1)
    return value


def _target(node: Any) -> Any:
    return node.target if isinstance(node, fx.Node) and node.op == "get_attr" else node


@dataclass(kw_only=True)
class _Held:
    """A tensor that a graph computes with: its value, the attributes it is made of, and the nodes that make it."""

    value: Tensor | None = None
    targets: tuple[str, ...] = ()
    cone: set[fx.Node] = field(default_factory=set)
    folded: bool = False
    reasons: list[str] = field(default_factory=list)


def _held(holder: nn.Module, graph: fx.Graph, node: Any) -> _Held:
    if node is None:
        return _Held()
    if not isinstance(node, fx.Node):
        return _Held(reasons=[f"is no tensor of the graph but {node!r}"])
    cone = _cone(node)
    targets = tuple(dict.fromkeys(str(n.target) for n in graph.nodes if n in cone and n.op == "get_attr"))
    inputs = [n.name for n in graph.nodes if n in cone and n.op == "placeholder"]
    held = _Held(targets=targets, cone=cone, folded=node.op != "get_attr")
    if inputs:
        held.reasons.append(
            f"is computed from the input {', '.join(inputs)}: only what the graph holds can be taken over"
        )
    elif not targets:
        held.reasons.append("is made of no parameter or buffer")
    elif not held.folded:
        found = operator.attrgetter(str(node.target))(holder)
        if isinstance(found, Tensor):
            held.value = found
        else:
            held.reasons.append(f"is a {type(found).__name__}, not a tensor")
    else:
        _fold(holder, graph, node, held)
    return held


def _cone(node: fx.Node) -> set[fx.Node]:
    """A node and all that it is computed from."""
    cone: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one not in cone:
            cone.add(one)
            waiting += one.all_input_nodes
    return cone


def _fold(holder: nn.Module, graph: fx.Graph, node: fx.Node, held: _Held) -> None:
    """Compute a tensor that follows from parameters and buffers alone; the graph's own are not touched."""
    own = {target: operator.attrgetter(target)(holder) for target in held.targets}
    order = [n for n in graph.nodes if n in held.cone]
    results = []
    try:
        for seed in (0, 1):
            interpreter = fx.Interpreter(holder, garbage_collect_values=False, graph=graph)
            copies = {target: value.detach().clone() for target, value in own.items()}
            with torch.no_grad(), seeded(seed):
                for n in order:
                    known = n.op == "get_attr"
                    interpreter.env[n] = copies[str(n.target)] if known else interpreter.run_node(n)
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


def _shared(graph: fx.Graph, nodes: list[fx.Node], targets: Iterable[str], cone: set[fx.Node]) -> list[str]:
    """The reason against a convolution whose parameters others use, too."""
    wanted = set(targets)
    others = [
        user.name
        for node in graph.nodes
        if node.op == "get_attr" and node.target in wanted
        for user in node.users
        if user not in cone and user not in nodes
    ]
    inner = [user.name for n in cone for user in n.users if user not in cone and user not in nodes]
    told = list(dict.fromkeys([*others, *inner]))
    return [f"what its weight is made of is used by {', '.join(told[:3])}, too"] if told else []


def _place(holder: nn.Module, graph: fx.Graph, nodes: list[fx.Node], weight: _Held, is_root: bool) -> str:
    """Where a module stands for the convolution: at the owner of its weight if that holds nothing else, else beside it."""
    get: Callable[[str], Any] = lambda target: operator.attrgetter(target)(holder)  # noqa: E731
    size = None if weight.value is None else weight.value.numel()
    own = [t for t in weight.targets if size is None or get(t).numel() == size] or list(weight.targets)
    owner, _, leaf = own[0].rpartition(".")
    if found := _PARAMETRIZED.fullmatch(own[0]):
        owner, leaf = found["owner"], found["leaf"]
    if not owner:
        return "" if not is_root and _is_all(graph, nodes, weight.cone) else f"{leaf}_conv"
    mine = {t for n in nodes for m in n.all_input_nodes if m is not _arguments(n)["input"] for t in _targets(_cone(m))}
    for node in graph.nodes:
        target = str(node.target)
        inside = target == owner or target.startswith(f"{owner}.")
        if inside and node.op in ("get_attr", "call_module") and target not in mine:
            return f"{owner}.{leaf}_conv"
    return owner


def _targets(cone: set[fx.Node]) -> set[str]:
    return {str(n.target) for n in cone if n.op == "get_attr"}


def _is_all(graph: fx.Graph, nodes: list[fx.Node], cone: set[fx.Node]) -> bool:
    """Whether the graph is this convolution of its only input, and nothing else."""
    if len(nodes) != 1:
        return False
    own = cone | set(nodes[0].all_input_nodes) | {nodes[0]}
    rest = [n for n in graph.nodes if n not in own and n.op not in ("placeholder", "output", "get_attr")]
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    output = next(iter(reversed(graph.nodes)))
    return not rest and inputs == [_arguments(nodes[0])["input"]] and output.args[0] is nodes[0]


def _of_several_calls(model: nn.Module) -> dict[str, Functional]:
    """Convolutions in modules that `torch.export.unflatten` keeps a graph for every call of."""
    if not any(type(module).__name__ == "InterpreterModuleDispatcher" for module in model.modules()):
        return {}
    from torch.export.unflatten import InterpreterModuleDispatcher  # slow to import

    found: dict[str, Functional] = {}
    for name, module in model.named_modules():
        calls: list[Any] = module.call_modules() if isinstance(module, InterpreterModuleDispatcher) else []
        for holder in calls[:1]:
            for conv in find_functional(holder, holder.graph, is_root=False):
                told = f"unflatten keeps a graph for each of the {len(calls)} calls of {name}: convert ExportedProgram.module()"
                conv.reasons = [told]
                found[_join(name, conv.place)] = conv
    return found


def _refused_site(name: str, conv: Functional) -> ConvSite:
    weight = conv.weight
    if weight is None:
        argument = (_arguments(conv.nodes[0]) or dict(zip(_PLAIN, conv.nodes[0].args, strict=False))).get("weight")
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
