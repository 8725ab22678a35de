"""The plan of a conversion: every selected convolution with its layer type and options, or the reasons why it stays."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from surgeon.errors import ConfigError, NothingReplacedError
from surgeon.layers.base import DynamicConv2d, LayerConfig
from surgeon.layers.registry import layer_class, layer_types
from surgeon.records.recipe import Rule
from surgeon.sites.select import select
from surgeon.sites.sites import ConvSite


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A selected convolution. `reasons` is empty if it is to be replaced."""

    site: ConvSite
    layer: type[DynamicConv2d]
    config: LayerConfig
    reasons: tuple[str, ...] = ()


def make_plan(sites: Sequence[ConvSite], rules: Iterable[Rule]) -> list[Planned]:
    """Apply the rules in order; if two select the same convolution, the later one wins. In module order.

    Raises `SelectionError` for a selection that matches nothing, `ConfigError` for an unknown type or an invalid option.
    """
    chosen: dict[str, Planned] = {}
    for rule in rules:
        layer = layer_class(rule.type)
        config = read_config(layer, rule)
        for site in select(sites, rule.layers):
            reasons = tuple(why_not(site, layer, config))
            chosen[site.name] = Planned(site=site, layer=layer, config=config, reasons=reasons)
    return [chosen[site.name] for site in sites if site.name in chosen]


def read_config(layer: type[DynamicConv2d], rule: Rule) -> LayerConfig:
    """The config of a rule; a value of the wrong kind raises a `ConfigError`, too."""
    try:
        return layer.Config.from_dict(rule.options)
    except TypeError as error:
        raise ConfigError(f"{layer.Config.__name__} cannot be created from {rule.options}: {error}") from error


def why_not(site: ConvSite, layer: type[DynamicConv2d], config: LayerConfig | None = None) -> list[str]:
    """Reasons why a convolution cannot become this layer; empty if it can."""
    if site.reasons or site.geometry is None:
        return list(site.reasons)
    return layer.why_not(site.geometry, layer.Config() if config is None else config)


def can_become(site: ConvSite) -> dict[str, list[str]]:
    """For every layer type, the reasons against it (with default options); an empty list means that it fits."""
    return {name: why_not(site, layer_class(name)) for name in layer_types()}


def nothing_replaced(refused: Sequence[tuple[ConvSite, Sequence[str]]]) -> NothingReplacedError:
    """The error for a selection in which every convolution was refused, with the reasons."""
    names: dict[str, list[str]] = {}
    for site, reasons in refused:
        for reason in reasons:
            names.setdefault(reason, []).append(site.name or "the model itself")
    told = "; ".join(f"{_some(who)}: {reason}" for reason, who in names.items())
    count = f"each of the {len(refused)} selected convolutions" if len(refused) > 1 else "the selected convolution"
    already = any(site.dynamic for site, _ in refused)
    return NothingReplacedError(f"nothing was replaced: {count} was refused. {told}", already)


def _some(names: Sequence[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
