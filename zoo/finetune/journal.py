"""What a run tells while it goes: a bar on stderr, `log.jsonl`, TensorBoard."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from surgeon.zoo.finetune.state import Log

if TYPE_CHECKING:
    from surgeon.zoo.finetune.evaluation import Evaluation


class Journal:
    """`folder` is the run's `training/`, None for a run that leaves nothing; a bar only on a terminal, else lines."""

    def __init__(self, folder: Path | None, *, quiet: bool) -> None:
        self.quiet = quiet
        self.log = None if folder is None else Log(folder / "log.jsonl")
        self.folder = folder
        self.board: Any = None
        self.bar: Any = None
        self.complained: set[str] = set()

    def start(self, step: int, total: int) -> None:
        """Begin, or begin again after a return to an earlier step."""
        self.stop()
        if self.log is not None and self.folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.log.cut(step)
            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)
        self.bar = tqdm(
            total=total, initial=step, unit="step", file=sys.stderr, disable=True if self.quiet else None, leave=False
        )

    def stop(self) -> None:
        """Close what is open."""
        if self.board is not None:
            self.board.close()
        if self.bar is not None:
            self.bar.close()
        self.board = self.bar = None

    def tell(self, text: str) -> None:
        """A line for people."""
        if not self.quiet:
            tqdm.write(f"surgeon: {text}", file=sys.stderr)

    def advance(self, loss: float) -> None:
        """One step further."""
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            self.bar.update()

    def step(self, row: dict[str, Any]) -> None:
        """A row of a training step: its numbers go to TensorBoard under `train/`."""
        self._row("train", row)

    def evaluation(self, row: dict[str, Any], found: "Evaluation") -> None:
        """A row of an evaluation: its metrics go to TensorBoard under `val/`, how adaptive layers are under `adaptivity/`.

        Once training has begun, a generator that is blind or saturated is named, once.
        """
        layers = [layer.to_dict() for layer in found.layers]
        self._row("val", row["metrics"] | {"step": row["step"]}, row | ({"layers": layers} if layers else {}))
        for layer in layers:
            for what in ("content", "saturated", "distance"):
                if self.board is not None and layer[what] is not None:
                    self.board.add_scalar(f"adaptivity/{layer['name']}/{what}", layer[what], row["step"])
        for layer in found.layers if row["step"] else ():
            complaint = layer.complaint()
            if complaint is not None and layer.name not in self.complained:
                self.complained.add(layer.name)
                self.tell(complaint)
        if self.board is not None and found.picture is not None:
            pixels = np.asarray(found.picture.convert("RGB"))
            self.board.add_image("val/samples", pixels, row["step"], dataformats="HWC")

    def event(self, row: dict[str, Any]) -> None:
        """Something out of the ordinary (a return to an earlier step), in the log alone."""
        if self.log is not None:
            self.log.add(row)

    def hparams(self, options: dict[str, Any], metrics: dict[str, float]) -> None:
        """The options beside the final metrics, for TensorBoard's table of runs."""
        if self.board is None:
            return
        from torch.utils.tensorboard.summary import hparams

        values = {name: value for name, value in options.items() if isinstance(value, bool | int | float | str)}
        for summary in hparams(values, {f"final/{name}": value for name, value in metrics.items()}):
            self.board.file_writer.add_summary(summary)
        for name, value in metrics.items():
            self.board.add_scalar(f"final/{name}", value)

    def _row(self, prefix: str, numbers: dict[str, Any], row: dict[str, Any] | None = None) -> None:
        if self.log is not None:
            self.log.add(row or numbers)
        if self.board is not None:
            for name, value in numbers.items():
                if name != "step" and isinstance(value, int | float):
                    self.board.add_scalar(f"{prefix}/{name}", value, numbers["step"])
