"""A search to its end, and `surgeon study`: its status, page, figures and export."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from matplotlib.colors import to_rgba
from optuna.storages import JournalStorage

import surgeon
from surgeon.cli import main
from surgeon.errors import ConfigError
from surgeon.records.recipe import get_recipe
from surgeon.search.gains import method
from surgeon.search.results import figures, report_figures
from surgeon.search.results.report import sentences
from surgeon.search.results.summary import (
    RankCorrelation,
    as_good,
    few_samples,
    none_better,
    rank_correlation,
    status_lines,
    worse_than_start,
)
from surgeon.search.study.folder import Finished, read_search
from surgeon.search.study.journal import StudyJournal
from surgeon.surgery.rewrite import dynamic_layers
from tests.support.browser import chromium, installed
from tests.support.page_looks import check
from tests.support.search.tasks import FACTORY, document, search_arguments

pytestmark = pytest.mark.usefixtures("tiny_tasks")

Capture = pytest.CaptureFixture[str]


def test_a_search_from_beginning_to_end(capsys: Capture) -> None:
    assert main(search_arguments("s", "--trials", "5", "--max-flops", "+300%", "--finals", "1", "--seeds", "2")) == 0
    out, error = capsys.readouterr()
    assert re.search(r"trial 0: original, mse 0\.\d+ \(0\.\d+ before training\)", error)
    assert re.search(r"best so far 0\.\d+, trial \d; uses \d+% of --max-flops", error)
    assert re.search("finals 1/[23]: original", error)
    assert "written to  s" in out
    found = read_search("s")
    assert len({one.hash for one in found.records if one.counts}) == 5
    for one in found.records:
        if one.counts:
            assert one.attributes["traced"]["flops"] <= 4 * found.about["original"]["flops"]
    study = optuna.load_study(study_name="search", storage=JournalStorage(StudyJournal(found.folder.study)))
    assert len(study.trials) == len(found.records)
    assert study.direction == optuna.study.StudyDirection.MINIMIZE
    assert found.finals is not None
    roles = [arm["role"] for arm in found.finals["arms"]]
    assert roles[:2] == ["original", "found"]
    assert all(len(arm["values"]) == 2 for arm in found.finals["arms"])
    for arm in found.finals["arms"]:
        assert arm["values"][0] != arm["values"][1]  # seeds differ

    assert main(["study", "status", "s", "--json"]) == 0
    status = document(capsys)
    assert status["trials"]["complete"] + status["trials"].get("pruned", 0) >= 5
    assert status["original"]["placement"] == {}
    assert status["workers"] == 0
    _check_start(found, status["start"])

    assert main(["study", "best", "s", "--count", "2", "--json"]) == 0
    best = document(capsys)
    assert best[0]["value"] <= best[1]["value"]  # an error: less is better

    _check_report(capsys)
    _check_export(found.finals, capsys)


def test_unfinished_finals_compare_nothing(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """One arm of two was told as the result, with the advice to begin finals."""
    finals = ["--trials", "2", "--no-pruning", "--finals", "1", "--seeds", "2", "--final-rung", "0"]
    seen: list[tuple[str, list[str], list[str]]] = []
    monkeypatch.setattr("surgeon.search.evaluate.finals._arm", looking(seen))
    assert main(search_arguments("s", *finals, "--quiet")) == 0
    (first, *_), (second, words, _) = seen
    assert re.search(r"original +0 +0 +not done yet +-\nfound +\d +\d +not done yet", first)
    assert re.search(r"original +0 +0 +0\.\d+ +\S+\nfound +\d +\d +not done yet", second)
    for told, done in ((first, 0), (second, 1)):
        note = f"note: {done} of 2 finals done: they compare once all are; if they were interrupted, --resume continues them"
        assert note in " ".join(told.split())
        assert "all finals end" not in told
    assert words[0].startswith("The best placement (")
    assert "reached mse" in words[0], "that of the trials"
    assert "--finals trains" not in " ".join(words)
    assert any(told.startswith("1 of 2 finals done: ") for told in words)
    assert any(told.startswith("1 of 2 finals done: ") for told in seen[1][2])
    found = read_search("s")
    assert "not done yet" not in "\n".join(status_lines(found))
    assert "than the unmodified model trained equally: gain " in sentences(found)[0]
    assert main(search_arguments("s", *finals, "--resume", "--quiet")) == 0
    assert "not done yet" not in seen[2][0], "what is on disk counts from the beginning"
    assert read_search("s").finals == found.finals


def looking(seen: list[tuple[str, list[str], list[str]]]) -> Any:
    """Like `_arm`, but it looks at the search first: its status, its page, and what an export would warn of."""
    from surgeon.commands.search.study import _export_warnings, _source
    from surgeon.search.evaluate.finals import _arm

    def arm(*args: Any) -> Any:
        found = read_search("s")
        warnings = _export_warnings(found, _source(found)[1])
        seen.append(("\n".join(status_lines(found)), sentences(found), warnings))
        return _arm(*args)

    return arm


@pytest.mark.parametrize("storage", [[], ["--storage", "sqlite:///study.db"]])
def test_a_search_can_be_looked_at_while_gains_are_estimated(
    storage: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was said to be no search."""
    told: list[str] = []

    def gains(*args: Any, **options: Any) -> Any:
        assert main(["study", "status", "s"]) == 0
        told.append(" ".join(capsys.readouterr().out.split()))
        assert main(["study", "status", "s", "--json"]) == 0
        assert document(capsys)["begun"] is False
        assert main(["study", "best", "s"]) == 1
        assert "no trial of s is complete yet" in capsys.readouterr().err
        assert main(["study", "report", "s", "--quiet"]) == 2
        assert "no trial of s is complete yet" in capsys.readouterr().err
        if len(told) == 3:
            return estimate(*args, **options)
        kept.write_text(Path("s/search.json").read_text())
        raise KeyboardInterrupt if len(told) == 1 else ConfigError("enough")

    kept, estimate = Path("kept.json"), method.gains_of
    monkeypatch.setattr(method, "gains_of", gains)
    arguments = search_arguments("s", "--trials", "1", "--max-flops", "+300%", "--quiet", *storage)
    assert main(arguments) == 130
    assert not Path("s").exists(), "nothing remains of a search that did not begin"
    assert main(arguments) == 2
    assert not Path("s").exists()
    note = "trials: none yet note: what each replacement gains is estimated before the first trial; if that was killed"
    assert all(note in one for one in told)
    Path("s").mkdir()
    kept.replace("s/search.json")  # as after kill -9
    assert main([*arguments, "--resume"]) == 2, "there is nothing to resume"
    capsys.readouterr()
    assert main(arguments) == 0
    assert "estimated" not in capsys.readouterr().out


def test_ranks_are_told_with_ties_and_error() -> None:
    for value, decided in ((0.6, False), (1.0, True)):
        told = str(RankCorrelation(value=value, error=0.35, trials=9, tied=4))
        assert told == f"{value:.2f} ± 0.35 (9 trials, 4 with tied values){'' if decided else ': undecided'}"
    assert str(RankCorrelation(value=-0.9, error=0.4, trials=7, tied=0)) == "-0.90 ± 0.40 (7 trials)"


def _check_start(found: Finished, start: float) -> None:
    """What the network was before any training is told, and whether all trainings made it worse."""
    assert re.search(rf"^-      untrained +{start:.5g} +0 +\+0\.0%", "\n".join(status_lines(found)), re.MULTILINE)
    assert "the network as it was" not in "\n".join(status_lines(found)), "some got better"
    note = "only 5 samples judge: the order of trials says little of other images; a larger val/ tells more"
    assert f"note: {note}" in " ".join("\n".join(status_lines(found)).split())
    assert f"{note.capitalize()}." in sentences(found)
    many = replace(found, about={**found.about, "task": found.about["task"] | {"val_samples": 20}})
    assert "judge" not in "\n".join(status_lines(many))

    def started_at(start: dict[str, float]) -> Finished:
        rest = [{key: value for key, value in one.attributes.items() if key != "start"} for one in found.records]
        records = [replace(one, attributes=old | start) for one, old in zip(found.records, rest, strict=True)]
        return replace(found, records=records, finals=None)

    worse = started_at({"start": 1e-6})
    told = " ".join("\n".join(status_lines(worse)).split())
    assert "note: all trials end above the network as it was (mse 1e-06)" in told
    assert "Longer --steps, a smaller --lr" in told
    assert "All trials end above the network as it was (mse 1e-06)" in " ".join(sentences(worse))
    assert "all finals end above" in " ".join(worse_than_start(replace(worse, finals=found.finals)).split()[:4])
    ended = replace(found, finals=None)
    assert sentences(ended)[0].startswith("The best placement (")
    assert sentences(replace(ended, alive=frozenset({"worker"})))[0].startswith("The best placement so far (")
    for plain, other in ((0.1, 0.2), (0.2, 0.1)):
        values = [replace(one, values=one.values and (other if one.placement else plain,)) for one in found.records]
        told = none_better(replace(ended, records=values))
        assert told == ("no placement is better than the unmodified model trained equally" if plain < other else None)
    tie = replace(
        found, records=[replace(one, values=one.values and (0.5,) * len(one.values)) for one in found.records]
    )
    alike = f"{len(tie.ranked())} trials have the same value: trainings are too short, or the metric too coarse, to tell them apart"
    assert f"note: all {alike}" in " ".join("\n".join(status_lines(tie)).split())
    assert f"All {alike}." in sentences(tie)
    assert "the same value" not in "\n".join([*status_lines(found), *sentences(found)])
    by_best = replace(found, records=[replace(one, values=one.values and (0.5,)) for one in found.records[:2]])
    other = replace(found.records[1], number=7, hash="other", values=(0.7,))
    first, second = (one.number for one in by_best.ranked())
    same = f"trial {second} reached mse 0.5, too: fewer FLOPs, then less memory decides"
    assert (as_good(replace(by_best, records=[*by_best.records, other])), first) == (same, 0)
    assert as_good(by_best) is None, "all are tied, which another note tells"
    counts = {"primary": "top1", "val_samples": 48}
    assert few_samples(replace(found, about={**found.about, "task": found.about["task"] | counts})) == (
        "only 48 samples judge: each is 2.1 points of top1, and the order of trials says little of other images; a larger "
        "val/ tells more"
    )
    assert rank_correlation(tie) is None
    older = started_at({})
    assert older.start() is None
    assert "untrained" not in "\n".join(status_lines(older))


def _check_report(capsys: Capture) -> None:
    assert main(["study", "report", "s", "--json"]) == 0
    page = Path(document(capsys)["report"])
    text = page.read_text()
    random = any(arm["role"] == "random" for arm in read_search("s").finals["arms"])
    assert f"against the unmodified model{' and a random placement' * random}." in text
    assert "this search (--sampler posterior)" in text
    names = {"pareto", "placements", "expected", "budgets", "convergence", "finals", "gains"}
    assert {path.stem for path in page.parent.glob("*.png")} == names
    assert text.count("<figure") == len(names)
    assert not re.search(r'(src|href)="|https?:', text)  # nothing beside it is needed
    assert "than the unmodified model trained equally: gain " in text
    assert re.search(r"mse before any step</td><td[^>]*>0\.\d+<", text)
    assert "not settled to be better or worse" in text  # two seeds settle nothing
    found = read_search("s")
    for one in found.ranked():
        assert f'data-tip="trial {one.number} (' in text, "every trial can be pointed at"
    _check_figures(found)
    assert text.count("<h2>") == len(names) + 3
    assert 'name="viewport"' in text
    assert "prefers-color-scheme:dark" in text
    if installed() is not None:  # tests/surgeon/util/test_browser.py says so where there is none
        with chromium() as browser:
            check(browser, page)


def _check_figures(found: Finished) -> None:
    """A trial over one budget is red there alone, and the last value is inside the picture."""
    first = next(one for one in found.ranked() if one.placement)
    traced = first.attributes["traced"]
    over = {**traced, "flops": 1, "needed": 99 * found.about["original"]["memory"]}
    refused = replace(first, state="refused", attributes={**first.attributes, "traced": over})
    limits = {"flops": 99 * traced["flops"], "memory": 9 * found.about["original"]["memory"]}
    tight = replace(
        found,
        about={**found.about, "limits": limits},
        records=[refused if one is first else one for one in found.records],
    )
    (axes,) = figures.budget_figure(tight).axes
    red = [
        to_rgba(figures.COLOURS[3], 0.6) == tuple(color) for row in axes.collections for color in row.get_facecolors()
    ]
    rows = [len(row.get_offsets()) for row in axes.collections]
    assert len(rows) == 2
    assert (sum(red[: rows[0]]), sum(red[rows[0] :])) == (0, 1)
    assert report_figures.budgets(tight).count('fill="var(--c3)"') == 1
    assert report_figures.budgets(tight).count(", not trained") == 2
    (axes,) = figures.convergence(found).axes
    curve = figures.best_so_far(found)
    assert list(axes.lines[0].get_xdata()) == [*range(1, len(curve) + 1), len(curve) + 0.5]
    assert list(axes.lines[0].get_ydata()) == [*curve, curve[-1]]


def _check_export(finals: Any, capsys: Capture) -> None:
    assert main(["study", "export", "s", "-o", "out", "--json"]) == 0
    told = document(capsys)
    assert told["stage"] == "finals"
    arm = next(arm for arm in finals["arms"] if arm["hash"] == told["hash"])
    model = surgeon.load("out", trust_factory=True)
    assert list(dynamic_layers(model)) == list(arm["placement"])
    recipe = get_recipe(model)
    assert recipe is not None
    assert recipe.task is not None
    assert recipe.task.steps == finals["steps"], "finetune tells of these"
    again = ["evaluate", "out", "--task", "tiny-regression", "--trust-factory", "--json"]
    assert main(again) == 0
    assert document(capsys)["metrics"]["mse"] == pytest.approx(arm["values"][0], rel=1e-4)
    assert main(["convert", FACTORY, "--recipe", "out/recipe.json", "--input-size", "8", "-o", "again", "--quiet"]) == 0
    fresh = surgeon.load("again", trust_factory=True)
    assert fresh.state_dict().keys() == model.state_dict().keys()
    assert main(["study", "export", "s", "-o", "out"]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["study", "export", "s", "-o", "out", "--force", "--quiet"]) == 0
    _check_numbers_that_hardly_differ(capsys)


def _check_numbers_that_hardly_differ(capsys: Capture) -> None:
    """The last check: it changes the finals."""
    file, words = Path("s/finals/finals.json"), "surgeon: WARNING: the unmodified model, trained equally, is "
    for worse, told in (
        (0.28319472, "better: 0.2831946 against 0.2831947"),
        (0.28319458, "as good: 0.28319 against 0.28319"),
    ):
        _set_finals(file, [0.28319458], [worse])
        assert main(["study", "export", "s", "-o", "out", "--force"]) == 0
        first, second = capsys.readouterr().err.splitlines()
        assert first == f"{words}{told}"
        assert second.startswith("surgeon: WARNING: all finals end above the network as it was (mse 0."), (
            "as in the report"
        )
    _set_finals(file, [0.04, 0.05], [0.02, 0.04])
    assert main(["study", "export", "s", "-o", "out", "--force"]) == 0
    out, error = capsys.readouterr()
    undecided = "not settled to be better than the unmodified model, trained equally: gain +0.0150 ± 0.0050 (2 seeds)"
    assert error == f"surgeon: WARNING: {undecided}\n"
    value, weights = "mse 0.03 (finals, mean of 2 seeds), the unmodified model 0.045", "one seed of 2: mse 0.02"
    assert re.fullmatch(rf"\d layers?, {re.escape(value)}", out.splitlines()[0])
    assert f"\nweights     those of {weights}\n" in out
    card = Path("out/README.md").read_text()
    assert f"\n## How it was found\n\n- the best placement of a search: {value}\n" in card
    assert f"\n- its weights are those of {weights}; the scores above are of that seed alone\n" in card
    assert "\n## Cost\n" in card
    _set_finals(file, [0.04, 0.05, 0.06], [0.02, 0.03, 0.041])
    assert main(["study", "export", "s", "-o", "out", "--force"]) == 0
    assert capsys.readouterr().err == "", "three seeds settle it"
    file.unlink()
    assert main(["study", "export", "s", "-o", "out", "--force"]) == 0
    out, error = capsys.readouterr()
    if "is better" not in error:
        assert error.startswith("surgeon: WARNING: one short training, the best of many: ")
    assert "weights" not in out
    assert "\n- the best placement of a search: mse 0." in Path("out/README.md").read_text()


def _set_finals(file: Path, original: list[float], others: list[float]) -> None:
    table = json.loads(file.read_text())
    for arm in table["arms"]:
        arm["values"] = original if arm["role"] == "original" else others
    file.write_text(json.dumps(table))


def test_what_is_no_search(capsys: Capture) -> None:
    Path("empty").mkdir()
    for action in ("status", "best", "report", "export"):
        assert main(["study", action, "empty"]) == 2
        assert "there is no search in empty" in capsys.readouterr().err
