"""Building a cost table: one trace of the model, and one of every distinct (layer, shape, option)."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from surgeon.costs import store
from surgeon.costs.emulate import meta_copy
from surgeon.costs.estimate import cannot_run, run_step
from surgeon.costs.flops import FlopCounter
from surgeon.costs.memory import timeline
from surgeon.costs.profile import OperatorCall, Profile, profile
from surgeon.costs.settings import Settings, make_settings
from surgeon.costs.table import KEEP, CostRow, CostTable, Option
from surgeon.costs.trace import Trace
from surgeon.errors import SurgeonError
from surgeon.layers.base import DynamicConv2d, LayerConfig
from surgeon.layers.geometry import ConvGeometry
from surgeon.layers.registry import layer_class, layer_types
from surgeon.layers.source import ConvSource
from surgeon.records.recipe import Rule
from surgeon.sites.select import select
from surgeon.sites.sites import ConvSite, find_sites
from surgeon.surgery.plan import read_config, why_not


@dataclass
class _Window:
    """A time window of the step: inside one call of a layer (index into the sites; -1: none), and the base's peak in it."""

    site: int
    phase: str
    peak: int


@dataclass
class _Base:
    """The parts of the unmodified model's trace that a table needs."""

    flops: float
    backward_flops: float
    params: int
    windows: list[_Window]
    calls: list[OperatorCall] = field(default_factory=list)  # first call of every site


def default_options() -> list[Option]:
    """One option per layer type, with its default values."""
    return [Option(name, {}) for name in layer_types()]


def cost_table(
    model: nn.Module,
    options: Sequence[Option] | None = None,
    *,
    layers: Any = None,
    input_size: Any = None,
    batch_size: int = 1,
    amp: bool | str = False,
    cache: bool = True,
    **settings: Any,
) -> CostTable:
    """The cost table of a model; arguments as for `surgeon.cost`.

    `options` are the possible replacements (default: every type), `layers` a selection (default: all replaceable ones).
    With `cache` the table is stored on disk (`SURGEON_CACHE`, else ~/.cache/surgeon), keyed by the hash of all its inputs.
    """
    checked = make_settings(model, input_size=input_size, batch_size=batch_size, amp=amp, **settings)
    wanted = default_options() if options is None else list(options)
    key = store.key(model, wanted, layers, checked) if cache else None
    found = store.load(key) if key is not None else None
    if found is not None:
        return found
    table = build(model, wanted, layers, checked)
    if key is not None:
        store.save(key, table)
    return table


def build(model: nn.Module, options: Sequence[Option], layers: Any, settings: Settings) -> CostTable:
    """Build the table; see `surgeon.costs.table`."""
    convs = [site for site in find_sites(model, input_size=settings.input_size).convs if site.calls]
    chosen = select(convs, layers) if layers is not None else [s for s in convs if not s.is_pointwise]
    plans = [(site, [_reasons(site, option) for option in options]) for site in chosen]
    plans = [(site, reasons) for site, reasons in plans if not all(reasons)]
    sites = [site for site, _ in plans]
    copy = meta_copy(model)
    base = _trace_base(copy, sites, settings)
    profiles = _profiles(model, sites, base, options, [reasons for _, reasons in plans], settings)
    return _assemble(sites, options, [reasons for _, reasons in plans], base, profiles, settings)


def _reasons(site: ConvSite, option: Option) -> tuple[str, ...]:
    layer = layer_class(option.type)
    config = read_config(layer, Rule(layers=site.name, type=option.type, options=dict(option.options)))
    return tuple(why_not(site, layer, config))


# --- the unmodified model -----------------------------------------------------------------------------------------


def _trace_base(model: nn.Module, sites: Sequence[ConvSite], settings: Settings) -> _Base:
    calls: dict[str, OperatorCall] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
            calls.setdefault(name, OperatorCall(tuple(x.shape), x.dtype, last, x.requires_grad))

        return hook

    modules = {name: model.get_submodule(name) for name in (site.name for site in sites)}
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    try:
        trace = run_step(model, settings, FlopCounter(), "meta")
    except SurgeonError:
        raise
    except Exception as error:
        raise cannot_run(model, settings, error) from error
    finally:
        for handle in handles:
            handle.remove()
    flops = [0, 0]
    for op in trace.ops:
        flops[op.phase == "backward"] += op.flops
    steps = min(settings.accumulate, 2) if settings.mode == "train" else 1
    images = settings.batch_size * steps
    return _Base(
        flops=flops[0] / images,
        backward_flops=flops[1] / images,
        params=sum(p.numel() for p in model.parameters()),
        windows=_windows(trace, [site.name for site in sites]),
        calls=[calls[site.name] for site in sites],
    )


def _windows(trace: Trace, names: Sequence[str]) -> list[_Window]:
    """Divide the steady step into windows at the calls of the named layers."""
    times = timeline(trace)
    index = {trace.layers.index(name): i for i, name in enumerate(names)}
    owner = np.full(len(times.levels), -1)
    for layer, first, end, phase in trace.visits:
        if layer in index and phase == "forward":
            owner[max(first - times.first, 0) : end - times.first] = index[layer]
    previous = 0
    for op in trace.ops:
        if op.phase == "backward" and op.layer in index:
            owner[max(previous - times.first, 0) : op.end - times.first] = index[op.layer]
        previous = op.end
    phase_of = np.zeros(len(times.levels), dtype=np.int64)
    for i, (_, first) in enumerate(times.phases):
        phase_of[first:] = i
    borders = np.flatnonzero((np.diff(owner) != 0) | (np.diff(phase_of) != 0)) + 1
    starts = [0, *borders.tolist()]
    ends = [*borders.tolist(), len(times.levels)]
    return [
        _Window(int(owner[a]), times.phases[phase_of[a]][0], int(times.levels[a:b].max()))
        for a, b in zip(starts, ends, strict=True)
    ]


# --- layers alone -------------------------------------------------------------------------------------------------


def _profiles(
    model: nn.Module,
    sites: Sequence[ConvSite],
    base: _Base,
    options: Sequence[Option],
    reasons: Sequence[Sequence[tuple[str, ...]]],
    settings: Settings,
) -> list[list[Profile | None]]:
    """For every site: the original layer, then each option (None if it is refused). Equal ones are traced once."""
    done: dict[Any, Profile] = {}
    configs: dict[Any, LayerConfig] = {}
    result: list[list[Profile | None]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for site, call, refused in zip(sites, base.calls, reasons, strict=True):
            module = model.get_submodule(site.name)
            assert site.geometry is not None
            trainable = tuple(p.requires_grad for p in module.parameters())
            own = ("keep", type(module), site.geometry, call, trainable, next(module.parameters()).dtype)
            if own not in done:
                done[own] = profile(meta_copy(module), call, settings)
            row: list[Profile | None] = [done[own]]
            for option, against in zip(options, refused, strict=True):
                if against:
                    row.append(None)
                    continue
                dtype = next(module.parameters()).dtype
                same = (option.label, site.geometry, call, trainable, dtype)
                if same not in done:
                    layer = option_layer(site.geometry, option, configs).to(dtype)
                    freeze_like(layer, module)
                    done[same] = profile(layer, call, settings)
                row.append(done[same])
            result.append(row)
    return result


def option_layer(geometry: ConvGeometry, option: Option, configs: dict[Any, LayerConfig]) -> DynamicConv2d:
    """The layer on the meta device; `configs` caches resolved configs."""
    key = (option.label, geometry)
    if key not in configs:
        configs[key] = resolved_config(geometry, option)
    with torch.device("meta"):
        layer = meta_copy(layer_class(option.type)(geometry, configs[key]))
    assert isinstance(layer, DynamicConv2d)
    return layer


def resolved_config(geometry: ConvGeometry, option: Option) -> LayerConfig:
    """The option's config with its open choices resolved on random weights (a trained kernel has full rank, too)."""
    cls = layer_class(option.type)
    config = cls.Config.from_dict(dict(option.options))
    if any(value in (None, "auto") for value in config.to_dict().values()):
        return cls.from_conv(_random_conv(geometry), config).config
    return config


def _random_conv(geometry: ConvGeometry) -> Any:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(geometry.weight_shape, generator=generator)
    bias = torch.zeros(geometry.out_channels) if geometry.bias else None
    return ConvSource(geometry=geometry, weight=weight, bias=bias)


def freeze_like(layer: DynamicConv2d, module: nn.Module) -> None:
    """Freeze the parameters that replace the convolution's weight and bias if those are frozen."""
    if all(p.requires_grad for p in module.parameters()):
        return
    new = {name for name, _ in layer.new_parameters()}
    for name, parameter in layer.named_parameters():
        if name not in new:
            parameter.requires_grad_(False)


# --- assembly -----------------------------------------------------------------------------------------------------


def _assemble(
    sites: Sequence[ConvSite],
    options: Sequence[Option],
    reasons: Sequence[Sequence[tuple[str, ...]]],
    base: _Base,
    profiles: Sequence[Sequence[Profile | None]],
    settings: Settings,
) -> CostTable:
    labels = (KEEP, *(option.label for option in options))
    allowed = np.ones((len(sites), len(labels)), dtype=np.bool_)
    memory = np.zeros((len(sites), len(labels), len(base.windows)), dtype=np.int64)
    rows: list[CostRow] = []
    for i, site in enumerate(sites):
        own = profiles[i][0]
        assert own is not None
        for j, found in enumerate(profiles[i]):
            if found is None:
                allowed[i, j] = False
                rows.append(CostRow(site.name, labels[j], 0, 0, 0, 0, 0, 0, reasons[i][j - 1]))
                continue
            memory[i, j] = _differences(base.windows, i, own, found)
            rows.append(_row(site, labels[j], own, found, settings.batch_size))
    return CostTable(
        layers=tuple(site.name for site in sites),
        options=labels,
        rows=tuple(rows),
        base={"flops": base.flops, "backward_flops": base.backward_flops, "params": float(base.params)},
        allowed=allowed,
        windows=np.array([window.peak for window in base.windows], dtype=np.int64),
        memory=memory,
    )


def _row(site: ConvSite, label: str, own: Profile, new: Profile, batch: int) -> CostRow:
    calls = len(site.calls)
    return CostRow(
        layer=site.name,
        option=label,
        flops=(new.flops - own.flops) * calls / batch,
        backward_flops=(new.backward_flops - own.backward_flops) * calls / batch,
        params=new.params - own.params,
        saved_bytes=(new.saved - own.saved) * calls,
        transient_bytes=_transient(new) - _transient(own),
        static_bytes=new.static - own.static,
    )


def _transient(layer: Profile) -> int:
    """Peak bytes while it runs, not counting what it saves and its gradients."""
    return max(layer.forward_peak, layer.backward_peak - layer.saved - layer.gradients)


def _differences(windows: Sequence[_Window], site: int, own: Profile, new: Profile) -> list[int]:
    """Change in the memory of every window if this layer becomes `new`."""
    saved, gradients = new.saved - own.saved, new.gradients - own.gradients
    forward = new.forward_peak - own.forward_peak
    backward = new.backward_peak - new.saved - own.backward_peak + own.saved
    held, graded = 0, False
    result = []
    for window in windows:
        change = new.static - own.static + held * saved + graded * gradients
        if window.site == site and window.phase == "forward":
            change += forward
            held += 1
        elif window.site == site:
            change += backward
            held, graded = max(held - 1, 0), True
        elif window.phase == "optimizer":
            change += new.optimizer_peak - own.optimizer_peak
        result.append(change)
    return result
