"""The report of a conversion: every convolution of the model, replaced or skipped with reasons."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from surgeon.errors import CheckpointError
from surgeon.layers.registry import layer_class, layer_types
from surgeon.records.fields import read_fields
from surgeon.util.pages import rows, snippet
from surgeon.util.tables import count, error, paragraph, table

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """One replaced convolution. MACs are for one image of the example's size, None if the forward pass does not reach it."""

    name: str
    aliases: tuple[str, ...] = ()  # other names of the same module
    stage: str | None
    type: str
    options: dict[str, Any]  # the layer's resolved config
    geometry: dict[str, Any]  # ConvGeometry.to_dict()
    calls: int
    params_before: int
    params_after: int
    macs_before: int | None
    macs_after: int | None
    max_abs_error: float  # of this layer's output, on its actual inputs (or random ones if it got none)
    max_rel_error: float  # max |new - old| / max |old|
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """One convolution that was not replaced, and why."""

    name: str
    aliases: tuple[str, ...] = ()
    stage: str | None
    module: str  # class name
    geometry: dict[str, Any] | None
    selected: bool  # False: not in the selection
    reasons: tuple[str, ...]


@dataclass(kw_only=True)
class Report:
    """Changes made by a conversion, and their exactness."""

    replaced: list[Replaced]
    skipped: list[Skipped]
    max_abs_error: float | None = None  # of the model's outputs; None if it was not run
    max_rel_error: float | None = None
    precision: str = "float32"  # of the deciding run; "float64" if depth amplified float32 rounding
    exact: bool = True  # False for compressed conversions: errors are reported, not bounded
    params_before: int = 0
    params_after: int = 0
    macs_before: int | None = None
    macs_after: int | None = None
    input_size: tuple[int, ...] | None = None  # (C, H, W) of the image of which they are
    model: str | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; NaN and infinity become the strings "nan", "inf", "-inf"."""
        values: dict[str, Any] = jsonable(asdict(self))
        return values

    def to_json(self) -> str:
        """The text of a report.json."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Report":
        """Inverse of `to_dict`; raises `CheckpointError` if it is not a report."""
        try:
            rest = {key: value for key, value in values.items() if key not in ("replaced", "skipped")}
            report = cls(
                replaced=[entry(Replaced, item) for item in values["replaced"]],
                skipped=[entry(Skipped, item) for item in values["skipped"]],
                **read_fields(cls, rest),
            )
        except (KeyError, TypeError, ValueError, AttributeError, CheckpointError) as problem:
            raise CheckpointError(f"this is not a report of surgeon: {type(problem).__name__}: {problem}") from problem
        return report

    def to_text(self, width: int = 80) -> str:
        """Plain text: the table of replacements, skipped layers grouped by reason, totals, errors, notes."""
        parts = [self._title()]
        if self.replaced:
            parts.append(_replaced_table(self.replaced, width))
        parts += _skipped_text(self.skipped, width)
        parts.append(_totals(self, width))
        return "\n\n".join(part for part in parts if part) + "\n"

    def __str__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        """HTML for notebooks: the table, totals and notes, with skipped layers collapsed."""
        skipped = "\n\n".join(_skipped_text(self.skipped, 100))
        table = rows(REPLACED, [_replaced_row(r) for r in self.replaced]) if self.replaced else ""
        more = [(f"not replaced: {len(self.skipped)}", skipped)] if self.skipped else []
        return snippet(self._title(), table, _totals(self, 100), more)

    def _title(self) -> str:
        title = f"{self.model}: " if self.model else ""
        n = len(self.replaced) + len(self.skipped)
        return f"{title}{len(self.replaced)} of {n} convolutions replaced"


_GROWTH = 3  # growth of parameters or FLOPs of a model from which a report hints at smaller options
_LAYER_GROWTH = 5  # of a layer's FLOPs


def growth_notes(report: Report) -> list[str]:
    """Hints for each layer type if a conversion multiplies the parameters, or the FLOPs of the convolutions or of one of them."""
    return _model_growth(report) or _layer_growth(report)


def _model_growth(report: Report) -> list[str]:
    pairs = (
        ("parameters", report.params_before, report.params_after),
        ("FLOPs", report.macs_before, report.macs_after),
    )
    factors = {what: after / before for what, before, after in pairs if before and after is not None}
    if max(factors.values(), default=0.0) < _GROWTH:
        return []
    total = " and ".join(f"x{factor:.2g} {what}" for what, factor in factors.items() if factor >= _GROWTH)
    grown: dict[str, int] = {}
    for r in report.replaced:
        grown[r.type] = grown.get(r.type, 0) + r.params_after - r.params_before
    hints = ((kind, more, layer_class(kind).fewer_parameters) for kind, more in grown.items() if more > 0)
    return [f"{total} in all: {kind} layers add {count(more)} parameters; {hint}" for kind, more, hint in hints if hint]


def _layer_growth(report: Report) -> list[str]:
    grown: dict[str, list[str]] = {}
    for r in report.replaced:
        if r.macs_before and r.macs_after and r.macs_after >= _LAYER_GROWTH * r.macs_before:
            grown.setdefault(r.type, []).append(f"{r.name} (x{r.macs_after / r.macs_before:.2g})")
    hints = {kind: layer_class(kind).fewer_parameters for kind in grown}
    return [
        f"{kind} layers with {_LAYER_GROWTH} times the FLOPs of their convolutions or more: {name_list(names)}"
        + (f"; {hints[kind]}" if hints[kind] else "")
        for kind, names in grown.items()
    ]


Entry = TypeVar("Entry", bound="DataclassInstance")


def jsonable(value: Any) -> Any:
    """The value with NaN and infinity as strings."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def entry(kind: type[Entry], values: dict[str, Any]) -> Entry:
    """One dataclass of a report from its JSON values."""
    return kind(**read_fields(kind, values))


def geometry_text(geometry: dict[str, Any] | None) -> str:
    """A convolution in compact form: `256>512 3x3 s2 d2 g32`, or `dw96 7x7` for a depthwise one."""
    if geometry is None:
        return "-"
    c_in, c_out, groups = geometry["in_channels"], geometry["out_channels"], geometry["groups"]
    depthwise = groups > 1 and groups == c_in
    text = f"dw{c_out}" if depthwise and c_in == c_out else f"{c_in}>{c_out}"
    text += " {}x{}".format(*geometry["kernel_size"])
    for letter, key in (("s", "stride"), ("d", "dilation")):
        pair = geometry[key]
        if tuple(pair) != (1, 1):
            text += f" {letter}{pair[0]}" if pair[0] == pair[1] else f" {letter}{pair[0]}x{pair[1]}"
    if groups > 1 and not (depthwise and c_in == c_out):
        text += f" g{groups}"
    return text


def options_text(kind: str, options: dict[str, Any]) -> str:
    """A layer's options in compact form: `acda m6 S3`."""
    return " ".join([kind, *(f"{letter}{options[key]}" for key, letter in _symbols(kind, options).items())])


def letters_text(options: Iterable[tuple[str, dict[str, Any]]]) -> str:
    """A legend of the letters in `options_text`, for these layer types with their options: `m: atoms, S: scales`."""
    letters = dict.fromkeys(f"{letter}: {key}" for kind, own in options for key, letter in _symbols(kind, own).items())
    return ", ".join(letters)


def _symbols(kind: str, options: dict[str, Any]) -> dict[str, str]:
    """The options that are shown, each with its letter."""
    symbols = layer_class(kind).Config.symbols_of(options) if kind in layer_types() else {}
    return {key: letter for key, letter in symbols.items() if options.get(key) is not None}


def flops(macs: int | None) -> str:
    """FLOPs for this many multiply-accumulates (1 MAC = 2 FLOPs), in three digits."""
    return count(None if macs is None else 2 * macs)


REPLACED = ("layer", "stage", "geometry", "became", "params", "after", "FLOPs", "after", "error")


def _replaced_row(r: Replaced, became: str | None = None) -> tuple[str, ...]:
    params = (count(r.params_before), count(r.params_after))
    work = (flops(r.macs_before), flops(r.macs_after))
    told = became or options_text(r.type, r.options)
    return (r.name, r.stage or "-", geometry_text(r.geometry), told, *params, *work, error(r.max_rel_error))


def _replaced_table(replaced: list[Replaced], width: int) -> str:
    narrow = width < 100
    lines = [_replaced_row(r, r.type if narrow else None) for r in replaced]
    text = table(REPLACED, lines, width=width, left=4)
    if narrow:
        kinds = sorted({options_text(r.type, r.options) for r in replaced})
        letters = letters_text((r.type, r.options) for r in replaced)
        told = "; ".join(kinds) + (f" ({letters})" if letters else "")
        text += "\n" + paragraph(f"became: {told}", width=width, hang="  ")
    return text


def _skipped_text(skipped: list[Skipped], width: int) -> list[str]:
    """Refused layers first, one paragraph per reason; unselected ones are only counted and named."""
    groups: dict[tuple[bool, str], list[str]] = {}
    for s in skipped:
        for reason in s.reasons or ("no reason given",):
            groups.setdefault((not s.selected, reason), []).append(s.name)
    parts = []
    for heading, unasked in (("refused", False), ("not selected", True)):
        chosen = {reason: names for (flag, reason), names in groups.items() if flag is unasked}
        if not chosen:
            continue
        n = len({name for names in chosen.values() for name in names})
        lines = [f"{heading}: {n}"]
        for reason, names in chosen.items():
            if reason != heading:
                lines.append(paragraph(f"{reason} ({len(names)}):", width=width, indent="  ", hang="    "))
            lines.append(paragraph(name_list(names), width=width, indent="    "))
        parts.append("\n".join(lines))
    return parts


def name_list(names: list[str], most: int = 12) -> str:
    """The names; in long lists the middle ones are only counted."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 2])}, ... {len(names) - most + 1} more, {names[-1]}"


def _totals(report: Report, width: int) -> str:
    lines = [change("parameters", report.params_before, report.params_after)]
    if report.macs_before is not None and report.macs_after is not None:
        at = f" at {'x'.join(map(str, report.input_size[-2:]))}" if report.input_size else ""
        told = f" in convolutions{at} (1 MAC = 2 FLOPs)"
        lines.append(change("FLOPs", 2 * report.macs_before, 2 * report.macs_after) + told)
    if report.max_abs_error is None or report.max_rel_error is None:
        lines.append("error       not measured")
    else:
        lines.append(f"error       {_error(report)}")
    lines.append(took(report.seconds))
    lines += [paragraph(f"note: {note}", width=width, hang="  ") for note in report.notes]
    of_layers: dict[str, list[str]] = {}
    for r in report.replaced:
        for note in r.notes:
            of_layers.setdefault(note, []).append(r.name)
    for note, names in of_layers.items():
        lines.append(paragraph(f"note: {note}: {name_list(names)}", width=width, hang="  "))
    return "\n".join(lines)


def _error(report: Report) -> str:
    """Errors of the outputs and the worst layer. An output error of exactly 0 despite layer errors is not informative."""
    kind = report.precision + ("" if report.exact else ", not exact by choice")
    worst = max((r.max_rel_error for r in report.replaced if r.max_rel_error is not None), default=None)
    if report.max_abs_error == 0 and worst:
        return f"worst layer {error(worst)} ({kind}); the outputs do not show it (0)"
    outputs = f"{error(report.max_rel_error)} relative, {error(report.max_abs_error)} absolute"
    return f"{outputs} ({kind}), worst layer {error(worst)}"


def change(name: str, before: int | None, after: int | None) -> str:
    """A line of totals: before, after, and the factor; a missing number is "unknown"."""
    factor = f" (x{after / before:.2f})" if before and after is not None else ""
    old, new = ("unknown" if n is None else count(n) for n in (before, after))
    return f"{name:<11} {old} -> {new}{factor}"


def took(seconds: float | None) -> str:
    """A line of totals: the time taken."""
    return f"took        {'unknown' if seconds is None else f'{seconds:.1f} s'}"
