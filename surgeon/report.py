"""The report of a conversion: every convolution of the model is in it, replaced or skipped with reasons."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """One replaced convolution. MACs are for one image of the example's size, None where the forward pass does not reach it."""

    name: str
    aliases: tuple[str, ...] = ()  # further names of the same module
    stage: str | None
    type: str
    options: dict[str, Any]  # the layer's resolved config
    geometry: dict[str, Any]  # ConvGeometry.to_dict()
    calls: int
    params_before: int
    params_after: int
    macs_before: int | None
    macs_after: int | None
    max_abs_error: float  # of this layer's output, on the inputs it really got (or random ones where it got none)
    max_rel_error: float  # max |new - old| / max |old|
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """One convolution that stays as it is, and why."""

    name: str
    aliases: tuple[str, ...] = ()
    stage: str | None
    module: str  # class name
    geometry: dict[str, Any] | None
    selected: bool  # False: the selection did not ask for it
    reasons: tuple[str, ...]


@dataclass(kw_only=True)
class Report:
    """What a conversion did and how exact it is."""

    replaced: list[Replaced]
    skipped: list[Skipped]
    max_abs_error: float | None = None  # of the model's outputs; None where it was not run
    max_rel_error: float | None = None
    precision: str = "float32"  # of the run that settled it; "float64" where depth amplified float32 rounding
    exact: bool = True  # False for compressed conversions: errors are stated, not bounded
    params_before: int = 0
    params_after: int = 0
    macs_before: int | None = None
    macs_after: int | None = None
    model: str | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
