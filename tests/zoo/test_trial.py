"""A trial: its verdict, its plan of time, and its page."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from surgeon.errors import ConfigError
from surgeon.zoo.trial import standard_error, verdict
from surgeon.zoo.trial.parts import part_of, spread
from surgeon.zoo.trial.plan import make_plan, time_to_judge
from surgeon.zoo.trial.report import write_report
from surgeon.zoo.trial.speed import Levers, Speed
from tests.support.answers import make_answer
from tests.support.training.tasks import TinyConfig, TinyRegression

# --- what came out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([0.4, 0.5, 0.45], "won"),
        ([-0.4, -0.5, -0.45], "lost"),
        ([0.4, 0.5], "undecided"),
        ([0.4, -0.5, 0.3], "undecided"),
        ([0.0, 0.0, 0.0], "undecided"),
        ([], "undecided"),
    ],
)
def test_a_verdict_takes_three_seeds_and_two_standard_errors(gains: list[float], expected: str) -> None:
    assert verdict(gains) == expected


def test_the_standard_error_is_that_of_the_mean() -> None:
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / 3**0.5)
    assert standard_error([1.0]) is None


def test_the_answer_in_a_sentence() -> None:
    won = make_answer([0.5, 0.51, 0.52], [0.504, 0.5145, 0.525])
    assert won.sentence() == "gain +0.450 ± 0.029 points of top-1 (3 seeds), costs x1.08 FLOPs, x1.4 time a step"
    assert (
        make_answer([0.5] * 3, [0.49, 0.491, 0.492])
        .sentence()
        .startswith("loss -0.900 ± 0.058 points of top-1 (3 seeds)")
    )
    none = make_answer([0.5] * 3, [0.501, 0.499, 0.5])
    assert none.sentence().startswith("no gain seen beyond ± 0.12 points of top-1 (+0")
    assert (
        "undecided: +1 ± 0 points of top-1 with 2 seeds, an answer takes 3"
        in make_answer([0.5] * 2, [0.51] * 2).sentence()
    )
    tied = make_answer(
        [56 / 92, 57 / 92, 59 / 92], [57 / 92, 58 / 92, 60 / 92]
    )  # one more of 92, unequal in the last bit
    assert 0 < (tied.error or 0.0) < 1e-12
    assert tied.verdict == "undecided"
    assert "undecided: +1.09 points of top-1 with each of 3 seeds" in tied.sentence()
    assert "judging samples are too few to tell" in tied.sentence()
    assert "1 judging sample is too few" in replace(tied, samples=tied.samples | {"judge": 1}).sentence()
    assert "exceed by chance in 18 of 100 trials" in won.to_text(200)  # Student's t with two degrees of freedom
    assert "FLOPs: of one image of 3x8x8" in make_answer([0.5], [0.6], size=[3, 8, 8]).to_text()
    assert make_answer([], []).sentence().startswith("no answer: not one pair")
    cut = make_answer([0.5], [0.6], samples={"train": 8, "val": 5, "choose": 1, "judge": 1})
    assert "last weights on 1 sample of 5; 1 other chose the rates" in cut.to_text(200)
    perfect = make_answer([1.0] * 3, [1.0] * 3, samples={"train": 8, "val": 74, "choose": 2, "judge": 72})
    assert "+0 points of top-1 with each of 3 seeds; both are right on all 72 judging samples" in perfect.sentence()


@pytest.mark.parametrize(
    ("original", "converted", "told"),
    [
        ([0.5], [0.6], "Too few seeds to tell: an answer takes 3."),
        ([1.0] * 3, [1.0] * 3, "Nothing is left to gain on these images"),
        ([0.5] * 3, [0.6] * 3, "more judging images could tell"),
        ([0.5] * 3, [0.501, 0.499, 0.5], "No difference was seen beyond two standard errors"),
        ([0.5, 0.51, 0.52], [0.504, 0.5145, 0.525], "The converted network is better"),
    ],
)
def test_the_page_says_why_there_is_no_verdict(
    original: list[float], converted: list[float], told: str, tmp_path: Path
) -> None:
    """One seed has no standard error, and nothing was tested with it; of two perfect networks more training tells nothing."""
    answer = make_answer(original, converted)
    assert told in write_report(answer, tmp_path, "go on", "resume").read_text(encoding="utf-8")


def test_what_ends_below_its_start_is_seen() -> None:
    assert make_answer([0.5, 0.6], [0.5, 0.55], start=0.7).ends_below_start()
    assert re.search(r"^untrained +0\.7 ", make_answer([0.5], [0.5], start=0.7).to_text(), re.MULTILINE)
    assert not make_answer([0.5, 0.6], [0.5, 0.95], start=0.7).ends_below_start()
    assert make_answer([2.0], [3.0], start=1.0, primary="mae", higher_is_better=False).ends_below_start()
    assert not make_answer([0.5], [0.5]).ends_below_start()


@pytest.mark.parametrize("gain", [0.1, -0.1])
def test_nothing_is_decided_where_both_end_below_their_start(gain: float) -> None:
    original, converted = [0.5, 0.51, 0.52], [0.5 + gain, 0.511 + gain, 0.522 + gain]
    assert make_answer(original, converted).outcome == ("won" if gain > 0 else "lost")
    answer = make_answer(original, converted, start=0.9)
    assert answer.outcome == answer.to_dict()["verdict"] == "undecided"
    assert answer.sentence().startswith("undecided: both end worse than untrained, ")
    assert "made both networks worse" in answer.meaning()


def test_a_gain_is_positive_where_lower_is_better() -> None:
    answer = make_answer([3.0, 3.1, 3.2], [2.0, 2.2, 2.1], primary="mae", higher_is_better=False)
    assert answer.gains == pytest.approx([1.0, 0.9, 1.1])
    assert (answer.verdict, answer.unit) == ("won", "mae")


# --- the plan ---------------------------------------------------------------------------------------------------------

LENGTHS = {"train": 10000, "val": 100, "batch": 10}


def test_a_plan_fills_the_time_with_three_seeds() -> None:
    speed = Speed(step=0.1, sample=0.001, run=1.0)
    plan = make_plan(600, speed, **LENGTHS, rates=(1e-4, 3e-4, 1e-3))
    assert (len(plan.rates), plan.choose, plan.judge) == (3, 50, 50)
    taken = 5 * (plan.steps * 0.1 + 1.0 + 100 * 0.001)
    assert 0.85 * 600 < taken <= 0.9 * 600


def test_a_plan_is_no_longer_than_ten_epochs() -> None:
    assert make_plan(1e6, Speed(step=0.1, sample=0.001, run=1.0), **LENGTHS, rates=(1e-3,)).steps == 10000


def test_a_short_time_takes_the_sweep_first_and_then_the_answer() -> None:
    plan = make_plan(100, Speed(step=1.0, sample=0.0, run=1.0), **LENGTHS, rates=(1e-4, 3e-4, 1e-3))
    assert (plan.rates, plan.choose, plan.judge) == ((3e-4,), 0, 100)
    short = make_plan(60, Speed(step=1.0, sample=0.0, run=1.0), **LENGTHS, rates=(1e-4, 3e-4, 1e-3))
    assert (short.rates, short.steps) == ((3e-4,), 17)  # fewer than asked for rather than none
    levers = Levers(batch=32, size=(3, 224, 224), option="input_size", spent=100.0)
    given = "give --max-time 3m, or --batch-size 8, or --task-option input_size=3,128,128"
    with pytest.raises(
        ConfigError, match=rf"leaves 20 s for training, and 3 seeds of 8 steps .* take about 38 s: {given}$"
    ):
        make_plan(20, Speed(step=1.0, sample=0.0, run=1.0), **LENGTHS, rates=(1e-3,), levers=levers)


def test_given_steps_are_planned_only_if_a_pair_of_them_fits() -> None:
    """The sweep is dropped for three pairs, then pairs are, down to one."""
    speed = Speed(step=1.0, sample=0.01, run=1.0)
    planned = partial(make_plan, speed=speed, **LENGTHS, rates=(1e-4, 3e-4, 1e-3), steps=20)
    assert planned(200).rates == (1e-4, 3e-4, 1e-3)
    for seconds in (30, 90):
        plan = planned(seconds)
        assert (plan.steps, plan.rates, plan.choose, plan.judge) == (20, (3e-4,), 0, 100)
    levers = Levers(batch=4, size=(8,), option=None, steps=20)
    with pytest.raises(ConfigError, match=r"3 seeds of 20 steps .* take about 88 s: give --max-time 2m$"):
        planned(20, levers=levers)
    assert levers.told(60.0, 88.0) == "--max-time 2m, or --steps 10, or --batch-size 2"


def test_levers_are_values_that_suffice() -> None:
    """With a quarter to spare."""
    levers = Levers(batch=8, size=(3, 96, 96), option="patch", spent=0.0)
    assert levers.told(100.0, 200.0) == "--max-time 5m, or --batch-size 2, or --task-option patch=56"
    assert levers.told(10.0, 9000.0) == "--max-time 3.5h"
    assert levers.told(10.0, 65.0) == "--max-time 2m, or --task-option patch=32"
    assert levers.told(10.0, 100.0) == "--max-time 3m, or --batch-size 2 with --task-option patch=48"


def test_slow_evaluations_are_of_fewer_samples() -> None:
    plan = make_plan(600, Speed(step=0.1, sample=1.0, run=0.0), **LENGTHS, rates=(1e-4, 3e-4, 1e-3))
    assert plan.choose == plan.judge == 10


def test_time_that_given_steps_leave_goes_to_judging() -> None:
    speed = Speed(step=1.0, sample=5.0, run=1.0)
    planned = partial(make_plan, 100, speed, train=100, val=3, batch=10, rates=(1e-3,), steps=8)
    assert [planned(seeds=seeds).judge for seeds in (2, 3, 4)] == [3, 3, 1]
    assert time_to_judge(3, speed, 1, 3, 8) <= 100 < time_to_judge(3, speed, 1, 4, 8)


def test_the_samples_that_choose_do_not_judge() -> None:
    task = TinyRegression(TinyConfig(), seed=0)
    whole, chooser, judge = task.dataset("val"), *(part_of(task, first, 2).dataset("val") for first in (0, 1))
    assert len(chooser) + len(judge) == len(whole)
    for index in range(len(chooser)):
        assert chooser[index]["input"].equal(whole[2 * index]["input"])
    for index in range(len(judge)):
        assert judge[index]["input"].equal(whole[2 * index + 1]["input"])
    assert len(part_of(task, 0, 2).dataset("train")) == len(task.dataset("train"))
    assert spread(range(1, 100, 2), 5) == [1, 21, 41, 61, 81]


def test_the_page_says_the_answer_and_is_whole(tmp_path: Path) -> None:
    answer = make_answer([0.5, 0.51, 0.52], [0.504, 0.5145, 0.525], notes=["a <note>"])
    text = write_report(answer, tmp_path, "surgeon finetune out/model", "surgeon try net --resume").read_text()
    assert "<pre>surgeon try net --resume</pre>" in text
    assert "Learning rates that were tried" not in text, "there was one"
    swept = {arm: {"0.001": 0.5, "0.01": 0.4} for arm in ("original", "converted")}
    several = write_report(make_answer([0.5], [0.6], swept=swept), tmp_path / "more", "", "")
    assert "Learning rates that were tried" in several.read_text()
    assert "Gain +0.450 ± 0.029 points of top-1 (3 seeds)" in text
    assert "a &lt;note&gt;" in text
    assert text.count('data-tip="seed ') == 3
    assert "prefers-color-scheme:dark" in text
    assert 'name="viewport"' in text
    assert "http" not in text, "the page needs nothing beside it"
