"""What the commands print: progress on stderr, and plain text for people on stdout."""

import os
import shutil
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_EVERY = 2.0  # seconds between two lines where stderr is no terminal


def width() -> int:
    """Columns for a table: those of the terminal, 80 in a pipe; `COLUMNS` overrides."""
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return max(shutil.get_terminal_size((80, 24)).columns, 60)
    return 80


class Progress:
    """A callable `(stage, done, total)` that shows on stderr how far the work is: bars on a terminal, else a line now and then."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self._bar: RichProgress | None = None
        self._tasks: dict[str, Any] = {}
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        if self.enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            columns = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._bar is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bar.add_task(stage, total=total)
            self._bar.update(self._tasks[stage], completed=done, total=total)
        elif self.enabled and time.monotonic() - self._last >= _EVERY:
            self._last = time.monotonic()
            print(f"surgeon: {stage} {done}/{total}", file=sys.stderr, flush=True)
