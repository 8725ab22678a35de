"""Functional convolutions as modules of the model, for the duration of a conversion."""

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from surgeon.errors import VerificationError
from surgeon.sites.inputs import Inputs
from surgeon.sites.sites import Sites
from surgeon.surgery.compare import Leaves, compare
from surgeon.surgery.functional import Functional, arguments, find_functional, is_assertion, refused_site
from surgeon.surgery.rewrite import Rewrite
from surgeon.surgery.running import outputs

_ROUNDING = 1e-6  # by which the same operations may differ if memory layouts differ

# children or tensors of a module, a name, its old value, all names in order
Slot = tuple[dict[str, Any], str, Any, list[str]]


class Raised:
    """The functional convolutions of a model as modules, for the duration of a conversion; `undo` restores everything.

    `convs` are those raised to modules in the model, by name; `refused` are those that cannot be.
    """

    def __init__(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        """Raise all, or those with these names. The existing graphs are not edited: copies replace them."""
        self.convs: dict[str, Functional] = {}
        self.refused: dict[str, Functional] = {}
        self._graphs: list[tuple[nn.Module, dict[str, fx.Graph]]] = []
        self._slots: list[Slot] = []
        self._model = model
        self._kept: Raised | None = None
        try:
            self._raise_all(model, names)
        except BaseException:
            self.undo()
            raise

    def _raise_all(self, model: nn.Module, names: Collection[str] | None) -> None:
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
                self._put(holder, conv, graphs)
            else:
                self._take_place(holder, conv.module())
        _set_graphs(holder, graphs)
        self.convs |= convs

    def _put(self, holder: nn.Module, conv: Functional, graphs: Mapping[str, fx.Graph]) -> None:
        """Put a module at the place; the graph's other references to its parameters go, lest they count as shared."""
        owner, _, key = conv.place.rpartition(".")
        module = conv.module()
        self._set(holder.get_submodule(owner)._modules, key, module)
        others = _other_names(holder, conv, graphs)
        for graph in graphs.values():
            for node in [n for n in graph.nodes if n.op == "get_attr" and n.target in others]:
                graph.erase_node(node)
        for target in (*conv.targets, *others):
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
        """Restore the original graphs and modules; may be called repeatedly."""
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
        """Keep only the raised convolutions that these layers replace, with the layers in their places."""
        self.undo()
        chosen = {name: layer for name, layer in layers.items() if name in self.convs}
        self._kept = Raised(self._model, chosen)
        Rewrite(self._model, chosen).apply()

    def keep_checked(self, layers: Mapping[str, nn.Module], expected: Leaves, inputs: Inputs, seed: int) -> None:
        """Like `keep`, given the raised model's output `expected`: checks the original graph's and the new graph's outputs.

        Raises `VerificationError`.
        """
        if not self.convs:
            return
        converted = outputs(self._model, inputs, seed)
        self.undo()
        _same(outputs(self._model, inputs, seed), expected, "with its convolutions as modules, the graph")
        self.keep(layers)
        _same(converted, outputs(self._model, inputs, seed), "with the other convolutions put back, the graph")

    def described(self, sites: Sites) -> Sites:
        """Sites found in the raised model, described as functional, plus those that could not be raised."""
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
            convs.append(refused_site(name, conv))
        return replace(sites, convs=tuple(convs))


def _same(expected: Leaves, found: Leaves, what: str) -> None:
    difference = compare(expected, found)
    if not difference.max_rel <= max(_ROUNDING, 8 * difference.eps):
        raise VerificationError(
            f"{what} computes something else (relative error {difference.max_rel:.1e}): it draws random numbers, "
            f"or depends on more than its inputs. check=False converts without comparing"
        )


def graphs_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every module of a model that runs a torch.fx graph, with its name, outer ones first."""
    for name, module in list(model.named_modules()):
        if isinstance(getattr(module, "graph", None), fx.Graph):
            yield name, module


def _other_graphs(holder: nn.Module) -> list[str]:
    """Attributes in which torchvision's feature extractors keep a graph per mode; `graph` is one of them."""
    return [key for key in ("train_graph", "eval_graph") if isinstance(getattr(holder, key, None), fx.Graph)]


def _set_graphs(holder: Any, graphs: Mapping[str, fx.Graph]) -> None:
    for key, graph in graphs.items():
        setattr(holder, key, graph)
    if isinstance(holder, fx.GraphModule):  # whose setter compiles it
        holder.graph.lint()
    else:
        holder.graph.owning_module = holder
        holder.finalize()


def _other_names(holder: nn.Module, conv: Functional, graphs: Mapping[str, fx.Graph]) -> list[str]:
    """Names of a convolution's parameters in a graph module that none of its graphs uses."""
    own = [tensor for tensor in (conv.weight, conv.bias) if tensor is not None]
    nodes = [node for graph in graphs.values() for node in graph.nodes]
    read = {str(n.target) for n in nodes if n.op == "call_module" or (n.op == "get_attr" and n.users)}
    held = [*holder.named_parameters(remove_duplicate=False), *holder.named_buffers(remove_duplicate=False)]
    return [
        name
        for name, tensor in held
        if any(_is_same(tensor, one) for one in own)
        and name not in conv.targets
        and not any(name == other or name.startswith(f"{other}.") for other in read)
    ]


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same object or the same memory, as after loading a program."""
    if a is b:
        return True
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata or a.storage_offset() != b.storage_offset():
        return False
    return bool(a.shape == b.shape and a.stride() == b.stride())


def _call_module(graph: fx.Graph, conv: Functional) -> None:
    """Call a module where the graph calls the function, and remove nodes that only made its weight."""
    for node in conv.nodes:
        before = [n for n in node.all_input_nodes if n is not arguments(node)["input"]]
        with graph.inserting_before(node):
            call = graph.create_node("call_module", conv.place, (arguments(node)["input"],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        while before:
            unused = before.pop()
            if all(is_assertion(user) for user in unused.users):
                for user in list(unused.users):
                    graph.erase_node(user)
            if not unused.users and not unused._erased:
                before += unused.all_input_nodes
                graph.erase_node(unused)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _of_several_calls(model: nn.Module) -> dict[str, Functional]:
    """Convolutions in modules for which `torch.export.unflatten` keeps a separate graph per call."""
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
