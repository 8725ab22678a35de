"""The additive cost table: changes in cost for each layer and replacement.

Every (layer, option) is traced alone, once. Memory adds up exactly if layers do not share what they save: at each moment
of a step the live tensors are those of the unmodified model plus, for every replaced layer, a difference that depends on the
moment only through "before, in, between or after its forward and backward". So a step is divided into windows, one
for each call of a replaceable layer and one for each gap between calls; a placement's peak is the maximum over the windows of
base + sum of differences. That is a linear bound for every window, which is what an integer program needs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.errors import ConfigError

Ints = NDArray[np.int64]
KEEP = "keep"


@dataclass(frozen=True)
class Option:
    """A possible replacement: a layer type and its options."""

    type: str
    options: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Display name and key: `acda(atoms=6)`."""
        inner = ", ".join(f"{key}={value}" for key, value in sorted(self.options.items()))
        return f"{self.type}({inner})" if inner else self.type


@dataclass(frozen=True)
class CostRow:
    """Differences from the original layer. FLOPs per image; bytes for the batch; `reasons` rule out the option."""

    layer: str
    option: str
    flops: float
    backward_flops: float
    params: int
    saved_bytes: int  # activations held for the backward pass
    transient_bytes: int  # alive while the layer runs, not counting what it saves and its gradients
    static_bytes: int  # weights, buffers, optimizer state
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Totals:
    """Costs of placements, arrays (P,). FLOPs per image, bytes at the peak."""

    flops: NDArray[np.float64]
    backward_flops: NDArray[np.float64]
    params: Ints
    peak_bytes: Ints


@dataclass(frozen=True, eq=False)
class CostTable:
    """Rows for every (layer, option), option 0 being "keep"; L layers, O options, W windows of the step.

    `windows` (W,) are the unmodified model's bytes, `memory` (L, O, W) the differences; `allowed` (L, O). `peak_bytes` of a
    placement is `max(windows + memory[l, o_l].sum(over l))`.
    """

    layers: tuple[str, ...]
    options: tuple[str, ...]
    rows: tuple[CostRow, ...]
    base: Mapping[str, float]  # flops, backward_flops, params of the unmodified model
    allowed: NDArray[np.bool_]
    windows: Ints
    memory: Ints

    def __post_init__(self) -> None:
        shape = (len(self.layers), len(self.options))
        columns = {name: np.zeros(shape) for name in ("flops", "backward_flops", "params")}
        places = {label: i for i, label in enumerate(self.options)}
        layers = {name: i for i, name in enumerate(self.layers)}
        for row in self.rows:
            for name, column in columns.items():
                column[layers[row.layer], places[row.option]] = getattr(row, name)
        lean = self._binding()
        table = np.concatenate([self.memory[:, :, lean], *(columns[name][..., None] for name in columns)], axis=2)
        object.__setattr__(self, "_lean", lean)
        object.__setattr__(
            self, "_table", np.ascontiguousarray(table.reshape(shape[0] * shape[1], -1), dtype=np.float64)
        )
        start = np.concatenate([self.windows[lean], [self.base[name] for name in columns]])
        object.__setattr__(self, "_start", start.astype(np.float64))

    def _binding(self) -> NDArray[np.intp]:
        """Windows that can be the peak of some placement."""
        lowest = self.windows + self.memory.min(axis=1).sum(axis=0)
        highest = self.windows + self.memory.max(axis=1).sum(axis=0)
        return np.flatnonzero(highest >= lowest.max())

    def look_up(self, placements: Any, *, chunk: int = 4096) -> Totals:
        """Costs of many placements at once.

        Args:
            placements: (P, L) integers, the option of every layer; (L,) for a single placement.

        Raises:
            ConfigError: the shape is wrong, or an option does not exist or is not allowed for its layer.
        """
        chosen = np.atleast_2d(np.asarray(placements))
        n_layers, n_options = len(self.layers), len(self.options)
        if chosen.ndim != 2 or chosen.shape[1] != n_layers or chosen.dtype.kind not in "iu":
            raise ConfigError(f"placements must be integers (P, {n_layers}), got {chosen.dtype} {chosen.shape}")
        if chosen.size and (chosen.min() < 0 or chosen.max() >= n_options):
            raise ConfigError(f"placements contain options outside 0..{n_options - 1}")
        rows = chosen + np.arange(n_layers) * n_options
        if not self.allowed.reshape(-1)[rows].all():
            place, layer = np.argwhere(~self.allowed.reshape(-1)[rows])[0]
            option = self.options[chosen[place, layer]]
            raise ConfigError(f"placement {place}: {self.layers[layer]} cannot become {option}")
        table: NDArray[np.float64] = self.__dict__["_table"]
        sums = np.empty((len(chosen), table.shape[1]))
        hot = np.zeros((min(chunk, len(chosen)), len(table)))
        for first in range(0, len(chosen), chunk):
            part = rows[first : first + chunk]
            index = (np.arange(len(part))[:, None], part)
            hot[index] = 1.0
            np.matmul(hot[: len(part)], table, out=sums[first : first + len(part)])
            hot[index] = 0.0
        sums += self.__dict__["_start"]
        peak = sums[:, :-3].max(axis=1)
        return Totals(sums[:, -3], sums[:, -2], np.rint(sums[:, -1]).astype(np.int64), np.rint(peak).astype(np.int64))

    def placement(self, chosen: Mapping[str, str]) -> Ints:
        """A placement (L,) from layer names and option labels; layers not named are kept."""
        result = np.zeros(len(self.layers), dtype=np.int64)
        for name, label in chosen.items():
            if name not in self.layers or label not in self.options:
                unknown = repr(name) if name not in self.layers else repr(label)
                raise ConfigError(
                    f"the cost table has no {unknown}; it has {len(self.layers)} layers and {self.options}"
                )
            result[self.layers.index(name)] = self.options.index(label)
        return result
