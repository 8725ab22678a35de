"""Surgery on the module tree: put layers in the place of others at all their names, and back."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.copying import evaluating, seeded
from surgeon.errors import SelectionError, UnsupportedLayerError
from surgeon.layers.base import DynamicConv2d
from surgeon.layers.geometry import ConvGeometry, Quad
from surgeon.recipe import Recipe, get_recipe, set_recipe
from surgeon.select import Selector, is_below, split_items

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
_ORIGIN = "_surgeon_origin"  # class name of the replaced module
_PLAIN = ("Conv2d", "Conv2dSame")  # modules that a reverted layer equals in class and parameters


class Rewrite:
    """Replacements in one model, to be applied and undone as a whole.

    Requires modules by first name that are in the model. `apply` puts the new ones at every name of the old, with their hooks,
    mode and memory format, and touches nothing else; `undo` restores the very modules that were there.
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
    """Give the new module the old one's hooks (the same dictionaries, so that handles go on working), mode and layout."""
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    new.train(old.training)
    weight = getattr(old, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 4 and _is_channels_last(weight):
        new.to(memory_format=torch.channels_last)
    setattr(new, _ORIGIN, getattr(old, _ORIGIN, type(old).__name__))


def _is_channels_last(weight: Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def dynamic_layers(model: nn.Module, names: Selector | None = None) -> dict[str, DynamicConv2d]:
    """Dynamic layers by first name: all, or those that are or lie below the given names.

    Raises `SelectionError` for a name that matches none.
    """
    layers: dict[int, DynamicConv2d] = {}
    aliases: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, DynamicConv2d):
            layers[id(module)] = module
            aliases.setdefault(id(module), []).append(name)
    wanted = None if names is None else split_items(names)
    chosen = {
        aliases[key][0]: layer
        for key, layer in layers.items()
        if wanted is None or any(is_below(name, item) for name in aliases[key] for item in wanted)
    }
    for item in wanted or ():
        if not any(is_below(name, item) for known in aliases.values() for name in known):
            known = ", ".join(known[0] for known in aliases.values()) or "none"
            raise SelectionError(f"{item!r} is no dynamic layer of this model; there are: {known}")
    return chosen


@contextmanager
def static(model: nn.Module, names: Selector | None = None) -> Iterator[nn.Module]:
    """Within it, all dynamic layers (or the named ones) compute their plain convolution. May be nested."""
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
    """Put a plain convolution with the static weight in the place of all dynamic layers, or of the named ones.

    Changes the model in place and returns it (another object only if the model itself is a dynamic layer). What a layer learnt
    to vary is lost; what it computes with `adaptive` off stays.

    Raises `SelectionError` for a name that is no dynamic layer, and `UnsupportedLayerError`, with nothing changed, for a layer
    whose static part is not one convolution.
    """
    layers = dynamic_layers(model, names)
    if not layers:
        raise SelectionError("there is nothing to revert: the model has no dynamic layer")
    rewrite = Rewrite(model, {name: plain_convolution(layer, name) for name, layer in layers.items()})
    origins = {getattr(layer, _ORIGIN, "Conv2d") for layer in layers.values()}
    result = rewrite.apply()
    recipe = get_recipe(model)
    if recipe is not None:
        set_recipe(result, _without(recipe, layers) if origins <= set(_PLAIN) else None)
    return result


def _without(recipe: Recipe, names: Mapping[str, Any]) -> Recipe:
    rules = tuple(rule for rule in recipe.rules if rule.layers not in names)
    return Recipe(rules=rules, base=recipe.base, seed=recipe.seed, versions=recipe.versions)


@torch.no_grad()
def plain_convolution(layer: DynamicConv2d, name: str = "") -> nn.Conv2d:
    """The convolution that a dynamic layer computes with `adaptive` off, with its device, dtype and mode.

    Raises `UnsupportedLayerError` if no single convolution computes the same.
    """
    if not layer.static_is_exact():
        raise _not_one_convolution(layer, name, "its static part differs from one convolution near the borders")
    weight, geometry = _cropped(layer.static_weight().detach(), layer.geometry)
    bias = layer.static_bias()
    conv = _make_conv(geometry, weight, bias is not None)
    conv.weight.copy_(weight)
    if conv.bias is not None and bias is not None:
        conv.bias.copy_(bias)
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


def _cropped(weight: Tensor, geometry: ConvGeometry) -> tuple[Tensor, ConvGeometry]:
    """Weight and geometry of the whole window, or of the replaced kernel alone where the rest of the window is zero."""
    window, kernel = (weight.shape[-2], weight.shape[-1]), geometry.kernel_size
    if window == kernel:
        return weight, geometry
    top, left = ((w - k) // 2 for w, k in zip(window, kernel, strict=True))
    inner = weight[..., top : top + kernel[0], left : left + kernel[1]]
    if torch.count_nonzero(inner) == torch.count_nonzero(weight):
        return inner, geometry
    padding: Any = geometry.padding
    if padding != "tf_same":
        extra_h, extra_w = (d * (w - k) for w, k, d in zip(window, kernel, geometry.dilation, strict=True))
        extra = (extra_w // 2, extra_w - extra_w // 2, extra_h // 2, extra_h - extra_h // 2)
        padding = tuple(a + b for a, b in zip(padding, extra, strict=True))
    values = {**vars(geometry), "kernel_size": window, "padding": padding}
    return weight, ConvGeometry(**values)


def _make_conv(geometry: ConvGeometry, weight: Tensor, bias: bool) -> nn.Conv2d:
    mode: Any = geometry.padding_mode
    options: dict[str, Any] = {
        "in_channels": geometry.in_channels,
        "out_channels": geometry.out_channels,
        "kernel_size": geometry.kernel_size,
        "stride": geometry.stride,
        "dilation": geometry.dilation,
        "groups": geometry.groups,
        "bias": bias,
        "device": weight.device,
        "dtype": weight.dtype,
    }
    if geometry.padding == "tf_same":
        from timm.layers.conv2d_same import Conv2dSame

        same: nn.Conv2d = Conv2dSame(**options)
        return same
    left, right, top, bottom = geometry.padding
    if (left, top) == (right, bottom) and min(left, top) >= 0:
        return nn.Conv2d(**options, padding=(top, left), padding_mode=mode)
    if geometry.stride == (1, 1):
        conv = nn.Conv2d(**options, padding="same", padding_mode=mode)
        if tuple(conv._reversed_padding_repeated_twice) == geometry.padding:
            return conv
    return PaddedConv2d(geometry.padding, **options, padding_mode=mode)


class PaddedConv2d(nn.Conv2d):
    """Convolution with its own amount of padding (or cropping) on each side."""

    def __init__(self, sides: Quad, **options: Any) -> None:
        super().__init__(**options)
        self.sides = sides

    def forward(self, input: Tensor) -> Tensor:
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        padded = F.pad(input, self.sides, mode=mode)
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def extra_repr(self) -> str:
        own: str = super().extra_repr()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return f"{own}, sides={self.sides}"


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


def sample_input(layer: DynamicConv2d, batch: int, extra: int) -> Tensor:
    """Random input a little larger than the layer's kernel, (batch, C, H, W)."""
    g = layer.geometry
    size = [d * (k - 1) + 1 + s + extra for k, d, s in zip(g.kernel_size, g.dilation, g.stride, strict=True)]
    like = next(layer.parameters())
    return torch.randn((batch, g.in_channels, *size), dtype=like.dtype, device=like.device)


def build_layer(
    conv: nn.Module, layer: type[DynamicConv2d], config: Any, seed: int, context: Mapping[str, Any] | None = None
) -> DynamicConv2d:
    """Make the dynamic layer for a convolution; what it draws at random depends on the seed alone."""
    with seeded(seed):
        return layer.from_conv(conv, config, **(context or {}))
