"""The gain table: the expected gain of every (layer, option) over keeping the convolution, and its standard error.

A gain is in the units of its estimator (a decrease of the loss, a ratio); placements only compare sums. Tables are JSON,
keyed by the hash of their inputs.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.errors import ConfigError
from surgeon.search.gains.names import DECREASE
from surgeon.search.placement.problem import Floats
from surgeon.search.space import Space
from surgeon.util.files import cache_folder, read_json, write_text
from surgeon.util.tables import counted

logger = logging.getLogger(__name__)

FORMAT = "surgeon-gains"
VERSION = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class GainTable:
    """`gain` and its standard error `error` (L, O) for the options of `layers`; option 0, "keep", is 0 by definition.

    Entries not estimated (options that are not allowed) are 0 with error 0. `estimator` names the method, `facts`
    describe how the table was made: seconds, samples, the rank correlation with measured gains.
    """

    layers: tuple[str, ...]
    options: tuple[str, ...]  # labels, "keep" first
    gain: Floats
    error: Floats
    estimator: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    cached: bool = False  # whether it was estimated before; not written

    def __post_init__(self) -> None:
        shape = (len(self.layers), len(self.options))
        if self.gain.shape != shape or self.error.shape != shape:
            raise ConfigError(
                f"gains of {shape} need arrays of that shape, got {self.gain.shape} and {self.error.shape}"
            )
        if not (np.isfinite(self.gain).all() and np.isfinite(self.error).all() and (self.error >= 0).all()):
            raise ConfigError("gains must be finite numbers, and their errors not negative")
        if self.gain[:, 0].any() or self.error[:, 0].any():
            raise ConfigError("the gain of keeping a layer is 0 by definition")

    def for_space(self, space: Space, where: str = "") -> "GainTable":
        """The entries of a space, in its order. Raises `ConfigError`, with `where` the table is, if an allowed one is missing."""
        self.check_network(space.layers, where)
        rows = {name: i for i, name in enumerate(self.layers)}
        columns = {label: j for j, label in enumerate(self.options)}
        gain, error = np.zeros(space.allowed.shape), np.zeros(space.allowed.shape)
        for i, layer in enumerate(space.layers):
            for j, label in enumerate(space.labels):
                if not j or not space.allowed[i, j]:
                    continue
                if layer not in rows or label not in columns:
                    raise ConfigError(
                        f"{where or 'the gain table'} ({self.estimator}) has no entry for {layer} as {label}: surgeon gains "
                        "with the same --layers, --types and options estimates it"
                    )
                gain[i, j], error[i, j] = (
                    self.gain[rows[layer], columns[label]],
                    self.error[rows[layer], columns[label]],
                )
        return GainTable(
            layers=space.layers,
            options=space.labels,
            gain=gain,
            error=error,
            estimator=self.estimator,
            facts=self.facts,
        )

    def check_network(self, names: Collection[str], where: str = "") -> None:
        """Raise `ConfigError`, with `where` the table is, if none of its layers is among a network's modules."""
        if self.layers and names and set(self.layers).isdisjoint(names):
            raise ConfigError(
                f"{where or 'the gain table'} is of another network: it has {', '.join(self.layers[:3])}, and none of these is here"
            )

    def doubt(self) -> str | None:
        """A sentence if decreases of the loss are predicted that are larger than the loss itself."""
        loss = self.facts.get("loss")
        if self.facts.get("unit") != DECREASE or not isinstance(loss, int | float) or loss <= 0:
            return None
        beyond = int((self.gain > loss).sum())
        if not beyond:
            return None
        exceed = f"{counted(beyond, 'gain')} of {np.count_nonzero(self.gain)} exceed{'s' * (beyond == 1)}"
        return f"{exceed} the loss itself, {loss:.3g}: the prediction does not hold so far, take it as an order only"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values: `gains` is layer → option → [gain, standard error]."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "estimator": self.estimator,
            "facts": dict(self.facts),
            "options": list(self.options[1:]),
            "gains": {
                layer: {
                    label: [float(self.gain[i, j]), float(self.error[i, j])]
                    for j, label in enumerate(self.options)
                    if j
                }
                for i, layer in enumerate(self.layers)
            },
        }

    @classmethod
    def from_dict(cls, values: Any, where: str = "gains") -> "GainTable":
        """Inverse of `to_dict`; raises `ConfigError`."""
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ConfigError(f'{where} is not a gain table: its format must be "{FORMAT}"')
        if values.get("version") != VERSION:
            raise ConfigError(f"{where}: version must be {VERSION}, got {values.get('version')!r}")
        try:
            options = ("keep", *map(str, values["options"]))
            layers = tuple(map(str, values["gains"]))
            pairs = np.array(
                [[(0.0, 0.0), *(values["gains"][layer][label] for label in options[1:])] for layer in layers],
                dtype=float,
            ).reshape(len(layers), len(options), 2)
            return cls(
                layers=layers,
                options=options,
                gain=pairs[..., 0],
                error=pairs[..., 1],
                estimator=str(values["estimator"]),
                facts=dict(values.get("facts", {})),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise ConfigError(f"{where}: {error}") from error
            raise ConfigError(
                f"{where}: every layer needs [gain, standard error] for every option: {error!r}"
            ) from error

    def write(self, path: str | Path) -> None:
        """Write a JSON file atomically. Raises `ConfigError`."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n", ConfigError)

    @classmethod
    def read(cls, path: str | Path) -> "GainTable":
        """Read a JSON file; raises `ConfigError`."""
        return cls.from_dict(read_json(path, ConfigError, "the gain table"), str(path))


def uniform_gains(space: Space) -> GainTable:
    """Every replacement gains 1, which favors as many layers as the budgets allow."""
    gain = np.where(space.allowed, 1.0, 0.0)
    gain[:, 0] = 0.0
    return GainTable(
        layers=space.layers,
        options=space.labels,
        gain=gain,
        error=np.zeros_like(gain),
        estimator="uniform",
    )


# --- cache on disk ------------------------------------------------------------------------------------------------


def cache_key(space: Space, estimator: str, **facts: Any) -> str:
    """Content hash of a request: the space, the estimator and its options, weights and data (as their hashes)."""
    text = json.dumps({"space": space.hash, "estimator": estimator, "facts": facts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def cached(key: str, make: Callable[[], GainTable]) -> GainTable:
    """The table with this key, created and stored (`SURGEON_CACHE`, else ~/.cache/surgeon) if there is none."""
    path = cache_folder() / "gains" / f"{key}.json"
    if path.is_file():
        try:
            found = GainTable.read(path)
            return replace(found, cached=True)
        except ConfigError:
            path.unlink(missing_ok=True)  # damaged: recreated
    table = make()
    try:
        table.write(path)
    except ConfigError as error:
        logger.debug("not stored: %s", error)
    return table
