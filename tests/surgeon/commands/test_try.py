"""`surgeon try` as people call it: equal training of original and converted, resuming, limits of time, bad input."""

import json
import re
import shutil
import statistics
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import surgeon
from surgeon.cli import main
from surgeon.commands.try_ import resumed
from surgeon.records.recipe import get_recipe
from surgeon.records.training import unequal_training
from surgeon.util.outputs import SUMMARY
from surgeon.zoo.finetune.loop import Trainer
from surgeon.zoo.trial.run import Trial
from surgeon.zoo.trial.speed import Speed
from tests.support.answers import make_answer
from tests.support.search.tasks import FACTORY
from tests.support.training.runs import interrupt_at

SHORT = ["--task", "tiny-regression", "--type", "pafu", "--layers", "all", "--option", "group_size=2"]
QUICK = [*SHORT, "--steps", "4", "--batch-size", "4", "--device", "cpu", "--quiet"]

Try = Callable[..., int]


@pytest.fixture
def attempt(tiny_tasks: None) -> Try:
    return lambda *more: main(["try", FACTORY, *QUICK, "-o", "out", *more])


def answered(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_one_time_is_proposed_to_resume() -> None:
    argv = ["try", "net", "--task", "sad", "--max-time", "3m", "--seeds=4", "-o", "out"]
    args = Namespace(argv=argv, max_time="3m", seeds=4)
    short = make_answer([0.5], [0.6], stopped="time", more_time=230.0)
    assert resumed(args, short) == "surgeon try net --task sad --seeds=4 -o out --resume --max-time 4m"
    whole = make_answer([0.5] * 3, [0.6] * 3, seconds=100.0)
    assert resumed(args, whole) == "surgeon try net --task sad -o out --resume --max-time 6m --seeds 8"
    same = Namespace(argv=["try", "net", "--steps", "8", *argv[2:]], max_time="3m", seeds=4)  # a value like a new one
    assert resumed(same, whole) == "surgeon try net --steps 8 --task sad -o out --resume --max-time 6m --seeds 8"


@pytest.mark.parametrize(("more", "took"), [([], 8), (["--steps", "20"], 20)])
def test_a_time_that_is_too_short_is_said_before_the_converted_network_is_timed(
    more: list[str], took: int, tiny_tasks: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[int] = []
    slow = Speed(step=60.0, sample=0.0, run=0.0)
    monkeypatch.setattr(Trial, "_probe", lambda trial, network, task, count: (steps.append(count), slow)[1])
    assert main(["try", FACTORY, *SHORT, *more, "--batch-size", "4", "--quiet", "--max-time", "5m", "-o", "out"]) == 2
    told = f"3 seeds of {took} steps of both networks take about {500 * took} s: give --max-time "
    assert re.search(rf"{told}.* \(it converts all to pafu n2, 3 layers\)$", capsys.readouterr().err)
    assert steps == [1, 1]  # of the original; the first one warms up
    assert not Path("out").exists()


def test_a_trial_from_the_command_line(attempt: Try, capsys: pytest.CaptureFixture[str]) -> None:
    assert attempt("--seeds", "3", "--lr", "0.001", "0.01", "--json") == 0
    found = answered(capsys)
    assert found["seeds"] == [0, 1, 2]
    pairs = zip(found["scores"]["original"], found["scores"]["converted"], strict=True)
    assert found["gains"] == pytest.approx([a - b for a, b in pairs])  # mse: lower is better
    assert found["gain"] == pytest.approx(statistics.fmean(found["gains"]))
    assert set(found["swept"]["original"]) == set(found["swept"]["converted"]) == {"0.001", "0.01"}
    for arm, rate in found["rates"].items():
        assert found["swept"][arm][f"{rate:g}"] == min(found["swept"][arm].values())
    assert found["factors"]["flops"] > 1 < found["factors"]["params"]
    assert found["start"] > max(
        *found["scores"]["original"], *found["scores"]["converted"]
    )  # of the untrained; an error
    page = Path("out/report/report.html").read_text()
    resumed = page[page.index("<pre>surgeon try") :].partition("</pre>")[0]
    assert re.search(r"--lr 0.001 0.01 --json --resume --max-time 60m --seeds 6$", resumed), resumed
    assert re.search(
        r"<pre>surgeon finetune out/model .* -o out-finetuned .* --trust-factory</pre>", page
    )  # whose factory is code
    assert found["answer"] in json.loads(Path("out/answer.json").read_text())["answer"]
    model = surgeon.load("out/model", trust_factory=True)
    recorded = json.loads(Path("out/model", SUMMARY).read_text())
    assert recorded["steps"] == 4
    shutil.copytree("out/model", "same")
    assert unequal_training("out/model", get_recipe(model), "same", get_recipe(model)) is None
    assert any(type(module).__name__ == "PAFUConv2d" for module in model.modules())
    assert not Path("out/runs").exists() or not any(Path("out/runs").iterdir())
    assert main(["try", FACTORY, *QUICK, "-o", "out"]) == 2
    assert "continue it (--resume) or replace it (--force)" in capsys.readouterr().err


@pytest.mark.long
def test_equal_seeds_give_equal_answers_and_more_seeds_are_added(
    attempt: Try, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--lr", "0.01", "--json"]
    assert attempt("--seeds", "1", *more) == 0
    first = answered(capsys)
    assert "an answer takes 3" in first["answer"]
    assert attempt("--seeds", "2", "--resume", *more) == 0
    second = answered(capsys)
    assert second["scores"]["converted"][:1] == first["scores"]["converted"]
    assert len(second["seeds"]) == 2
    assert attempt("--seeds", "1", "--force", *more) == 0
    again = answered(capsys)
    assert again["scores"] == first["scores"]


def test_an_interrupted_trial_goes_on_to_the_same_answer(
    attempt: Try, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--seeds", "1", "--lr", "0.01", "--json"]
    assert attempt(*more) == 0
    straight = answered(capsys)
    backward = Trainer.backward
    interrupt_at(monkeypatch, 2)
    monkeypatch.setattr("surgeon.zoo.trial.run.Trial._measure", lambda trial: Speed(step=0.01, sample=0.001, run=0.1))
    assert attempt("--force", *more) == 130
    assert "resume with the same command and --resume" in capsys.readouterr().err
    monkeypatch.setattr(Trainer, "backward", backward)
    told = "surgeon: error: a trial must be resumed with the options it started with, but "
    way_out = ". --force replaces it, and with another -o both are kept\n"
    with monkeypatch.context() as unbuilt:
        unbuilt.setattr("surgeon.commands.try_.build", lambda *args, **options: pytest.fail("a model was built"))
        for given, changed in (
            (["--batch-size", "2"], "batch_size was 4 and is 2"),
            (["--model-args", "width=6"], "width was not given and is 6"),
            (["--task-option", "samples=8"], "samples was 12 and is 8"),
            (["--steps", "5"], "steps was 4 and is 5"),
            (["--lr", "0.1"], "rates was [0.01] and is [0.1]"),
        ):
            assert attempt("--resume", *more, *given) == 2
            assert capsys.readouterr().err == f"{told}{changed}{way_out}"
    assert attempt("--resume", *more, "--layers", "middle") == 2  # what is converted is known with the model
    assert re.fullmatch(rf"{told}conversion was .* and is .*{way_out}", capsys.readouterr().err)
    assert attempt("--resume", *more) == 0
    assert answered(capsys)["scores"] == straight["scores"]


def test_a_new_plan_is_made_until_a_pair_is_finished(
    attempt: Try, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With more time, or where the pair no longer fits; a plan that fits is kept, and so is that of a finished pair."""
    one = Trial._one

    def go(speed: Speed | None, *more: str, ends: bool = False) -> int:
        monkeypatch.setattr(Trial, "_measure", lambda trial: speed if speed else pytest.fail("planned again"))
        monkeypatch.setattr(Trial, "_one", one if ends else lambda trial, *run: False)
        return attempt("--lr", "0.01", "--json", "--seeds", "3", *more)

    def judging() -> int:
        return int(json.loads(Path("out/try.json").read_text())["plan"]["judge"])

    slow = Speed(step=0.01, sample=16.0, run=0.1)
    assert go(slow, "--max-time", "2m") == 1
    found = answered(capsys)
    assert "nan" not in found["answer"]
    assert found["factors"]["step_seconds"] is None
    assert found["swept"] == {arm: {"0.01": None} for arm in ("original", "converted")}
    assert judging() == 1
    assert go(None, "--max-time", "2m", "--resume") == 1
    capsys.readouterr()
    clock = Path("out/clock.json")
    clock.write_text(json.dumps({"seconds": 113.0, "run": 0.0}))
    assert go(slow, "--max-time", "2m", "--resume") == 2
    told = r"3 seeds of 4 steps of both networks take about 10\d s: give --max-time 5m"
    assert re.search(told, capsys.readouterr().err)
    assert go(slow, "--max-time", "6m", "--resume", ends=True) == 0
    whole = answered(capsys)["samples"]["val"]
    assert 1 < judging() < whole
    more = re.escape("says nothing of other images; the time allowed no more; --force --max-time ")
    assert go(None, "--max-time", "30m", "--resume") == 0
    (few,) = [note for note in answered(capsys)["notes"] if "judge" in note]
    assert re.fullmatch(rf"only {judging()} samples of {whole} judge: .* {more}31m judges on {whole}", few), few


def test_what_was_measured_is_kept_where_no_time_is_left(attempt: Try, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores and the network before training, of an earlier session."""
    assert attempt("--seeds", "1", "--lr", "0.01", "--json") == 0
    before = answered(capsys)
    assert main(["try", FACTORY, *QUICK[:-1], "-o", "out", "--lr", "0.01", "--resume", "--max-time", "1s"]) == 0
    told = capsys.readouterr()
    assert "and no time is left" in told.err
    assert "none was left): --resume --max-time 1m trains more seeds" in " ".join(told.out.split())
    assert not re.search(r"\b0 ms|no time was left to measure", told.err + told.out)
    after = json.loads(Path("out/answer.json").read_text())
    assert (after["start"], after["scores"]) == (before["start"], before["scores"])


def test_the_time_is_honored(attempt: Try, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No pair is begun that would end too late, what is there is answered, and twice as long as another pair took is proposed."""
    monkeypatch.setattr(Trial, "expected", lambda trial, runs: 1e6)
    assert attempt("--seeds", "3", "--lr", "0.01", "--json") == 0
    found = answered(capsys)
    assert (found["stopped"], found["seeds"]) == ("time", [0])
    (note,) = [note for note in found["notes"] if "the time is up" in note]
    assert note.startswith("1 of 3 seeds: the time is up (")
    assert re.search(
        r"\(another pair takes about 1,000,000 s, and .* were left\): --resume --max-time 1170h trains more", note
    )


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        (["--type", "pafu", "--layers", "all", "--option", "group_size=2"], "all to pafu n2"),
        (
            ["--layers", "all", "--option", "atoms=4", "scales=1"],
            "all to acda m4 S1 (type: the default of tiny-regression)",
        ),
        (["--type", "pafu"], "stage1 to pafu n8 (layers: the default of tiny-regression)"),
        ([], "stage1 to acda m6 S3 (layers and type: the default of tiny-regression)"),
    ],
)
def test_what_is_converted_is_told_with_its_options_before_it_is_timed(
    given: list[str],
    becomes: str,
    tiny_tasks: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Trial, "_measure", lambda trial: pytest.fail(trial.twins.becomes))
    with pytest.raises(pytest.fail.Exception) as stopped:
        main(["try", FACTORY, "--task", "tiny-regression", *given, "-o", "out"])
    assert stopped.value.msg == becomes
    choose = "; --layers, --type choose others$" if "default" in becomes else "$"
    assert re.search(
        rf"^surgeon: converting {re.escape(becomes)}, \d layers?{choose}", capsys.readouterr().err, re.MULTILINE
    )


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--max-time", "soon"], "--max-time: expected a time such as 90s, 30m or 1.5h, got 'soon'"),
        (["--lr", "0"], "--lr: expected a number above 0, such as 3e-4, got '0'"),
        (["--lr", "0.1", "0.1"], "learning rates must be given, each once"),
        (["--seeds", "0"], "--seeds: expected a positive integer, got '0'"),
        (["--device", "gpu"], "--device: expected auto, cpu, cuda, cuda:N or mps, got 'gpu'"),
        (["--amp", "int8"], "--amp: expected no, fp16 (float16) or bf16 (bfloat16), got 'int8'"),
        (["--recipe", "r.json"], "--recipe defines layers, types and options"),
        (["--resume"], "no trial to resume"),
        (["--resume", "--force"], "give only one of them"),
        (["--task-option", "sample=3"], "has no option 'sample'"),
        (["--layers", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_error(attempt: Try, more: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert attempt(*more) == 2
    out, error = capsys.readouterr()
    lines = [line for line in error.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert told in lines[0]
    assert out == ""
    assert not Path("out").exists()


def test_a_folder_of_others_is_left_alone(attempt: Try, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    assert attempt("--force") == 2
    assert "was not written by surgeon try" in capsys.readouterr().err
    assert Path("out/mine.txt").read_text() == "mine"
