"""A cost as text: a table of one model or of two beside each other."""

from typing import TYPE_CHECKING

from surgeon.costs.memory import MARGIN
from surgeon.util.parse import mebibytes
from surgeon.util.tables import count, table

if TYPE_CHECKING:
    from surgeon.costs.estimate import Cost


def cost_lines(name: str, found: "Cost", other: "Cost | None" = None, other_name: str | None = None) -> list[str]:
    """The cost as text, in one or two columns."""
    head, header, lines, notes = told(name, found, other, other_name)
    return [head, "", table(header, lines), "", *notes]


def told(
    name: str, found: "Cost", other: "Cost | None" = None, other_name: str | None = None
) -> tuple[str, list[str], list[list[str]], list[str]]:
    """Heading, header and rows of a table, and notes."""
    head = f"{name}: {found.step} of {'x'.join(map(str, found.input_size))}"

    def column(c: "Cost") -> list[str]:
        values = [*map(count, (c.flops, c.macs, c.backward_flops, c.params)), mebibytes(c.peak_bytes)]
        parts = [mebibytes(value) for value in c.breakdown.values()]
        return [*values, *parts, mebibytes(c.total_bytes), mebibytes(c.needed_bytes)]

    names = ["FLOPs per image, forward", "MACs per image, forward", "FLOPs per image, backward", "parameters"]
    names += ["peak of tensors", *(f"  {kind}" for kind in found.breakdown), "needed in total", "with margin"]
    names[names.index("  reserve")] = "reserve"
    columns = [column(found)] + ([column(other)] if other is not None else [])
    header = ["", "this model"] + ([other_name or "original"] if other is not None else [])
    lines = [[n, *values] for n, *values in zip(names, *columns, strict=True)]
    notes = [f"note: {note}" for note in found.notes]
    parts = ", ".join(f"{key} {value / 2**20:,.0f}" for key, value in found.reserve.items())
    margin = f"margin: {MARGIN - 1:.0%} of the peak, as --max-memory counts it"
    peak = "the indented rows are what is held at the moment of the peak; at other moments each may be more"
    return head, header, lines, [peak, f"reserve, MiB: {parts} (stated, not measured)", margin, *notes]
