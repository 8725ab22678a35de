"""Surgery on the module tree: replace layers under all their names, and revert."""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.errors import SelectionError, UnsupportedLayerError, called
from surgeon.layers.base import DynamicConv2d
from surgeon.layers.geometry import ConvGeometry, Pair, pad_for_window
from surgeon.layers.source import CONV_ATTRIBUTES, ConvSource
from surgeon.records.recipe import CONVOLUTION, Recipe, Rule, get_recipe, quoted, set_recipe, unquoted
from surgeon.sites.select import Selector, is_below, split_items
from surgeon.util.copying import check_module, evaluating, seeded

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
ORIGIN = "_surgeon_origin"  # class name of the replaced module
_WINDOW = "_surgeon_window"  # kernel size of a folded convolution that differs from its base model's
_CARRIED = "_surgeon_carried"  # names of attributes that came from the replaced module
_SURGEON = (ORIGIN, _WINDOW, _CARRIED)
_PLAIN = ("Conv2d", "Conv2dSame")  # modules that a reverted layer matches in class and parameters


class Rewrite:
    """Replacements in one model, applied and undone as a whole.

    Requires modules by first name that are in the model. `apply` puts each new module at every name of the old one, with its hooks,
    mode and memory format, and touches nothing else; `undo` restores the original module objects.
    """

    def __init__(self, model: nn.Module, new: Mapping[str, nn.Module]) -> None:
        self.model = model
        self.root = new.get("")
        by_id = {id(model.get_submodule(name)): module for name, module in new.items()}
        self.slots = [
            (parent, key, child, by_id[id(child)])
            for parent in model.modules()
            for key, child in parent._modules.items()
            if child is not None and id(child) in by_id
        ]
        for name, module in new.items():
            hand_over(model.get_submodule(name), module)

    def apply(self) -> nn.Module:
        """Returns the model; another object only if the model itself was replaced."""
        for parent, key, _, new in self.slots:
            parent._modules[key] = new
        return self.model if self.root is None else self.root

    def undo(self) -> None:
        for parent, key, old, _ in self.slots:
            parent._modules[key] = old


def hand_over(old: nn.Module, new: nn.Module) -> None:
    """Give the new module the old one's hooks (the same dictionaries, so that handles keep working), mode and layout."""
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    new.train(old.training)
    weight = getattr(old, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 4 and _is_channels_last(weight):
        new.to(memory_format=torch.channels_last)
    setattr(new, ORIGIN, getattr(old, ORIGIN, type(old).__name__))
    carry_attributes(old, new)


def carry_attributes(old: nn.Module, new: nn.Module) -> None:
    """Copy attributes that users set on the old module, as `conv.index = 3`: those that a new convolution does not have."""
    if isinstance(old, DynamicConv2d):
        given = {key: vars(old)[key] for key in getattr(old, _CARRIED, ()) if key in vars(old)}
    else:
        given = {
            key: value
            for key, value in vars(old).items()
            if key not in CONV_ATTRIBUTES and not _replaces_method(key, value)
        }
    given = {key: value for key, value in given.items() if key not in vars(new) and key not in _SURGEON}
    for key, value in given.items():
        if not isinstance(getattr(type(new), key, None), property):
            object.__setattr__(new, key, value)
    if given:
        object.__setattr__(new, _CARRIED, tuple(given))


def _replaces_method(key: str, value: Any) -> bool:
    return callable(value) and callable(getattr(nn.Conv2d, key, None))


def _is_channels_last(weight: Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def dynamic_layers(model: nn.Module, names: Selector | None = None) -> dict[str, DynamicConv2d]:
    """Dynamic layers by first name: all (None or "all"), or those at or below the given names.

    Raises `SelectionError` for a name that matches none.
    """
    check_module(model)
    layers: dict[int, DynamicConv2d] = {}
    aliases: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, DynamicConv2d):
            layers[id(module)] = module
            aliases.setdefault(id(module), []).append(name)
    wanted = None if names is None else [unquoted(item) for item in split_items(names)]
    if wanted == ["all"]:
        wanted = None
    chosen = {
        aliases[key][0]: layer
        for key, layer in layers.items()
        if wanted is None or any(is_below(name, item) for name in aliases[key] for item in wanted)
    }
    for item in wanted or ():
        if not any(is_below(name, item) for known in aliases.values() for name in known):
            known = ", ".join(known[0] for known in aliases.values()) or "none"
            raise SelectionError(f"{item!r} is not a dynamic layer of this model; there are: {known}")
    return chosen


@contextmanager
def static(model: nn.Module, names: Selector | None = None) -> Iterator[nn.Module]:
    """Context in which all dynamic layers (or the named ones) compute their plain convolution. May be nested."""
    before = [(layer, layer.adaptive) for layer in dynamic_layers(model, names).values()]
    for layer, _ in before:
        layer.adaptive = False
    try:
        yield model
    finally:
        for layer, adaptive in before:
            layer.adaptive = adaptive


# --- revert -------------------------------------------------------------------------------------------------------


def revert(model: nn.Module, names: Selector | None = None) -> nn.Module:
    """Replace all dynamic layers, or the named ones, by plain convolutions with their static weights.

    Changes the model in place and returns it (another object only if the model itself is a dynamic layer). The dynamic part
    of a layer is lost; its function with `adaptive` off stays.

    Raises `SelectionError` for a name that is not a dynamic layer, and `UnsupportedLayerError`, with nothing changed, for a layer
    whose static part is not one convolution.
    """
    layers = dynamic_layers(model, names)
    if not layers:
        raise SelectionError("there is nothing to revert: the model has no dynamic layer")
    convs: dict[str, nn.Module] = {}
    refused: dict[str, UnsupportedLayerError] = {}
    for name, layer in layers.items():
        try:
            convs[name] = plain_convolution(layer, name)
        except UnsupportedLayerError as error:
            refused[name] = error
    if refused:
        raise _none_reverted(refused, convs)
    result = Rewrite(model, convs).apply()
    drop_rules(result, get_recipe(model), layers)
    return result


def _none_reverted(refused: Mapping[str, UnsupportedLayerError], others: Iterable[str]) -> UnsupportedLayerError:
    """One error for all layers that do not revert, with the selection of those that do."""
    first, *more = refused.values()
    also = f"; nor do {', '.join(list(refused)[1:])}" if more else ""
    rest = ",".join(map(quoted, others))
    hint = f"; {called(f'--layers {shlex.quote(rest)}', repr(rest))} reverts the others" if rest else ""
    return UnsupportedLayerError(f"{first}{also}{hint}", first.reasons)


def drop_rules(model: nn.Module, recipe: Recipe | None, names: Iterable[str]) -> None:
    """Attach the recipe to the model without the rules of these layers, which are plain convolutions now."""
    if recipe is not None:
        gone = set(names)
        rules = [rule for rule in recipe.rules if unquoted(rule.layers) not in gone]
        rules += [convolution_rule(name, window) for name, window in folded_windows(model).items() if name in gone]
        set_recipe(model, replace(recipe, rules=tuple(rules)))


def recorded_size(model: nn.Module) -> tuple[int, ...] | None:
    """Image size (C, H, W) in the model's recipe, None if there is none."""
    recipe = get_recipe(model)
    if recipe is None:
        return None
    return recipe.input_size or (recipe.base.input_size if recipe.base is not None else ()) or None


def convolution_rule(name: str, window: Pair) -> Rule:
    """A recipe's rule for a folded convolution."""
    return Rule(layers=quoted(name), type=CONVOLUTION, options={"window": list(window)})


@torch.no_grad()
def plain_convolution(layer: DynamicConv2d, name: str = "") -> nn.Conv2d:
    """The convolution that a dynamic layer computes with `adaptive` off, with its device, dtype and mode.

    Raises `UnsupportedLayerError` if no single convolution computes the same.
    """
    if not layer.static_is_exact():
        raise _not_one_convolution(
            layer, name, "its static part is two convolutions, which differ from one near the borders"
        )
    weight = _cropped(layer.static_weight().detach(), layer.geometry)
    conv = convolution_from(layer.geometry, weight, layer.static_bias())
    if weight.shape[2:] != layer.geometry.kernel_size or getattr(layer, ORIGIN, "Conv2d") not in _PLAIN:
        setattr(conv, _WINDOW, (weight.shape[2], weight.shape[3]))
    new = {id(p) for _, p in layer.new_parameters()}
    conv.requires_grad_(any(p.requires_grad for p in layer.parameters() if id(p) not in new))
    if layer.bias is not None and conv.bias is not None:
        conv.bias.requires_grad_(layer.bias.requires_grad)
    conv.train(layer.training)
    error = _static_error(layer, conv)
    if not error <= 1e-4 * max(1.0, torch.finfo(weight.dtype).eps / torch.finfo(torch.float32).eps):
        raise _not_one_convolution(layer, name, f"the plain convolution differs by {error:.1e} (relative)")
    return conv


def _not_one_convolution(layer: DynamicConv2d, name: str, reason: str) -> UnsupportedLayerError:
    return UnsupportedLayerError(
        f"{name or 'the layer'} ({layer.type_name}) does not revert to one convolution: {reason}", (reason,)
    )


def folded_windows(model: nn.Module) -> dict[str, Pair]:
    """Plain convolutions by first name that differ from those of their base model, and their kernel sizes."""
    found = ((name, folded_window(module)) for name, module in model.named_modules())
    return {name: window for name, window in found if window is not None}


def folded_window(module: nn.Module) -> Pair | None:
    """Kernel size of a plain convolution that differs from its base model's; None for any other module."""
    window: Pair | None = getattr(module, _WINDOW, None)
    return window


def folded_from(conv: nn.Module, window: Pair) -> nn.Conv2d:
    """A plain convolution with this one's kernel, zero-padded to a window, as its replacement."""
    source = ConvSource.read(conv)
    extra = [w - k for w, k in zip(window, source.geometry.kernel_size, strict=True)]
    sides = (extra[1] // 2, extra[1] - extra[1] // 2, extra[0] // 2, extra[0] - extra[0] // 2)
    folded = convolution_from(source.geometry, F.pad(source.weight, sides), source.bias)
    setattr(folded, _WINDOW, window)
    return folded


def _cropped(weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """The weight of the whole window, or only the replaced kernel's if the rest of the window is zero."""
    kernel = geometry.kernel_size
    top, left = ((w - k) // 2 for w, k in zip(weight.shape[2:], kernel, strict=True))
    inner = weight[..., top : top + kernel[0], left : left + kernel[1]]
    return inner if torch.count_nonzero(inner) == torch.count_nonzero(weight) else weight


@torch.no_grad()
def convolution_from(geometry: ConvGeometry, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """The plain convolution with this weight (C_out, C_in/g, h, w), its window centered on the geometry's kernel."""
    conv = _empty_convolution(geometry, (weight.shape[2], weight.shape[3]), weight, bias is not None)
    conv.weight.copy_(weight)
    if conv.bias is not None and bias is not None:
        conv.bias.copy_(bias)
    return conv


def _empty_convolution(geometry: ConvGeometry, window: Pair, like: Tensor, bias: bool) -> nn.Conv2d:
    options: dict[str, Any] = {
        "in_channels": geometry.in_channels,
        "out_channels": geometry.out_channels,
        "kernel_size": window,
        "stride": geometry.stride,
        "dilation": geometry.dilation,
        "groups": geometry.groups,
        "bias": bias,
        "device": like.device,
        "dtype": like.dtype,
    }
    larger = window != geometry.kernel_size
    if geometry.padding == "tf_same":
        from timm.layers.conv2d_same import Conv2dSame

        same: nn.Conv2d = PaddedConv2d(geometry, **options) if larger else Conv2dSame(**options)
        return same
    mode: Any = geometry.padding_mode
    if larger and mode != "zeros":
        if any(geometry.padding):  # its own padding first, then zeros
            return PaddedConv2d(geometry, **options)
        mode = "zeros"
    extra_h, extra_w = (d * (w - k) for w, k, d in zip(window, geometry.kernel_size, geometry.dilation, strict=True))
    extra = (extra_w // 2, extra_w - extra_w // 2, extra_h // 2, extra_h - extra_h // 2)
    left, right, top, bottom = sides = tuple(a + b for a, b in zip(geometry.padding, extra, strict=True))
    if (left, top) == (right, bottom) and min(left, top) >= 0:
        return nn.Conv2d(**options, padding=(top, left), padding_mode=mode)
    if geometry.stride == (1, 1):
        conv = nn.Conv2d(**options, padding="same", padding_mode=mode)
        if tuple(conv._reversed_padding_repeated_twice) == sides:
            return conv
    return PaddedConv2d(geometry, **options)


class PaddedConv2d(nn.Conv2d):
    """Replacement for a convolution of another geometry: padded like it, with the window centered on its kernel."""

    def __init__(self, geometry: ConvGeometry, **options: Any) -> None:
        super().__init__(**options)
        self.geometry = geometry

    def forward(self, input: Tensor) -> Tensor:
        window = (self.kernel_size[0], self.kernel_size[1])
        padded, padding = pad_for_window(input, self.geometry, window)
        return F.conv2d(padded, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        own: str = nn.Conv2d.extra_repr(self)
        return (
            f"{own}, instead of {self.geometry.kernel_size} with {self.geometry.padding_mode} {self.geometry.padding}"
        )


def _static_error(layer: DynamicConv2d, conv: nn.Conv2d) -> float:
    """Largest relative difference between the layer with `adaptive` off and the convolution, on two odd sizes."""
    worst = 0.0
    adaptive = layer.adaptive
    try:
        layer.adaptive = False
        with evaluating(layer), seeded(0):
            for extra in (3, 4):
                x = sample_input(layer, 1, extra)
                expected, found = layer.forward(x), conv.forward(x)
                if expected.shape != found.shape:
                    return float("inf")
                scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
                worst = max(worst, float((expected - found).abs().max() / scale))
    finally:
        layer.adaptive = adaptive
    return worst


def sample_input(layer: nn.Module, batch: int, extra: int) -> Tensor:
    """Random input a little larger than the kernel of a dynamic layer, or of a convolution, (batch, C, H, W)."""
    g: Any = layer.geometry if isinstance(layer, DynamicConv2d) else layer
    size = [d * (k - 1) + 1 + s + extra for k, d, s in zip(g.kernel_size, g.dilation, g.stride, strict=True)]
    like = next(layer.parameters())
    return torch.randn((batch, g.in_channels, *size), dtype=like.dtype, device=like.device)


def build_layer(
    conv: nn.Module, layer: type[DynamicConv2d], config: Any, seed: int, context: Mapping[str, Any] | None = None
) -> DynamicConv2d:
    """Build the dynamic layer for a convolution; its random numbers depend only on the seed.

    Raises `UnsupportedLayerError` if the convolution or its calibration input contains NaN or infinity.
    """
    if not all(parameter.isfinite().all() for parameter in conv.parameters()):
        reason = "its weights contain NaN or infinity"
        raise UnsupportedLayerError(f"{type(conv).__name__} cannot be replaced: {reason}", (reason,))
    if not all(data.isfinite().all() for data in (context or {}).values() if isinstance(data, Tensor)):
        reason = "its input contains NaN or infinity on the calibration data"
        raise UnsupportedLayerError(f"{type(conv).__name__} cannot be replaced: {reason}", (reason,))
    with seeded(seed):
        return layer.from_conv(conv, config, **(context or {}))
