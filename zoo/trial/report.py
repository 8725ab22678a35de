"""The report page of a trial: the answer first, then the evidence."""

import statistics
from html import escape
from pathlib import Path

from surgeon.errors import CheckpointError
from surgeon.util import pages
from surgeon.util.files import filling
from surgeon.util.tables import count, duration
from surgeon.zoo.trial.answer import ARMS, LEAST_SEEDS, Answer, how, with_error


def write_report(answer: Answer, folder: Path, go_on: str, resume: str) -> Path:
    """Write `report.html` into the folder; returns its path. Raises `CheckpointError`.

    `go_on` is the command that trains the converted network further, `resume` the one that trains more seeds.
    """
    title = f"{answer.model} on {answer.task}: does the conversion pay?"
    body = [
        f"<h1>{escape(title)}</h1>",
        pages.paragraph(_upper(answer.sentence()) + ".", "lead"),
        pages.paragraph(answer.meaning()),
        pages.section(
            "What it costs",
            "FLOPs are for one image; time is the median of steps of both, timed in turn before the runs.",
            _costs(answer),
        ),
        pages.grid(_figures(answer)),
        pages.section("How it was compared", "", "".join(pages.paragraph(line) for line in how(answer))),
    ]
    if answer.notes:
        body.append(pages.section("Notes", "", "".join(pages.paragraph(note) for note in answer.notes)))
    steps = [("More seeds, which take more time:", resume)]
    if answer.scores["converted"]:
        steps.append(("Or train the converted network further:", go_on))
    told = "".join(pages.paragraph(what) + f"<pre>{escape(command)}</pre>" for what, command in steps)
    body.append(pages.section("Next step", "", told))
    with filling(folder, CheckpointError) as fresh:
        (fresh / "report.html").write_text(pages.page(title, body), encoding="utf-8")
    return folder / "report.html"


def _figures(answer: Answer) -> list[str]:
    """Those that show something: there is nothing to compare in one rate."""
    several = len({rate for swept in answer.swept.values() for rate in swept}) > 1
    return [
        _differences(answer),
        *([_rates(answer)] if several else []),
        *([_adaptive(answer)] if answer.layers else []),
    ]


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _costs(answer: Answer) -> str:
    lines = []
    for told, what in (("FLOPs", "flops"), ("parameters", "params"), ("time of a training step", "step_seconds")):
        values = [getattr(answer.costs[arm], what) for arm in ARMS]
        shown = [duration(value) if what == "step_seconds" else count(value) for value in values]
        factor = answer.factor(what)
        lines.append([told, *shown, "-" if factor is None else f"x{factor:.2f}"])
    return pages.rows(["", *ARMS, ""], lines)


def _differences(answer: Answer) -> str:
    """Every seed, and the mean with two standard errors."""
    marks = []
    for place, (seed, gain) in enumerate(zip(answer.seeds, answer.gains, strict=True)):
        scores = ", ".join(f"{arm} {answer.scores[arm][place]:.5g}" for arm in ARMS)
        marks.append(
            pages.Mark(x=place, y=gain, told=f"seed {seed}: {gain:+.3g} {answer.unit}\n{answer.primary}: {scores}")
        )
    names = [f"seed {seed}" for seed in answer.seeds]
    if answer.gain is not None:
        spread = 2 * (answer.error or 0.0)
        told = f"mean of {len(answer.gains)}: {with_error(answer.gain, spread)} {answer.unit} (two standard errors)"
        ends = {} if answer.error is None else {"low": answer.gain - spread, "high": answer.gain + spread}
        marks.append(pages.Mark(x=len(names), y=answer.gain, told=told, group=1, **ends))
        names.append("mean")
    drawn = pages.chart(
        marks,
        across="",
        up=f"gain, {answer.unit}",
        groups=["a seed", "mean ± 2 standard errors"],
        level=0.0,
        names=names,
    )
    sentence = (
        "Every point is converted minus original for one seed. A bar that does not touch the dashed line is an answer, "
        f"if it is the mean of {LEAST_SEEDS} seeds or more."
    )
    return pages.section("Converted against original, seed by seed", sentence, drawn)


def _rates(answer: Answer) -> str:
    marks, lines = [], []
    for group, arm in enumerate(ARMS):
        known = [(float(rate), value) for rate, value in answer.swept[arm].items() if value is not None]
        lines.append((known, group))
        chosen = answer.rates.get(arm)
        for rate, value in known:
            told = f"{arm}, rate {rate:g}: {answer.primary} {value:.5g}" + (" (taken)" if rate == chosen else "")
            marks.append(pages.Mark(x=rate, y=value, told=told, group=group))
    sentence = "Each network is trained at each rate once and keeps the best; a best one at the edge may not be the best there is."
    drawn = pages.chart(marks, across="learning rate", up=answer.primary, groups=ARMS, lines=lines, log=True)
    return pages.section("Learning rates that were tried", sentence, drawn)


def _adaptive(answer: Answer) -> str:
    known = [layer for layer in answer.layers if layer["distance"] is not None]
    marks = [
        pages.Mark(
            x=place, y=layer["distance"], told=f"{layer['name']} ({layer['type']}): distance {layer['distance']:.3f}"
        )
        for place, layer in enumerate(known)
    ]
    mean = statistics.fmean(layer["distance"] for layer in known) if known else None
    sentence = (
        "1 - cos of the codes of two pixels: at 0 a layer uses one filter everywhere, and surgeon collapse folds it."
    )
    told = "layer, from input to output" + ("" if mean is None else f" (mean {mean:.2g})")
    drawn = pages.chart(marks, across=told, up="distance", level=0.0)
    return pages.section("How far the new layers adapt", sentence, drawn)
