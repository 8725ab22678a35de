"""Output of the commands: progress on stderr, and plain text on stdout."""

import os
import shutil
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from surgeon.util.tables import error, paragraph, table
from surgeon.util.waiting import longer

if TYPE_CHECKING:
    from surgeon.sites.sites import ConvSite
    from surgeon.surgery.verify import Verification

_FIRST = 2.0  # seconds before the first line if stderr is not a terminal


def width() -> int:
    """Columns for a table: the terminal's, or 80 in a pipe; `COLUMNS` overrides."""
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return max(shutil.get_terminal_size((80, 24)).columns, 60)
    return 80


class Progress:
    """A callable `(stage, done, total)` that shows progress on stderr: bars on a terminal, otherwise lines at growing intervals."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self._terminal = False
        self._bar: Any = None  # of the stage on a terminal
        self._drawing = threading.Lock()
        self._last, self._pause = time.monotonic(), _FIRST  # of the lines, if stderr is not a terminal
        self._stage = ""  # last one reported there, with what is done of it
        self._name, self._done, self._began = "", 0, self._last  # of the stage; when it was first reported
        self._ended = threading.Event()
        self._beat: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self.enabled:
            self._terminal = sys.stderr.isatty()
            self._last = time.monotonic()
            self._beat = threading.Thread(target=self._tick if self._terminal else self._tell_of_waits, daemon=True)
            self._beat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._beat is not None:
            self._ended.set()
            self._beat.join()
        self._close()

    def _tick(self) -> None:
        """Keep the clock of the bar running."""
        while not self._ended.wait(0.5):
            with self._drawing:
                if self._bar is not None:
                    self._bar.refresh()

    def _tell_of_waits(self) -> None:
        """A line for a stage that reports nothing for long."""
        stage, since = "", time.monotonic()
        while not self._ended.wait(0.25):
            now = time.monotonic()
            if self._stage != stage:
                stage, since = self._stage, now
            elif stage and now - since >= _FIRST:
                self._tell(stage)

    def _tell(self, text: str) -> None:
        """Print a line after two seconds, another ten later, and then after twice as long each time, up to a minute.

        The seconds are those of the whole stage.
        """
        with self._drawing:
            now = time.monotonic()
            if self.enabled and now - self._last >= self._pause:
                self._last, self._pause = now, longer(self._pause)
                print(f"surgeon: {text}, {now - self._began:.0f} s so far", file=sys.stderr, flush=True)

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._terminal:
            self._show(stage, done, total)
            return
        if stage != self._name or done < self._done:
            self._name, self._began = stage, time.monotonic()
        self._done = done
        self._stage = f"{stage} {done}/{total}" if total > 1 else stage
        self._tell(self._stage)

    def _show(self, stage: str, done: int, total: int) -> None:
        """Advance the bar, or replace that of an earlier stage."""
        from tqdm import tqdm

        with self._drawing:
            if self._bar is None or self._bar.desc != stage:
                self._close()
                shape = "{desc:>8} |{bar}| {n_fmt}/{total_fmt} [{elapsed}]"
                self._bar = tqdm(desc=stage, total=total, file=sys.stderr, leave=False, bar_format=shape)
            self._bar.total, self._bar.n = total, done
            self._bar.refresh()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


# --- inspect ------------------------------------------------------------------------------------------------------


def inspection_values(sites: "list[ConvSite]") -> list[dict[str, Any]]:
    """Every convolution as JSON values, with the types that it can become, and for each of the others the reasons against it."""
    from surgeon.surgery.inspection import activation_bytes
    from surgeon.surgery.plan import can_become

    values = []
    for site in sites:
        against = can_become(site)
        why_not = {name: reasons for name, reasons in against.items() if reasons}
        possible = {"can_become": [name for name in against if name not in why_not], "why_not": why_not}
        values.append(site.to_dict() | {"activation_bytes": activation_bytes(site)} | possible)
    return values


# --- verify -------------------------------------------------------------------------------------------------------


def verification_values(result: "Verification") -> dict[str, Any]:
    """A verification as JSON values."""
    return {
        "equal": result.exact,
        "max_rel_error": result.max_rel_error,
        "max_abs_error": result.max_abs_error,
        "precision": result.precision,
        "layers": {
            name: {"max_rel_error": found.max_rel, "max_abs_error": found.max_abs}
            for name, found in result.layers.items()
        },
        "notes": result.notes,
    }


def verification_text(result: "Verification", run: str, width: int) -> str:
    """The output of `surgeon verify`."""
    verdict = "computes what the original computes" if result.exact else "is NOT equal to the original (compressed)"
    rows = [(name, error(found.max_rel), error(found.max_abs)) for name, found in result.layers.items()]
    lines = [
        paragraph(f"{run} {verdict}", width=width),
        f"error  {error(result.max_rel_error)} relative, {error(result.max_abs_error)} absolute ({result.precision})",
        *(paragraph(f"note: {note}", width=width, hang="  ") for note in result.notes),
    ]
    return "\n\n".join(["\n".join(lines), table(("layer", "relative", "absolute"), rows, width=width)]) + "\n"
