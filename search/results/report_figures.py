"""The figures of a search's page: each with a heading and a sentence on how to read it."""

import statistics
from collections.abc import Mapping

from surgeon.search.gains.gain import GainTable
from surgeon.search.results import figures
from surgeon.search.results.summary import rank_correlation, relative
from surgeon.search.study.folder import Finished
from surgeon.search.study.record import Record
from surgeon.util import pages


def placed(placement: Mapping[str, str]) -> str:
    """A placement in words."""
    return ", ".join(f"{layer} → {label}" for layer, label in placement.items()) or "the unmodified model"


def told(found: Finished, one: Record) -> str:
    """Tooltip of a trial."""
    primary = found.about["task"]["primary"]
    costs = f"{relative(found, one, 'flops')} FLOPs, {relative(found, one, 'params')} parameters"
    return f"trial {one.number} ({one.source}): {primary} {_value(found, one):.5g}, {costs}\n{placed(one.placement)}"


def _value(found: Finished, one: Record) -> float:
    value = found.value(one)
    assert value is not None
    return value


def _primary(found: Finished) -> str:
    return str(found.about["task"]["primary"])


def front(found: Finished) -> str:
    """Value against FLOPs."""
    done = [one for one in found.ranked() if "traced" in one.attributes]
    base = found.about["original"]["flops"]
    sources = list(dict.fromkeys(str(one.source) for one in done))
    marks = [
        pages.Mark(
            x=100 * (one.attributes["traced"]["flops"] / base - 1),
            y=_value(found, one),
            told=told(found, one),
            group=sources.index(str(one.source)),
        )
        for one in done
    ]
    best = figures.front([(mark.x, mark.y) for mark in marks], higher=found.higher_is_better)
    drawn = pages.chart(
        marks,
        across="FLOPs relative to the original",
        up=_primary(found),
        groups=sources,
        lines=[(best, 7)],
        percent=True,
    )
    way = "higher" if found.higher_is_better else "lower"
    sentence = f"A point is a trial, {way} is better; the line joins those that none beats at their cost. Click one to keep it."
    return pages.section("What a placement brings, and what it costs", sentence, drawn)


def finals(found: Finished) -> str:
    """The arms of the final stage."""
    arms = [arm for arm in (found.finals or {"arms": []})["arms"] if arm["values"]]
    marks, several = [], any(len(arm["values"]) > 1 for arm in arms)
    for place, arm in enumerate(arms):
        mean = statistics.fmean(arm["values"])
        ends = {}
        if len(arm["values"]) > 1:
            spread = statistics.stdev(arm["values"])
            ends = {"low": mean - spread, "high": mean + spread}
        values = ", ".join(f"{value:.5g}" for value in arm["values"])
        shown = f"{arm['role']}, trial {arm['trial']}: {mean:.5g} (seeds: {values})\n{placed(arm['placement'])}"
        marks.append(pages.Mark(x=place, y=mean, told=shown, group=place, **ends))
        marks += [
            pages.Mark(x=place + 0.15, y=value, told=f"{arm['role']}, seed {seed}: {value:.5g}", group=7)
            for seed, value in enumerate(arm["values"] if several else ())
        ]
    names = [f"{arm['role']} {arm['trial']}" for arm in arms]
    drawn = pages.chart(marks, across="arm and trial", up=_primary(found), names=names)
    sentence = (
        "Means with one standard deviation, and every seed in gray."
        if several
        else "One seed each: there is no spread to show."
    )
    return pages.section("The best again, in full", sentence, drawn)


def convergence(found: Finished, other: Finished | None) -> str:
    """Best so far by evaluation."""
    marks, lines, groups = [], [], []
    for group, search in enumerate([found] if other is None else [found, other]):
        curve = figures.best_so_far(search)
        groups.append(figures.searched(search, alone=other is None))
        lines.append(([(float(n), value) for n, value in enumerate(curve, start=1)], group))
        marks += [
            pages.Mark(x=n, y=value, told=f"{groups[group]}: {value:.5g} after {n} evaluations", group=group)
            for n, value in enumerate(curve, start=1)
        ]
    original = found.original()
    level = None if original is None else _value(found, original)
    curve = figures.best_so_far(found)
    flat = len(curve) > 1 and len(set(curve)) == 1
    sentence = "The best value after each evaluation; the dashed line is the unmodified model, trained equally."
    sentence += " It is flat: nothing after the first was better." if flat else ""
    drawn = pages.chart(marks, across="evaluations", up=_primary(found), groups=groups, lines=lines, level=level)
    return pages.section("How the search went on", sentence, drawn)


def expected(found: Finished) -> str:
    """The gain expected by the table against the measured value."""
    marks = [
        pages.Mark(x=float(one.attributes["gain"]), y=_value(found, one), told=told(found, one))
        for one in found.ranked()
        if "gain" in one.attributes
    ]
    rank = rank_correlation(found)
    drawn = pages.chart(marks, across=f"expected gain ({found.about['gains']})", up=_primary(found))
    known = "too few or equal values for a rank correlation" if rank is None else f"rank correlation {rank}"
    sentence = (
        f"Where the table of gains is a good guide, points rise from left to right if higher is better; here: {known}."
    )
    return pages.section("What was expected, and what came", sentence, drawn)


def budgets(found: Finished) -> str:
    """The share of each limit used by every trial."""
    limits = {name: limit for name, limit in found.about["limits"].items() if limit}
    marks = []
    for place, (name, limit) in enumerate(limits.items()):
        for one in found.records:
            cost = figures.cost(one, name)
            if cost is None:
                continue
            trained = ", not trained" if one.state == "refused" else ""
            shown = f"trial {one.number}: {100 * cost / limit:.1f} % of {name}{trained}"
            marks.append(pages.Mark(x=place, y=100 * cost / limit, told=shown, group=3 if cost > limit else 0))
        own = 100 * found.about["original"][name] / limit
        marks.append(pages.Mark(x=place - 0.15, y=own, told=f"the original: {own:.1f} % of {name}", group=7))
    drawn = pages.chart(marks, across="budget", up="used, %", level=100.0, names=list(limits))
    sentence = (
        "Gray is the original, blue are trials within this budget, red ones over it (above the dashed line). A trial over any "
        "of the budgets was not trained."
    )
    return pages.section("How much of the budgets was used", sentence, drawn)


def gains(table: GainTable) -> str:
    """A point per layer and option, with two standard errors."""
    marks = []
    for i, layer in enumerate(table.layers):
        for j, option in list(enumerate(table.options))[1:]:
            gain, error = float(table.gain[i, j]), float(table.error[i, j])
            if gain == 0 and error == 0:
                continue
            shown = f"{layer} → {option}: {gain:.3g} ± {error:.2g}"
            ends = {"low": gain - 2 * error, "high": gain + 2 * error}
            marks.append(pages.Mark(x=float(i), y=gain, told=shown, group=j - 1, **ends))
    unit = str(table.facts.get("unit", "gain"))
    drawn = pages.chart(marks, across="layer, from input to output", up=unit, groups=list(table.options)[1:], level=0.0)
    sentence = f"Estimated by {table.estimator}, ± two standard errors: bars across the dashed line say nothing."
    doubt = table.doubt()
    sentence += "" if doubt is None else f" {doubt[0].upper()}{doubt[1:]}."
    return pages.section("What each layer was expected to gain", sentence, drawn)


def placements(found: Finished) -> str:
    """Layers × trials, best trial first; the color is the option."""
    ranked, space = found.ranked(), found.space
    columns = [list(space.placement(one.placement)) for one in ranked]
    cells = [[int(column[row]) for column in columns] for row in range(len(space.layers))]
    shown = [told(found, one) for one in ranked]
    ends = [f"best: trial {ranked[0].number}", *(f"trial {one.number}" for one in ranked[1:])]
    drawn = pages.map_of(cells, space.layers, ends, space.labels, shown)
    sentence = (
        "A column is a trial, the best at the left; a color says what the layer became, gray is a kept convolution."
    )
    return pages.section("Which layers were replaced", sentence, drawn)
