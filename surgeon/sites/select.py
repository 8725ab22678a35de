"""The selector language, which selects convolutions.

Items are separated by commas or given as a list. Sources are united: an exact module name or a prefix of names (`layer3`),
a glob over names (`blocks.*.conv_dw`), `re:` with a regular expression to find in the name, `stem`, `stageN`, `all`.
Filters are intersected: `k=3`, `in>=64`, `out<=256`, `stride=1`, `groups!=1`, `dilation=1`, `depthwise`, `dense`,
`first-of-stage`, `last-spatial`. `!` before an item excludes what it matches. Filters alone filter `all`.

A name with characters other than letters, digits, `_`, `-` and dots is written in double quotes, as in JSON.

1×1 convolutions are selected only by their full name, or if there is a filter on `k` that 1 satisfies.
"""

import difflib
import fnmatch
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from surgeon.errors import SelectionError
from surgeon.records.recipe import unquoted
from surgeon.records.report import name_list
from surgeon.sites.sites import ConvSite

Selector = str | Sequence[str]
Predicate = Callable[[ConvSite], bool]

_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_VALUES: dict[str, Callable[[ConvSite], int]] = {
    "k": lambda site: max(site.kernel_size),
    "in": lambda site: site.in_channels,
    "out": lambda site: site.out_channels,
    "stride": lambda site: max(site.stride),
    "dilation": lambda site: max(site.dilation),
    "groups": lambda site: site.groups,
}
_FLAGS: dict[str, Predicate] = {
    "depthwise": lambda site: site.is_depthwise,
    "dense": lambda site: site.groups == 1,
    "first-of-stage": lambda site: site.first_of_stage,
    "last-spatial": lambda site: site.last_spatial,
}
_COMPARISON = re.compile(r"(?P<key>[a-z-]+)\s*(?P<op>==|!=|>=|<=|=|>|<)\s*(?P<value>.*)")
_STAGE = re.compile(r"stem|stage\d+")
_NUMBERED = re.compile(r"[A-Za-z_]+\.?\d+")  # as others call their stages: layer3, block2, stages.1


@dataclass(frozen=True, kw_only=True)
class Item:
    """One item of a selection."""

    text: str
    kind: str  # "source" or "filter"
    negated: bool
    test: Predicate
    on_k: bool = False  # a filter on the kernel size


def select(sites: Iterable[ConvSite], layers: Selector) -> list[ConvSite]:
    """The selected convolutions, in module order.

    Raises `SelectionError` if an item cannot be parsed or matches nothing, or if nothing is left in the end.
    """
    sites = list(sites)
    items = [parse_item(text, sites) for text in split_items(layers)]
    for item in items:
        if item.kind == "source" and not any(item.test(site) for site in sites):
            raise SelectionError(_no_match(item.text, sites))
    sources = [item for item in items if item.kind == "source" and not item.negated]
    chosen = [site for site in sites if not sources or any(item.test(site) for item in sources)]
    history = [f"{_quoted(sources) or 'all'} matches {_count(len(chosen))}"]
    for item in items:
        if item.kind == "filter" or item.negated:
            before = len(chosen)
            chosen = [site for site in chosen if item.test(site) is not item.negated]
            text = f"!{item.text}" if item.negated else item.text
            history.append(f"{text!r} removes {before - len(chosen)}")
    chosen, dropped = _without_pointwise(chosen, items)
    if dropped:
        names = name_list([site.name for site in dropped], 6)
        history.append(
            f"the rule on 1×1 convolutions (take them with k=1 or by full name) removes {len(dropped)}: {names}"
        )
    if not chosen:
        raise SelectionError(f"the selection {_text(layers)!r} matches nothing: {', '.join(history)}")
    return chosen


def _without_pointwise(chosen: list[ConvSite], items: Sequence[Item]) -> tuple[list[ConvSite], list[ConvSite]]:
    """The convolutions that the rule on 1×1 ones keeps, and those that it removes."""
    named = {item.text for item in items if item.kind == "source" and not item.negated}

    def wanted(site: ConvSite) -> bool:
        by_filter = any(item.on_k and not item.negated and item.test(site) for item in items)
        return not site.is_pointwise or by_filter or not named.isdisjoint(site.names)

    return [site for site in chosen if wanted(site)], [site for site in chosen if not wanted(site)]


# --- parsing ------------------------------------------------------------------------------------------------------


def split_items(layers: Selector) -> list[str]:
    """Items of a selection; commas inside a regular expression's brackets or inside quotes do not separate."""
    parts = [layers] if isinstance(layers, str) else list(layers)
    items: list[str] = []
    for part in parts:
        if not isinstance(part, str):
            raise SelectionError(f"a selection is a string or a list of strings, got {part!r}")
        depth, start, inside = 0, 0, False
        for i, char in enumerate(part):
            if char == '"' and (inside or not part[start:i].strip(" !")):
                inside = not inside
            depth += 0 if inside else (char in "([{") - (char in ")]}")
            if char == "," and depth <= 0 and not inside:
                items.append(part[start:i])
                start = i + 1
        items.append(part[start:])
    items = [item.strip() for item in items]
    if not items or not all(items):
        raise SelectionError(f"the selection {_text(layers)!r} has an empty item; use `all` for every convolution")
    return items


def parse_item(text: str, sites: Sequence[ConvSite] = ()) -> Item:
    """Parse one item; names take precedence over keywords if a module has the same name."""
    negated = text.startswith("!")
    body = text.removeprefix("!").strip()
    if not body:
        raise SelectionError("`!` must be followed by an item to exclude")
    if body.startswith('"'):
        name = unquoted(body)
        return Item(
            text=name, kind="source", negated=negated, test=lambda site: any(is_below(n, name) for n in site.names)
        )
    if body in _FLAGS and not _is_name(body, sites):
        return Item(text=body, kind="filter", negated=negated, test=_FLAGS[body])
    comparison = None if body.startswith("re:") else _COMPARISON.fullmatch(body)
    if comparison:
        test = _comparison(body, **comparison.groupdict())
        return Item(text=body, kind="filter", negated=negated, test=test, on_k=comparison["key"] == "k")
    return Item(text=body, kind="source", negated=negated, test=_source(body, sites))


def _comparison(text: str, key: str, op: str, value: str) -> Predicate:
    if key not in _VALUES:
        raise SelectionError(f"unknown filter {text!r}; comparable values are {', '.join(_VALUES)}")
    if not value.isdecimal():
        raise SelectionError(f"the filter {text!r} must compare with a whole number, got {value!r}")
    read, compare, number = _VALUES[key], _COMPARE[op], int(value)
    return lambda site: compare(read(site), number)


def _source(body: str, sites: Sequence[ConvSite]) -> Predicate:
    if any(body in site.names for site in sites):
        return lambda site: body in site.names
    if body == "all":
        return lambda site: True
    if body.startswith("re:"):
        try:
            pattern = re.compile(body.removeprefix("re:"))
        except re.error as error:
            raise SelectionError(f"{body!r} is not a regular expression: {error}") from error
        return lambda site: any(pattern.search(name) for name in site.names)
    if _STAGE.fullmatch(body) and any(site.stage == body for site in sites):
        return lambda site: site.stage == body or any(is_below(name, body) for name in site.names)
    if any(char in body for char in "*?["):
        return lambda site: any(fnmatch.fnmatchcase(part, body) for name in site.names for part in prefixes(name))
    return lambda site: any(is_below(name, body) for name in site.names)


def _is_name(body: str, sites: Sequence[ConvSite]) -> bool:
    return any(is_below(name, body) for site in sites for name in site.names)


def is_below(name: str, prefix: str) -> bool:
    """Whether a module name is the prefix or below it."""
    return name == prefix or name.startswith(prefix + ".")


def prefixes(name: str) -> list[str]:
    """`a.b.c` → `a`, `a.b`, `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


# --- messages -----------------------------------------------------------------------------------------------------


def _no_match(text: str, sites: Sequence[ConvSite]) -> str:
    stages = sorted({site.stage for site in sites if site.stage is not None})
    if not sites:
        return f"{text!r} matches nothing: the model has no convolution"
    if _STAGE.fullmatch(text):
        return f"{text!r} matches nothing: the model's stages are {', '.join(stages) or 'unknown'}"
    known = dict.fromkeys(part for site in sites for name in site.names for part in prefixes(name))
    words = [*stages, *_FLAGS, "all"]
    near = difflib.get_close_matches(text, [*words, *known], n=4, cutoff=0.6)
    near = near or [part for part in (*words, *known) if text.lower() in part.lower()][:4]
    told = [f"the closest names are {', '.join(map(repr, near))}"] if near else []
    if stages and (not near or _NUMBERED.fullmatch(text)):
        told.append(f"the model's stages are {', '.join(stages)}")
    if not told:
        told = [f"the first names are {', '.join(map(repr, list(known)[:4]))}"]
    return f"{text!r} matches no convolution; {'; '.join(told)}. surgeon inspect lists the names"


def _quoted(items: Sequence[Item]) -> str:
    return ", ".join(repr(item.text) for item in items)


def _count(number: int) -> str:
    return f"{number} convolution" + ("" if number == 1 else "s")


def _text(layers: Selector) -> str:
    return layers if isinstance(layers, str) else ",".join(map(str, layers))
