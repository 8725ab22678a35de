"""Published versus our numbers: parameters and multiply-accumulates of every network of the zoo, and why they differ."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgeon.costs import cost
from surgeon.util.files import read_object, write_text
from surgeon.util.progress import OnProgress
from surgeon.zoo.recipes import recipes_for
from surgeon.zoo.registry import Entry, Size, create, entry

COUNTED = Path(__file__).with_name("counted.json")
TOLERANCE = 0.01  # a larger difference needs a reason


@dataclass(frozen=True, kw_only=True)
class ZooRow:
    """One network. `compared_params` are the parameters covered by the published number; MACs are for one image of size `at`."""

    name: str
    params: int
    compared_params: int
    macs: int
    at: Size
    published_params: float | None
    published_macs: float | None
    where: str
    difference: str
    plain: str | None

    @property
    def params_off(self) -> float | None:
        """Relative difference of the parameters from the published number; None if there is none."""
        return None if self.published_params is None else self.compared_params / self.published_params - 1

    @property
    def macs_off(self) -> float | None:
        """Relative difference of the multiply-accumulates from the published number; None if there is none."""
        return None if self.published_macs is None else self.macs / self.published_macs - 1

    @property
    def unexplained(self) -> bool:
        """Whether a number is off by more than 1 % and no reason is given."""
        off = max(abs(self.params_off or 0), abs(self.macs_off or 0), abs(self._whole_off))
        return off > TOLERANCE and not self.difference

    @property
    def _whole_off(self) -> float:
        return 0 if self.published_params is None else self.params / self.published_params - 1

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "name": self.name,
            "params": self.params,
            "compared_params": self.compared_params,
            "macs": self.macs,
            "at": list(self.at),
            "published": {"params": self.published_params, "macs": self.published_macs, "where": self.where},
            "params_off": self.params_off,
            "macs_off": self.macs_off,
            "difference": self.difference,
            "plain": self.plain,
        }


def make_row(name: str, *, fresh: bool = False) -> ZooRow:
    """One network, with the numbers shipped with surgeon; with `fresh`, or if there are none, they are counted."""
    found = entry(name)
    published = found.published
    at = (published.at if published is not None else None) or found.input_size
    known = {} if fresh else _counted().get(name, {})
    numbers = known if known.get("at") == list(at) else _count(found, at)
    return ZooRow(
        name=name,
        params=numbers["params"],
        compared_params=numbers["compared_params"],
        macs=numbers["macs"],
        at=at,
        published_params=published.params if published is not None else None,
        published_macs=published.macs if published is not None else None,
        where=published.where if published is not None else "",
        difference=found.difference,
        plain=found.plain,
    )


@cache
def _counted() -> dict[str, Any]:
    return read_object(COUNTED)


def _count(found: Entry, at: Size) -> dict[str, Any]:
    """Build a network and count it, on the meta device only."""
    model = create(found.name)
    return {
        "params": count_parameters(model),
        "compared_params": count_parameters(model, without=found.uncounted),
        "macs": count_macs(model, at),
        "at": list(at),
    }


def write_counted(names: Sequence[str]) -> None:
    """Count the networks and write the shipped numbers; needed after a change of a network or of what is counted."""
    rows = make_table(names, fresh=True)
    numbers = {
        row.name: {"params": row.params, "compared_params": row.compared_params, "macs": row.macs, "at": list(row.at)}
        for row in rows
    }
    lines = [f"{json.dumps(name)}: {json.dumps(values)}" for name, values in sorted(numbers.items())]
    write_text(COUNTED, "{\n" + ",\n".join(lines) + "\n}\n")


def count_parameters(model: nn.Module, *, without: str = "") -> int:
    """Number of parameters, except those whose name matches the regular expression `without`."""
    return sum(p.numel() for name, p in model.named_parameters() if not (without and re.search(without, name)))


def count_macs(model: nn.Module, size: Size) -> int:
    """Multiply-accumulates of one image in inference."""
    return round(cost(model.eval(), input_size=size, batch_size=1, mode="infer").macs)


def make_table(names: Sequence[str], tell: OnProgress | None = None, *, fresh: bool = False) -> list[ZooRow]:
    """Rows of the named networks, see `make_row`; `tell(stage, done, total)` reports progress."""
    rows = []
    for done, name in enumerate(names):
        if tell is not None:
            tell("count", done, len(names))
        with torch.random.fork_rng(devices=[]):
            rows.append(make_row(name, fresh=fresh))
    if tell is not None:
        tell("count", len(names), len(names))
    return rows


def markdown(rows: Sequence[ZooRow]) -> str:
    """The table and the reasons as part of a document."""
    head = (
        "| network | parameters | published | off | GMAC | at | published | off | where |\n| --- |"
        + " ---: |" * 7
        + " --- |"
    )
    lines = [head, *(_markdown_line(row) for row in rows)]
    reasons = [f"- `{row.name}`: {row.difference}." for row in rows if row.difference]
    return "\n".join([*lines, "", "Why numbers differ:", "", *reasons, ""])


def _markdown_line(row: ZooRow) -> str:
    star = "*" if row.compared_params != row.params else ""
    cells = [
        f"`{row.name}`",
        f"{row.params:,}",
        "" if row.published_params is None else f"{row.published_params / 1e6:.2f} M{star}",
        percent(row.params_off),
        f"{row.macs / 1e9:.3f}",
        "×".join(map(str, row.at)),
        "" if row.published_macs is None else f"{row.published_macs / 1e9:.1f}",
        percent(row.macs_off),
        row.where,
    ]
    return "| " + " | ".join(cells) + " |"


def percent(value: float | None) -> str:
    """+1.2%, or an empty string."""
    return "" if value is None or math.isnan(value) else f"{100 * value:+.1f}%"


def describe(found: Entry) -> dict[str, Any]:
    """Facts about an entry that do not require building it, as plain JSON values."""
    published = found.published
    return {
        "name": found.name,
        "summary": found.summary,
        "description": found.description.strip(),
        "input_size": list(found.input_size),
        "plain": found.plain,
        "by_hand": found.by_hand,
        "training": [
            {"recipe": recipe.name, "preset": preset, "summary": recipe.summary}
            for recipe, preset in recipes_for(found.name)
        ],
        "recipe": [{"layers": r.layers, "type": r.type, "options": r.options} for r in found.rules],
        "published": None
        if published is None
        else {"params": published.params, "macs": published.macs, "where": published.where},
        "difference": found.difference,
        "loads_foreign_weights": bool(found.layout),
    }
