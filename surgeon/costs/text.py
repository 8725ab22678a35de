"""A cost as text, beside another's if there are two."""

from typing import TYPE_CHECKING

from surgeon.util.parse import mebibytes
from surgeon.util.tables import count, table

if TYPE_CHECKING:
    from surgeon.costs.estimate import Cost


def cost_lines(name: str, found: "Cost", other: "Cost | None" = None, other_name: str | None = None) -> list[str]:
    """The cost as text, in one or two columns."""
    step = "inference" if found.mode == "infer" else f"training step, {found.optimizer}"
    precision = found.amp or "float32"
    size = "x".join(map(str, found.input_size))
    head = f"{name}: {step}, {precision}, batch {found.batch_size} of {size}"

    def column(c: "Cost") -> list[str]:
        values = [*map(count, (c.flops, c.macs, c.backward_flops, c.params)), mebibytes(c.peak_bytes)]
        parts = [mebibytes(value) for value in c.breakdown.values()]
        return [*values, *parts, mebibytes(c.total_bytes)]

    names = ["FLOPs per image, forward", "MACs per image, forward", "FLOPs per image, backward", "parameters"]
    names += ["peak of tensors", *(f"  {kind}" for kind in found.breakdown), "needed in total"]
    names[names.index("  reserve")] = "reserve"
    columns = [column(found)] + ([column(other)] if other is not None else [])
    header = ["", "this model"] + ([other_name or "original"] if other is not None else [])
    text = table(header, [[n, *values] for n, *values in zip(names, *columns, strict=True)])
    notes = [f"note: {note}" for note in found.notes]
    parts = ", ".join(f"{key} {value / 2**20:,.0f}" for key, value in found.reserve.items())
    peak = "the indented rows are what is held at the moment of the peak; at other moments each may be more"
    return [head, "", text, "", peak, f"reserve, MiB: {parts} (stated, not measured)", *notes]
