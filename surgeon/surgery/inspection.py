"""The result of `surgeon.inspect`: every convolution, and its possible replacements."""

import math
from collections.abc import Iterable

from surgeon.layers.registry import layer_class, layer_types
from surgeon.records.report import flops, geometry_text, name_list
from surgeon.sites.sites import ConvSite
from surgeon.surgery.plan import can_become
from surgeon.util import pages
from surgeon.util.tables import count, counted, paragraph, table

INSPECTED = ("layer", "stage", "geometry", "output", "FLOPs", "params", "memory", "can become")


class Inspection(list[ConvSite]):
    """The result of `surgeon.inspect`: a list that prints as a table, and notebooks show as one.

    `input_size` is the (C, H, W) of the image that FLOPs and memory are of; None if the model takes something else.
    """

    def __init__(self, sites: Iterable[ConvSite] = (), input_size: tuple[int, ...] | None = None) -> None:
        super().__init__(sites)
        self.input_size = input_size

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, width: int = 80, model: str | None = None) -> str:
        """Plain text: the table, and the reasons against replacements."""
        rows, against = inspected(self)
        head = f"{model}: " if model else ""
        parts = [f"{head}{summary(self)}", table(INSPECTED, rows, width=width, left=3)]
        if against:
            parts.append(f"why not:\n{why_not_text(against, width)}")
        parts.append(paragraph(f"{self._units()} {_types()}", width=width))
        return "\n\n".join(parts) + "\n"

    def _repr_html_(self) -> str:
        rows, against = inspected(self)
        table_ = pages.rows(INSPECTED, rows) if rows else ""
        more = [("why not", why_not_text(against, 100))] if against else []
        return pages.snippet(summary(self), table_, self._units(), more)

    def _units(self) -> str:
        size = f" of {'x'.join(map(str, self.input_size))}" if self.input_size else ""
        return f"FLOPs (1 MAC = 2 FLOPs) and memory (of the output, float32) are for one image{size}."


def _types() -> str:
    tasks = {kind: ", ".join(layer_class(kind).tasks) for kind in layer_types()}
    told = ", ".join(f"{kind} ({of})" if of else kind for kind, of in tasks.items())
    return f"Types, with the tasks for which `surgeon try` takes them: {told}."


def activation_bytes(site: ConvSite) -> int | None:
    """Memory of the outputs for one image in float32, over all calls; None if the forward pass does not reach it."""
    if not site.calls:
        return None
    return sum(4 * math.prod(call.output[-3:]) for call in site.calls)


def inspected(sites: list[ConvSite]) -> tuple[list[tuple[str, ...]], dict[str, list[str]]]:
    """A row for each convolution, and the names for each reason against a replacement."""
    rows: list[tuple[str, ...]] = []
    against: dict[str, list[str]] = {}
    for site in sites:
        possible = can_become(site)
        fits = [kind for kind, reasons in possible.items() if not reasons]
        for kind, reasons in possible.items():
            for reason in reasons:
                told = reason if not fits else f"not {kind}: {reason}"
                names = against.setdefault(told, [])
                if site.name not in names:
                    names.append(site.name)
        out = "x".join(map(str, site.calls[0].output[-2:])) if site.calls else "-"
        geometry = geometry_text(None if site.geometry is None else site.geometry.to_dict())
        memory = count(activation_bytes(site), "B")
        cells = (site.name, site.stage or "-", geometry, out, flops(site.macs), count(site.params), memory)
        fitting = "any type" if len(fits) == len(possible) else " ".join(fits)
        rows.append((*cells, f"is {site.dynamic}" if site.dynamic else fitting or "nothing"))
    return rows, against


def summary(sites: list[ConvSite]) -> str:
    """Count, FLOPs and parameters of the convolutions in one line."""
    total = [flops(sum(site.macs or 0 for site in sites)), count(sum(site.params for site in sites))]
    return f"{counted(len(sites), 'convolution')}, {total[0]} FLOPs, {total[1]} parameters in them"


def why_not_text(against: dict[str, list[str]], width: int) -> str:
    """The reasons, each with its convolutions."""
    lines = []
    for reason, names in against.items():
        lines.append(paragraph(f"{reason} ({len(names)}):", width=width, indent="  ", hang="    "))
        lines.append(paragraph(name_list(names), width=width, indent="    "))
    return "\n".join(lines)
