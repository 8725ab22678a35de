"""A search in TensorBoard: curves by trial number, and every trial's placement with its value.

Every worker writes its own folder. The study contains all of this as well; nothing is read back from here.
"""

import logging
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.search.gate import Gate
from surgeon.search.study.record import Record
from surgeon.util.machine import machine

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

_MOST = 64  # maximum number of layers shown individually in hparams


class Board:
    """Curves `value`, `best` and `budget/...` (fraction of the limit), and hparams of the trials that were trained to their end."""

    def __init__(self, folder: Path, gate: Gate, primary: str) -> None:
        self.folder, self.gate, self.primary = folder, gate, primary
        self._writer: SummaryWriter | None = None
        self._broken = False

    def add(self, one: Record, best: Record | None) -> None:
        """Log a finished trial. Curves that cannot be written do not end a search: one warning is logged."""
        if self._broken:
            return
        try:
            self._add(one, best)
        except OSError as error:
            self._broken = True
            logger.warning("no more curves in %s: %s", self.folder, error.strerror or error)

    def _add(self, one: Record, best: Record | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:
            self._writer = SummaryWriter(str(self.folder / f"{machine()}-{os.getpid()}"))
        writer, value = self._writer, one.values[0] if one.state == "complete" and one.values else None
        if value is not None:
            writer.add_scalar(f"search/{self.primary}", value, one.number)
        if best is not None and best.values:
            writer.add_scalar(f"search/best_{self.primary}", best.values[0], one.number)
        use = self.gate.use(one.attributes.get("traced"))
        for name, share in use.items():
            writer.add_scalar(f"budget/{name}", share, one.number)
        if value is not None:
            found = {f"hparam/{self.primary}": value}
            writer.add_hparams(self.hparams(one), found, run_name=f"trial-{one.number:04}", global_step=one.number)
        writer.flush()

    def hparams(self, one: Record) -> dict[str, Any]:
        """Description of a trial: its source, how often each type is used, and the option of every layer of a small space."""
        space = self.gate.space
        kinds = Counter(label.split("(")[0] for label in one.placement.values())
        found: dict[str, Any] = {"source": str(one.source), "replaced": len(one.placement)}
        found |= {f"layers/{kind}": kinds.get(kind, 0) for kind in dict.fromkeys(space.types[1:])}
        found["expected_gain"] = float(one.attributes.get("gain", 0.0))
        if len(space.layers) <= _MOST:
            found |= {layer: one.placement.get(layer, space.labels[0]) for layer in space.layers}
        return found
