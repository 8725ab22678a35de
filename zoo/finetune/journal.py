"""Output of a run in progress: a bar on stderr, `log.jsonl`, TensorBoard."""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from surgeon.util.waiting import waiting
from surgeon.visualize.adaptivity import complaints
from surgeon.zoo.finetune.state import Log

if TYPE_CHECKING:
    from surgeon.zoo.finetune.evaluation import Evaluation

logger = logging.getLogger(__name__)

_EVERY = 10.0  # seconds between lines of progress in a pipe


def _told_elsewhere(before: Any, error: Any) -> None:
    """Suppress a traceback: TensorBoard's thread passes its error to the next write, which reports it."""
    if not (type(error.thread).__name__ == "_AsyncWriterThread" and isinstance(error.exc_value, OSError)):
        before(error)


class TrainingJournal:
    """`folder` is the run's `training/`, None to write nothing; a bar only on a terminal, otherwise lines."""

    def __init__(self, folder: Path | None, *, quiet: bool) -> None:
        self.quiet = quiet
        self.log = None if folder is None else Log(folder / "log.jsonl")
        self.folder = folder
        self.failing = False
        self.board: Any = None
        self.hook: Any = None  # the previous hook for errors in threads, while TensorBoard runs one
        self.bar: Any = None
        self.inner: Any = None  # the bar of an evaluation
        self.done, self.total, self.last = 0, 0, time.monotonic()
        self.complained: set[str] = set()
        self.batch = ""  # of an evaluation, where there are no bars

    def start(self, step: int, total: int) -> None:
        """Start, or restart after a rollback to an earlier step."""
        self.stop()
        if self.log is not None and self.folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.log.cut(step)
            self.hook = threading.excepthook
            threading.excepthook = partial(_told_elsewhere, self.hook)
            with self._board_kept():
                self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)
        self.done, self.total = step, total
        self.bar = tqdm(
            total=total, initial=step, unit="step", file=sys.stderr, disable=True if self.quiet else None, leave=False
        )

    def stop(self) -> None:
        """Close all outputs."""
        if self.board is not None:
            with self._board_kept():
                self.board.flush()
                self.board.close()
        for bar in (self.inner, self.bar):
            if bar is not None:
                bar.close()
        if self.hook is not None:
            threading.excepthook = self.hook
        self.board = self.bar = self.inner = self.hook = None

    def tell(self, text: str) -> None:
        """Print a line."""
        if not self.quiet:
            tqdm.write(f"surgeon: {text}", file=sys.stderr)

    def advance(self, loss: float) -> None:
        """Advance the bar by one step."""
        self.done += 1
        self._line(f"step {self.done}/{self.total}, loss {loss:.4g}")
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            self.bar.update()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Lines about work between the steps that takes more than two seconds, where there are no bars."""
        self.batch = ""
        with waiting(lambda: f"{what}{self.batch}", quiet=self.quiet or sys.stderr.isatty()):
            yield

    def show(self, stage: str, done: int, total: int) -> None:
        """Show the progress of work between the steps: a separate bar on a terminal, otherwise in the lines of `waiting`."""
        if self.quiet or total < 2:
            return
        if not sys.stderr.isatty():
            self.batch = f", batch {done}/{total}"
            return
        if self.inner is None:
            self.inner = tqdm(total=total, desc=stage, unit="batch", file=sys.stderr, leave=False, delay=1.0)
        self.inner.update(done - self.inner.n)
        if done >= total:
            self.inner.close()
            self.inner = None

    def _line(self, text: str) -> None:
        """Print a line if there are no bars, at most every ten seconds."""
        if not sys.stderr.isatty() and time.monotonic() - self.last >= _EVERY:
            self.last = time.monotonic()
            self.tell(text)

    def step(self, row: dict[str, Any]) -> None:
        """Log a training step: its numbers go to TensorBoard under `train/`."""
        self._row("train", row)

    def evaluation(self, row: dict[str, Any], found: "Evaluation") -> None:
        """Log an evaluation: metrics go to TensorBoard under `val/`, the layers' adaptivity under `adaptivity/`.

        After training has started, warns of blind or saturated generators, of each once and of all together in one line.
        """
        layers = [layer.to_dict() for layer in found.layers]
        self._row("val", row["metrics"] | {"step": row["step"]}, row | ({"layers": layers} if layers else {}))
        new = [seen for seen in found.layers if row["step"] and seen.name not in self.complained and seen.complaint()]
        if (told := complaints(new)) is not None:
            self.complained |= {seen.name for seen in new}
            self.tell(told)
        if self.board is None:
            return
        with self._board_kept():
            for layer in layers:
                for what in ("content", "saturated", "distance"):
                    if layer[what] is not None:
                        self.board.add_scalar(f"adaptivity/{layer['name']}/{what}", layer[what], row["step"])
            if found.picture is not None:
                pixels = np.asarray(found.picture.convert("RGB"))
                self.board.add_image("val/samples", pixels, row["step"], dataformats="HWC")

    def event(self, row: dict[str, Any]) -> None:
        """Log an unusual event (a rollback) in `log.jsonl` only."""
        self._add(row)

    def hparams(self, options: dict[str, Any], metrics: dict[str, float]) -> None:
        """Log the options with the final metrics, for TensorBoard's table of runs."""
        if self.board is None:
            return
        from torch.utils.tensorboard.summary import hparams

        values = {name: value for name, value in options.items() if isinstance(value, bool | int | float | str)}
        with self._board_kept():
            for summary in hparams(values, {f"final/{name}": value for name, value in metrics.items()}):
                self.board.file_writer.add_summary(summary)
            for name, value in metrics.items():
                self.board.add_scalar(f"final/{name}", value)

    def _row(self, prefix: str, numbers: dict[str, Any], row: dict[str, Any] | None = None) -> None:
        self._add(row or numbers)
        if self.board is not None:
            with self._board_kept():
                for name, value in numbers.items():
                    if name != "step" and isinstance(value, int | float):
                        self.board.add_scalar(f"{prefix}/{name}", value, numbers["step"])

    # A log that cannot be written (a full disk) does not end training: one warning, and the run continues without it.

    def _add(self, row: dict[str, Any]) -> None:
        if self.log is None:
            return
        try:
            self.log.add(row)
        except OSError as error:
            if not self.failing:
                logger.warning("cannot write %s: %s; rows are lost", self.log.file, error.strerror or error)
            self.failing = True

    @contextmanager
    def _board_kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.warning("TensorBoard's files cannot be written any more: %s", error.strerror or error)
            self.board = None
