"""Every convolution of a model, its role, and what prevents its replacement."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy as is_lazy_tensor
from torch.nn.utils import parametrize

from surgeon.errors import UnsupportedLayerError
from surgeon.layers.base import DynamicConv2d
from surgeon.layers.geometry import ConvGeometry
from surgeon.layers.source import ConvSource, written_by_call
from surgeon.sites.observe import Call, Observation, observe
from surgeon.sites.reads import lost_reads, written_reads
from surgeon.sites.stages import find_stages, find_units
from surgeon.sites.trace import Neighbors, trace_neighbors
from surgeon.util.copying import copy_to_meta, is_lazy, seeded
from surgeon.util.held import held_by_functions, outside_references
from surgeon.util.tables import counted


@dataclass(frozen=True, kw_only=True)
class ConvSite:
    """One convolution of a model. `reasons`: why no layer type may replace it; `notes`: anything else worth knowing."""

    name: str
    aliases: tuple[str, ...] = ()  # other names of the same module
    module: str  # class name
    geometry: ConvGeometry | None  # None: not a plain 2-D convolution
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    params: int
    stage: str | None = None
    first_of_stage: bool = False
    last_spatial: bool = False  # the last convolution of the forward pass with a kernel larger than 1×1
    calls: tuple[Call, ...] = ()
    macs: int | None = None  # per image, over all calls; None if the forward pass does not reach it
    order: int | None = None  # position of its first call
    traced: bool = False  # torch.fx sees it
    producer: str | None = None
    followers: tuple[str, ...] = ()
    dynamic: str | None = None  # its type, if it is a dynamic layer already
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the module."""
        return (self.name, *self.aliases)

    @property
    def is_pointwise(self) -> bool:
        return all(k == 1 for k in self.kernel_size)

    @property
    def is_depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.in_channels

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {"geometry": None if self.geometry is None else self.geometry.to_dict()}


@dataclass(frozen=True, kw_only=True)
class Sites:
    """All convolutions of a model in module order, and the forward pass that found them."""

    convs: tuple[ConvSite, ...]
    seen: Observation
    notes: tuple[str, ...] = ()  # on the whole model


def find_sites(
    model: nn.Module,
    example_inputs: Any = None,
    input_size: Sequence[int] | int | None = None,
    origin: nn.Module | None = None,
) -> Sites:
    """List every convolution. The model is not modified: copies of it are run and traced.

    `origin` is the model of which `model` is a copy: closures are not copied and refer to the original's modules.

    Raises `InputError` if the model does not run.
    """
    names = _conv_names(model)
    seen = observe(model, list(names), example_inputs, input_size)
    neighbors = _trace(model)
    strangers = _shared_parameters(model, names)
    held = outside_references(model, names) | outside_references(model if origin is None else origin, names)
    given = {id(p) for p in (model if origin is None else origin).parameters()}
    notes = _unregistered([told for key, told in seen.unregistered.items() if key not in given])
    if origin is not None and origin is not model:
        unreached = [name for name, module in model.named_modules() if module._parameters and name not in seen.ended]
        shared = held_by_functions(origin, unreached)
        held = {name: keys for name, keys in shared.items() if name in names} | held
        notes += _shared_with_the_original(shared)
    _add_written_reads(model, names, seen)
    lost = _lost_attributes(model, names)
    drafts = [
        _site(model, name, aliases, seen, neighbors.get(name), strangers.get(name, ()), lost.get(name, []), held)
        for name, aliases in names.items()
    ]
    convs = (*_with_stages(model, drafts, seen), *_functional(model, names, seen))
    return Sites(convs=convs, seen=seen, notes=tuple(notes))


def _unregistered(found: list[str]) -> list[str]:
    if not found:
        return []
    return [
        f"outside the module tree the forward pass runs {counted(len(found), 'convolution')} ({', '.join(found[:3])}), which "
        "cannot be replaced, counted or saved: hold them in an nn.ModuleList or nn.ModuleDict"
    ]


def _shared_with_the_original(shared: Mapping[str, list[str]]) -> list[str]:
    if not shared:
        return []
    holders = ", ".join(dict.fromkeys(key for keys in shared.values() for key in keys))
    return [
        f"{', '.join(list(shared)[:3])}: the functions {holders} hold modules of the given model, which are not copied: training "
        "the converted model would train those, and saving it would not save them; convert in place, or make them methods"
    ]


def _functional(model: nn.Module, names: Iterable[str], seen: Observation) -> list[ConvSite]:
    """Convolutions that a module computes by a function of a parameter; those in graphs are found there."""
    found: list[ConvSite] = []
    taken = set(names)
    for name, reader in seen.functional.items():
        module = model.get_submodule(reader)
        if isinstance(getattr(module, "graph", None), fx.Graph):
            continue
        weight = model.get_parameter(name)
        owner, _, leaf = name.rpartition(".")
        place = owner if owner and owner not in taken else f"{name.removesuffix(leaf)}{leaf}_conv"
        taken.add(place)
        kernel = tuple(weight.shape[2:])
        why = (
            f"it is a function in {type(module).__name__}, not a module: the graph form can take it (torch.fx.symbolic_trace or "
            f"torch.export of the model, then surgeon.convert or surgeon.passes)"
        )
        found.append(
            ConvSite(
                name=place,
                module="conv2d",
                geometry=None,
                in_channels=weight.shape[1],
                out_channels=weight.shape[0],
                kernel_size=kernel,
                stride=(1,) * len(kernel),
                dilation=(1,) * len(kernel),
                groups=1,
                params=weight.numel(),
                reasons=(why,),
            )
        )
    return found


def _conv_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """First name → other names of every convolution and dynamic layer, in module order."""
    names: dict[int, list[str]] = {}
    inside: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, DynamicConv2d):
            inside.update(id(m) for m in module.modules() if m is not module)
        if _is_conv(module) and id(module) not in inside:
            names.setdefault(id(module), []).append(name)
    return {first: tuple(others) for first, *others in names.values()}


def _is_conv(module: nn.Module) -> bool:
    if isinstance(module, _ConvNd | DynamicConv2d):
        return True
    return _is_quantized(module) and "Conv" in type(module).__name__ and hasattr(module, "kernel_size")


def _is_quantized(module: nn.Module) -> bool:
    path = type(module).__module__
    return path.startswith(("torch.ao.nn.", "torch.nn.quantized", "torch.nn.qat")) or hasattr(
        module, "weight_fake_quant"
    )


def _add_written_reads(model: nn.Module, names: Iterable[str], seen: Observation) -> None:
    """Add the readers that the forward pass did not reach."""
    by_id = {id(model.get_submodule(name)): name for name in names}
    for key, methods in written_reads(model, by_id.keys()).items():
        readers = seen.readers.setdefault(by_id[key], [])
        if not readers:
            readers += methods


def _lost_attributes(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Reasons against convolutions with an attribute that other modules read and a dynamic layer lacks."""
    by_id = {id(model.get_submodule(name)): name for name in names}
    return {
        by_id[key]: [f"its {attribute} is read by {method}, and the new layer has none" for method, attribute in reads]
        for key, reads in lost_reads(model, by_id.keys()).items()
    }


def _trace(model: nn.Module) -> dict[str, Neighbors]:
    """Neighbors found by torch.fx; empty if the model cannot be copied to the meta device. A failure never rules out anything."""
    try:
        twin = copy_to_meta(model)
        for module in twin.modules():
            module.training = False
        with seeded(0):
            return trace_neighbors(twin)
    except Exception:
        return {}


def _shared_parameters(model: nn.Module, names: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """For every convolution, the parameters of other modules that are, or share memory with, one of its own."""

    users: dict[int, list[tuple[int, str, Tensor]]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            users.setdefault(_memory(parameter), []).append((id(module), name, parameter))
    shared = {}
    for name in names:
        conv = model.get_submodule(name)
        own = {id(m) for m in conv.modules()}
        others = [
            other
            for p in conv.parameters()
            for owner, other, tensor in users.get(_memory(p), [])
            if owner not in own and _overlap(p, tensor)
        ]
        if others:
            shared[name] = tuple(dict.fromkeys(others))
    return shared


def _memory(tensor: Tensor) -> int:
    """A number for the storage of a tensor."""
    return id(tensor) if is_lazy_tensor(tensor) else int(tensor.untyped_storage()._cdata)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors' regions of one storage, from first to last element, overlap."""
    if a is b or is_lazy_tensor(a) or is_lazy_tensor(b):
        return True
    (first, end), (other_first, other_end) = _region(a), _region(b)
    return first < other_end and other_first < end


def _region(tensor: Tensor) -> tuple[int, int]:
    """Start and end (exclusive) in bytes within the storage; empty for a tensor without elements."""
    if not tensor.numel():
        return 0, 0
    last = sum((int(size) - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset()) * tensor.itemsize, (int(tensor.storage_offset()) + last + 1) * tensor.itemsize


# --- one convolution ----------------------------------------------------------------------------------------------


def _site(
    model: nn.Module,
    name: str,
    aliases: tuple[str, ...],
    seen: Observation,
    neighbors: Neighbors | None,
    strangers: tuple[str, ...],
    lost: Sequence[str],
    held: Mapping[str, list[str]],
) -> ConvSite:
    conv: Any = model.get_submodule(name)
    geometry, reasons = _read_geometry(conv)
    calls = tuple(seen.calls.get(name, ()))
    reasons += lost
    if name in seen.arguments:
        reasons.append(f"it is called with more than its input: {', '.join(seen.arguments[name])}")
    if strangers:
        reasons.append(f"its parameters are shared with {', '.join(strangers)}")
    if name in held:
        where = ", ".join(held[name])
        reasons.append(
            f"it is held outside the module tree too, by {where}, which would keep using the old convolution"
        )
    if name in seen.readers:
        reasons.append(f"its weight is read outside its own forward, by {', '.join(seen.readers[name])}")
    if any(len(call.input) == 3 for call in calls) and geometry is not None:
        reasons.append("it is called with an unbatched input (C, H, W)")
    notes = _notes(conv, called=name in seen.started, calls=len(calls))
    return ConvSite(
        name=name,
        aliases=aliases,
        module=type(conv).__name__,
        geometry=geometry,
        **_shape_of(conv, geometry),
        params=0 if is_lazy(conv) else sum(p.numel() for p in conv.parameters()),
        calls=calls,
        macs=macs_of(conv if isinstance(conv, DynamicConv2d) else geometry, calls, seen.inputs.batch),
        order=seen.started.get(name),
        traced=neighbors is not None,
        producer=None if neighbors is None else neighbors.producer,
        followers=() if neighbors is None else neighbors.followers,
        dynamic=conv.type_name if isinstance(conv, DynamicConv2d) else None,
        reasons=tuple(reasons),
        notes=tuple(notes),
    )


def _shape_of(conv: Any, geometry: ConvGeometry | None) -> dict[str, Any]:
    """Channels, kernel size and so on, from the geometry if there is one; the attributes may be plain numbers."""
    like: Any = conv if geometry is None else geometry
    sizes = {name: getattr(like, name) for name in ("kernel_size", "stride", "dilation")}
    pairs = {name: (size,) if isinstance(size, int) else tuple(size) for name, size in sizes.items()}
    counts = {name: int(getattr(like, name)) for name in ("in_channels", "out_channels", "groups")}
    return pairs | counts


def macs_of(what: ConvGeometry | DynamicConv2d | None, calls: Sequence[Call], batch: int) -> int | None:
    """Multiply-accumulates of all calls for one image of the example."""
    if what is None or not calls:
        return None
    images = [call.input[0] if len(call.input) == 4 else 1 for call in calls]
    return sum(n * what.macs(*call.input[-2:]) for n, call in zip(images, calls, strict=True)) // batch


def _read_geometry(conv: Any) -> tuple[ConvGeometry | None, list[str]]:
    """Geometry, and the reasons against a replacement found in the module itself."""
    if isinstance(conv, DynamicConv2d):
        return conv.geometry, [f"it is already a dynamic layer ({conv.type_name})"]
    if _is_quantized(conv):
        return None, ["it is quantized"]
    if not isinstance(conv, nn.Conv2d):
        return None, [f"it is a {type(conv).__name__}: only 2-D convolutions are replaced"]
    if is_lazy(conv):
        return None, ["its parameters are not initialized yet: run the model once first"]
    if not conv.weight.is_floating_point():
        return None, [f"its weight is {str(conv.weight.dtype).removeprefix('torch.')}, not floating point"]
    reasons = [
        f"it has an old-style {kind} hook: remove it with torch.nn.utils.remove_{kind}, or use parametrizations"
        for kind in _old_style_hooks(conv)
    ]
    if not reasons and "weight" not in conv._parameters and not parametrize.is_parametrized(conv, "weight"):
        reasons.append(
            "its weight is not a parameter but written by a hook, as by pruning: torch.nn.utils.prune.remove makes it one"
        )
    written = [] if reasons else written_by_call(conv)
    if written:
        reasons.append(f"calling it writes its {', '.join(written)}")
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            return ConvSource.read(conv).geometry, reasons
    except UnsupportedLayerError as error:
        return None, [*reasons, *error.reasons]
    except Exception as error:  # an unreadable convolution does not stop the others
        return None, [*reasons, f"it cannot be read ({type(error).__name__}: {error})"]


def _old_style_hooks(conv: nn.Module) -> list[str]:
    kinds = {"WeightNorm": "weight_norm", "SpectralNorm": "spectral_norm"}
    found = [kinds.get(type(hook).__name__, "") for hook in conv._forward_pre_hooks.values()]
    return [kind for kind in found if kind]


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")


_LIBRARIES = ("torch", "timm", "torchvision", "surgeon")  # whose kinds of convolutions compute the same in training


def _computes_its_own(conv: nn.Module) -> bool:
    """Whether its class, of no library, has a forward other than that of `nn.Conv2d`."""
    kind = type(conv)
    if kind.__module__.partition(".")[0] in _LIBRARIES or not issubclass(kind, nn.Conv2d):
        return False
    return kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward


def _notes(conv: nn.Module, *, called: bool, calls: int) -> list[str]:
    notes = []
    if not called:
        notes.append("the forward pass never reaches it")
    if calls > 1:
        notes.append(f"called {calls} times in one forward pass")
    if _computes_its_own(conv):
        notes.append(f"the new layer computes what {type(conv).__name__} does in eval mode, and has nothing else of it")
    if parametrize.is_parametrized(conv):
        notes.append("parametrized: the new layer starts from the effective weight and is not parametrized")
    if any(getattr(conv, hooks, None) for hooks in _HOOKS):
        notes.append("its forward and backward hooks move to the new layer")
    if any(getattr(conv, hooks, None) for hooks in _STATE_HOOKS) and not isinstance(conv, DynamicConv2d):
        notes.append("its state-dict hooks are dropped")
    if any(getattr(p, "_backward_hooks", None) for p in conv.parameters()):
        notes.append("hooks on its parameters are dropped")
    return notes


# --- stages -------------------------------------------------------------------------------------------------------


def _with_stages(model: nn.Module, drafts: Sequence[ConvSite], seen: Observation) -> list[ConvSite]:
    names = [site.name for site in drafts]
    stages = find_stages(model, names, seen)
    units = find_units(names, {})
    sizes = {unit: sum(units[name] == unit for name in names) for unit in set(units.values())}
    first: dict[str, ConvSite] = {}
    spatial = sorted((s for s in drafts if s.order is not None and not s.is_pointwise), key=lambda s: s.order or 0)
    for site in spatial:
        stage = stages[site.name]
        if stage is None or stage == "stem":
            continue
        held = first.setdefault(stage, site)
        if sizes[units[held.name]] == 1 < sizes[units[site.name]]:
            first[stage] = site  # a lone convolution is a stem of the stage, not its first unit
    leaders = {site.name for site in first.values()}
    last = {site.name for site in spatial[-1:]}
    return [
        replace(site, stage=stages[site.name], first_of_stage=site.name in leaders, last_spatial=site.name in last)
        for site in drafts
    ]
