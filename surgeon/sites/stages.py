"""The network stage of each convolution.

timm models declare their stages (`feature_info`): a convolution belongs to the first feature module that ends after it. In
other models the output stride of its unit decides: stage1 = /4, stage2 = /8, stage3 = /16, stage4 = /32, `stem` below. Networks
that downsample by less than 8 (CIFAR ResNets, restoration) have no stem; their reductions 1, 2, 4 are stage1, stage2, stage3.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from surgeon.sites.observe import Observation

Stages = dict[str, str | None]


def find_stages(model: nn.Module, names: Sequence[str], seen: Observation) -> Stages:
    """The stage of every named convolution; None if unknown."""
    stages = _by_features(model, names, seen)
    return _by_stride(names, seen) if stages is None else stages


# --- timm's declared stages ---------------------------------------------------------------------------------------


def _features(model: nn.Module, seen: Observation) -> list[tuple[str, int]]:
    """Feature modules whose calls ended in the forward pass, in order: (name, reduction)."""
    info = getattr(model, "feature_info", None)
    entries = getattr(info, "info", info)
    if not isinstance(entries, list):
        return []
    found = []
    for entry in entries:
        if not isinstance(entry, Mapping) or not {"module", "reduction"} <= set(entry):
            return []
        name, reduction = str(entry["module"]), entry["reduction"]
        if name not in seen.ended:
            name = name.replace(".", "_")  # as features_only models flatten them
        if name in seen.ended and isinstance(reduction, int | float):
            found.append((name, int(reduction)))
    return sorted(found, key=lambda feature: seen.ended[feature[0]][0])


def _by_features(model: nn.Module, names: Sequence[str], seen: Observation) -> Stages | None:
    features = _features(model, seen)
    if len(features) < 2:
        return None
    labels = _labels([reduction for _, reduction in features])
    stages: Stages = {}
    for name in names:
        start = seen.started.get(name)
        if start is None:
            inside = (label for (module, _), label in zip(features, labels, strict=True) if _is_below(name, module))
            stages[name] = next(inside, None)
            continue
        after = (
            label
            for (module, _), label in zip(features, labels, strict=True)
            if any(end > start for end in seen.ended[module])
        )
        stages[name] = next(after, labels[-1])
    return stages


def _is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _labels(reductions: Sequence[int]) -> list[str]:
    """Stage names of features in order. A repeated reduction (dilated networks) is the next stage."""
    if max(reductions) < 8:
        return [_small_label(reduction) for reduction in reductions]
    labels, number = [], 0
    for reduction in reductions:
        if reduction < 4:
            labels.append("stem")
        else:
            number = max(number + 1, round(math.log2(reduction)) - 1)
            labels.append(f"stage{number}")
    return labels


def _small_label(reduction: int) -> str:
    return f"stage{round(math.log2(max(reduction, 1))) + 1}"


# --- output strides -----------------------------------------------------------------------------------------------


def _by_stride(names: Sequence[str], seen: Observation) -> Stages:
    strides = _output_strides(names, seen)
    units = find_units(names, strides)
    reached = sorted((name for name in names if name in seen.started), key=lambda name: seen.started[name])
    of_unit = {units[name]: strides[name] for name in reached if name in strides}  # the last one called decides
    small = max(of_unit.values(), default=1) < 8
    stages: Stages = {}
    previous: str | None = None
    for name in [*reached, *(name for name in names if name not in seen.started)]:
        stride = of_unit.get(units[name])
        if stride is not None:
            label: str | None = _small_label(stride) if small else _label(stride)
        else:  # pooled to one pixel: it belongs where it is called; never called: unknown
            label = previous if name in seen.started else None
        stages[name] = previous = label
    return stages


def _label(stride: int) -> str:
    return "stem" if stride < 4 else f"stage{round(math.log2(stride)) - 1}"


def _output_strides(names: Sequence[str], seen: Observation) -> dict[str, int]:
    """Output stride of every convolution on maps, as a power of two, relative to the first one's input."""
    first = [
        (seen.started[name], seen.calls[name][0]) for name in names if name in seen.started and seen.calls.get(name)
    ]
    first = [(start, call) for start, call in first if len(call.input) >= 3]
    if not first:
        return {}
    base = min(first, key=lambda pair: pair[0])[1].input[-2:]
    strides = {}
    for name in names:
        calls = seen.calls.get(name)
        if not calls or len(calls[0].input) < 3 or max(calls[0].input[-2:]) <= 1 or min(calls[0].output[-2:]) < 1:
            continue
        ratio = math.sqrt(base[0] * base[1] / (calls[0].output[-2] * calls[0].output[-1]))
        strides[name] = 2 ** max(round(math.log2(ratio)), 0)
    return strides


def find_units(names: Sequence[str], strides: Mapping[str, int]) -> dict[str, str]:
    """The unit of every convolution: a child of the first container with several children that contain convolutions.

    A child that itself spans several reductions (a whole backbone) is a container, too.
    """
    units: dict[str, str] = {}

    def split(prefix: str, below: Sequence[str]) -> None:
        depth = len(prefix.split(".")) if prefix else 0
        children: dict[str, list[str]] = {}
        for name in below:
            children.setdefault(".".join(name.split(".")[: depth + 1]), []).append(name)
        for child, inside in children.items():
            spans: list[Any] = [strides[name] for name in inside if name in strides]
            is_leaf = inside == [child]
            if not is_leaf and (len(children) == 1 or (spans and max(spans) > 2 * min(spans))):
                split(child, [name for name in inside if name != child])
            for name in inside:
                units.setdefault(name, child)

    split("", names)
    return units
