"""The report of a collapse: every dynamic layer, folded or kept, with the evidence."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from surgeon.errors import CheckpointError
from surgeon.records.fields import read_fields
from surgeon.records.report import Report, change, entry, flops, jsonable, name_list, took
from surgeon.util.pages import rows, snippet
from surgeon.util.tables import count, counted, error, paragraph, table

KIND = "collapse"
EVIDENCE = {
    "off": "its dynamic part was switched off",
    "parameters": "proven from the parameters",
    "images": "observed on the images",
}


@dataclass(frozen=True, kw_only=True)
class Collapsed:
    """One dynamic layer. MACs are for one image; errors are those of the layer's output on its actual inputs."""

    name: str
    type: str
    folded: bool
    reason: str = ""  # why it was kept
    evidence: str | None = None  # "off", "parameters" or "images"
    variation: float | None = None  # relative, see surgeon.collapsing.evidence; None if nothing was observed
    pixels: int = 0  # number observed
    told: str = ""
    geometry: dict[str, Any]  # of the replaced convolution
    kernel_size: tuple[int, ...] | None = None  # of the new convolution
    params_before: int
    params_after: int
    macs_before: int | None = None
    macs_after: int | None = None
    max_abs_error: float | None = None
    max_rel_error: float | None = None


@dataclass(kw_only=True)
class CollapseReport:
    """Changes made by a collapse, their evidence and their exactness. FLOPs are for one image, 1 MAC = 2."""

    layers: list[Collapsed]
    tolerance: float = 0.0
    images: int = 0  # number given; 0: only the parameters were used
    max_abs_error: float | None = None  # of the model's outputs, before vs. after
    max_rel_error: float | None = None
    precision: str = "float32"
    exact: bool = True  # False if a varying layer was folded at its mean: errors are reported, not bounded
    params_before: int = 0
    params_after: int = 0
    flops_before: int | None = None
    flops_after: int | None = None
    input_size: tuple[int, ...] | None = None  # (C, H, W) of the image of which they are
    model: str | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def folded(self) -> list[Collapsed]:
        return [layer for layer in self.layers if layer.folded]

    @property
    def kept(self) -> list[Collapsed]:
        return [layer for layer in self.layers if not layer.folded]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; NaN and infinity become the strings "nan", "inf", "-inf"."""
        values: dict[str, Any] = jsonable({"kind": KIND} | asdict(self))
        return values

    def to_json(self) -> str:
        """The text of a report.json."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CollapseReport":
        """Inverse of `to_dict`; raises `CheckpointError` if it is not a report of a collapse."""
        try:
            rest = {key: value for key, value in values.items() if key not in ("kind", "layers")}
            report = cls(layers=[entry(Collapsed, layer) for layer in values["layers"]], **read_fields(cls, rest))
        except (KeyError, TypeError, ValueError, AttributeError, CheckpointError) as problem:
            raise CheckpointError(
                f"this is not a report of a collapse: {type(problem).__name__}: {problem}"
            ) from problem
        return report

    def to_text(self, width: int = 80) -> str:
        """Plain text: the table of layers, the evidence, why others were kept, totals, errors, notes."""
        parts = [
            self._title(),
            _table(self.layers, width),
            _evidence(self, width),
            _kept(self, width),
            _totals(self, width),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def __str__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        """HTML for notebooks: the table, totals and notes, with evidence and kept layers collapsed."""
        more = [("evidence", _evidence(self, 100)), (f"kept: {len(self.kept)}", _kept(self, 100))]
        folded = [(heading, text) for heading, text in more if text]
        return snippet(self._title(), rows(_HEADER, _rows(self.layers)), _totals(self, 100), folded)

    def _title(self) -> str:
        title = f"{self.model}: " if self.model else ""
        return f"{title}{len(self.folded)} of {counted(len(self.layers), 'dynamic layer')} folded into convolutions"


def growth_notes(report: CollapseReport) -> list[str]:
    """A note if the folded model has more parameters or FLOPs than before: the layers that grow, and a remedy."""
    more = []
    for what, before, after in (
        ("parameters", report.params_before, report.params_after),
        ("FLOPs", report.flops_before, report.flops_after),
    ):
        if before and after and after > before:
            more.append(f"x{after / before:.2f} {what}")
    grown = [x for x in report.folded if x.params_after > x.params_before or (x.macs_after or 0) > (x.macs_before or 0)]
    if not more or not grown:
        return []
    windows = sorted({"x".join(map(str, x.kernel_size)) for x in grown if x.kernel_size is not None})
    rest = [x.name for x in report.layers if x not in grown]
    keep = f"--layers {','.join(rest)}" if rest and len(rest) <= 4 else "--layers with the names of the others"
    return [
        f"LARGER than before, {' and '.join(more)}: {', '.join(windows)} convolutions hold the whole window of "
        f"{name_list([x.name for x in grown], 6)}. {keep} leaves these dynamic"
        + ("; " if rest else ", or no collapse at all; ")
        + "a conversion with a smaller window (acda: --scales 1) folds into a small kernel"
    ]


def read(values: dict[str, Any]) -> "Report | CollapseReport":
    """The report in a report.json; raises `CheckpointError`."""
    return CollapseReport.from_dict(values) if values.get("kind") == KIND else Report.from_dict(values)


_HEADER = ("layer", "type", "becomes", "varies", "params", "after", "FLOPs", "after", "error")


def _rows(layers: list[Collapsed]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for x in layers:
        kernel = "kept" if x.kernel_size is None else "x".join(map(str, x.kernel_size))
        told = "-" if x.variation is None else f"{x.variation:.2g}"
        params, work = (count(x.params_before), count(x.params_after)), (flops(x.macs_before), flops(x.macs_after))
        found.append((x.name, x.type, kernel, told, *params, *work, error(x.max_rel_error)))
    return found


def _table(layers: list[Collapsed], width: int) -> str:
    return table(_HEADER, _rows(layers), width=width, left=3)


def _evidence(report: CollapseReport, width: int) -> str:
    lines = []
    for kind, heading in EVIDENCE.items():
        found = [layer for layer in report.folded if layer.evidence == kind]
        if not found:
            continue
        lines.append(paragraph(f"{counted(len(found), 'layer')}, {heading}:", width=width))
        plain = [layer.name for layer in found if not layer.told]
        if plain:
            lines.append(paragraph(name_list(plain), width=width, indent="  "))
        lines += [f"  {layer.name}: {layer.told}" for layer in found if layer.told]
    return "\n".join(lines)


def _kept(report: CollapseReport, width: int) -> str:
    groups: dict[str, list[Collapsed]] = {}
    for layer in report.kept:
        groups.setdefault(layer.reason, []).append(layer)
    lines = [f"kept: {len(report.kept)}"] if groups else []
    for reason, layers in groups.items():
        lines.append(paragraph(f"{counted(len(layers), 'layer')}: {reason}", width=width, indent="  ", hang="    "))
        plain = [layer.name for layer in layers if not layer.told]
        if plain:
            lines.append(paragraph(name_list(plain), width=width, indent="    "))
        lines += [f"    {layer.name}: {layer.told}" for layer in layers if layer.told]
    return "\n".join(lines)


def _totals(report: CollapseReport, width: int) -> str:
    lines = [change("parameters", report.params_before, report.params_after)]
    if report.flops_before is not None and report.flops_after is not None:
        at = f" at {'x'.join(map(str, report.input_size[-2:]))}" if report.input_size else ""
        lines.append(change("FLOPs", report.flops_before, report.flops_after) + f"{at} (1 MAC = 2 FLOPs)")
    if report.max_rel_error is not None:
        kind = "" if report.exact else ", not exact by choice"
        lines.append(
            f"error       {error(report.max_rel_error)} relative, {error(report.max_abs_error)} absolute "
            f"({report.precision}{kind})"
        )
    count = f"{report.images} image{'s' * (report.images != 1)}"
    given = f"{count}, tolerance {report.tolerance or 0:g}" if report.images else "none given"
    lines += [f"images      {given}", took(report.seconds)]
    notes = [*report.notes, *_beyond(report)]
    lines += [paragraph(f"note: {note}", width=width, hang="  ") for note in notes]
    return "\n".join(lines)


def _beyond(report: CollapseReport) -> list[str]:
    """An explanation if a layer's error is larger than its variation."""
    found = [x.name for x in report.folded if x.variation and (x.max_rel_error or 0.0) > x.variation]
    if not found:
        return []
    return [
        f"the error of {name_list(found, 6)} is larger than what varies: that is the distance of the filters, relative to the "
        "filter and on average over the pixels, and the error is of the layer's output, which is small where taps cancel, at the "
        "worst pixel. surgeon evaluate shows what it costs"
    ]
