"""`surgeon try` and `surgeon search` where people stop them, begin them twice, replace them, or give data that look alike."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from surgeon.cli import main
from surgeon.errors import CheckpointError
from surgeon.zoo.trial.folder import TryFolder
from surgeon.zoo.trial.run import Trial
from surgeon.zoo.trial.speed import Speed
from tests.support.answers import make_answer
from tests.support.search.tasks import FACTORY, search_arguments

WHAT = ["--task", "tiny-regression", "--type", "pafu", "--layers", "all", "--option", "group_size=2", "--lr", "0.01"]
QUICK = ["try", FACTORY, *WHAT, "--steps", "2", "--seeds", "1", "--batch-size", "4", "--device", "cpu", "--quiet"]
Told = pytest.CaptureFixture[str]

pytestmark = pytest.mark.usefixtures("tiny_tasks")


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "_measure", lambda trial: Speed(step=0.01, sample=0.001, run=0.1))


def interrupted(*args: object, **options: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("at_once")
def test_an_interrupt_between_two_runs_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: Told) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Trial, "judge", interrupted)
        assert main([*QUICK, "-o", "out"]) == 130
    assert "resume with the same command and --resume" in capsys.readouterr().err
    assert main([*QUICK, "-o", "out", "--resume"]) in (0, 1)


def test_an_interrupt_before_the_plan_leaves_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Told) -> None:
    monkeypatch.setattr(Trial, "_measure", interrupted)
    assert main([*QUICK, "-o", "out"]) == 130
    assert "interrupted, nothing was written" in capsys.readouterr().err
    assert not Path("out").exists()


def test_an_interrupt_before_another_is_replaced_is_told_as_such(monkeypatch: pytest.MonkeyPatch, capsys: Told) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Trial, "_measure", lambda trial: Speed(step=0.01, sample=0.001, run=0.1))
        assert main([*QUICK, "-o", "out"]) in (0, 1)
    before = Path("out/try.json").read_text()
    capsys.readouterr()
    monkeypatch.setattr(Trial, "_measure", interrupted)
    assert main([*QUICK, "-o", "out", "--force"]) == 130
    assert capsys.readouterr().err == "surgeon: interrupted, nothing was written\n"
    assert Path("out/try.json").read_text() == before


@pytest.mark.long
def test_an_interrupt_of_a_search_is_told_as_what_is_on_disk(capsys: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first trial nothing is written; in the finals, the trials are."""
    command = search_arguments("s", "--trials", "2", "--finals", "1", "--quiet")
    with monkeypatch.context() as patched:
        patched.setattr("surgeon.search.gains.method.gains_of", interrupted)
        assert main(command) == 130
    assert capsys.readouterr().err == "surgeon: interrupted, nothing was written\n"
    assert not Path("s").exists()
    with monkeypatch.context() as patched:
        patched.setattr("surgeon.search.evaluate.finals.run_finals", interrupted)
        assert main(command) == 130
    assert capsys.readouterr().err == "surgeon: interrupted; resume with the same command and --resume\n"
    assert main([*command, "--resume"]) == 0


@pytest.mark.usefixtures("at_once")
def test_one_folder_is_of_one_process(capsys: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the other process goes on, replaces, or began while this one looked through the data."""
    folder = TryFolder(Path("out"))
    assert main([*QUICK, "-o", "out"]) in (0, 1)
    before = folder.answer.read_text()
    for more in ("--resume", "--force"):
        with folder.hold(begin=False):
            assert main([*QUICK, "-o", "out", more]) == 2
        assert f"the trial in {folder.path} is running in another process" in capsys.readouterr().err
    assert folder.answer.read_text() == before
    late = TryFolder(Path("late"))

    def measure(trial: Trial) -> Speed:
        late.path.mkdir()
        return Speed(step=0.01, sample=0.001, run=0.1)

    monkeypatch.setattr(Trial, "_measure", measure)
    assert main([*QUICK, "-o", "late"]) == 2
    assert "another trial has started" in capsys.readouterr().err
    assert not any(late.path.iterdir())


@pytest.mark.usefixtures("at_once")
def test_what_is_to_be_replaced_stays_until_the_new_trial_begins(capsys: Told) -> None:
    folder = TryFolder(Path("out"))
    assert main([*QUICK, "-o", "out"]) in (0, 1)
    before = folder.answer.read_text()
    assert main([*QUICK, "-o", "out", "--force", "--layers", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert folder.answer.read_text() == before
    assert main([*QUICK, "-o", "out", "--force"]) in (0, 1)


@pytest.mark.usefixtures("at_once")
def test_a_new_folder_goes_where_its_record_cannot_be_written(monkeypatch: pytest.MonkeyPatch, capsys: Told) -> None:
    def full(folder: TryFolder, path: Path, values: object) -> None:
        raise CheckpointError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(TryFolder, "write", full)
    assert main([*QUICK, "-o", "out"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not Path("out").exists()


def _pictures(folder: Path) -> None:
    folder.mkdir(parents=True)
    for i in range(2):
        Image.fromarray(np.full((16, 16, 3), 60 * i, np.uint8)).save(folder / f"{i}.png")


@pytest.mark.parametrize("command", [["try", "--seeds", "1"], ["finetune", "--max-steps", "1"], ["evaluate"]])
def test_one_class_is_one_error(command: list[str], capsys: Told) -> None:
    for split in ("train", "val"):
        _pictures(Path("one", split, "only"))
    begin, *more = command
    arguments = [begin, "zoo/resnet20_cifar", "--task", "classification", "--data", "one", *more]
    assert main([*arguments, "--weights", "random", "--quiet"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert "the data have only one class (only)" in lines[0]


def test_less_than_one_judging_sample_decides_nothing() -> None:
    samples = {"train": 240, "val": 24, "choose": 0, "judge": 24}
    few = make_answer([0.5] * 5, [0.5, 0.5, 0.5, 0.5, 0.5 + 1 / 24], samples=samples)
    told = "undecided: +0.83 ± 0.83 points of top-1 (5 seeds); of 24 judging samples, one is 4.2 points of top-1"
    assert few.sentence().startswith(told)
    assert "less than one judging sample" in few.meaning()
    won = make_answer([0.5] * 3, [0.5 + 1 / 24] * 2 + [0.5 + 1.1 / 24], samples=samples)
    assert won.verdict == "won"
    assert make_answer([0.5] * 3, [0.51, 0.511, 0.512], samples=samples).verdict == "undecided"
    none = make_answer([0.5] * 3, [0.501, 0.499, 0.5])
    assert (few.outcome, none.outcome, won.outcome) == ("undecided", "no gain seen", "won")
    assert none.to_dict()["verdict"] == "no gain seen"
