"""`surgeon search` as people call it: refusals, interruptions, TensorBoard, Optuna's own plots."""

import re
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from surgeon.cli import main
from surgeon.search.study.folder import read_search
from surgeon.search.study.identity import differences
from surgeon.zoo.finetune.loop import Interrupted, Run
from tests.support.search.tasks import document, search_arguments
from tests.support.training.runs import failing

pytestmark = pytest.mark.usefixtures("tiny_tasks")

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    "budgets",
    [
        ["--max-params=0.01k"],
        ["--max-flops=-20%", "--max-params=-20%"],
        ["--max-flops=+300%", "--max-memory=1MiB"],  # where the one leaves room, the other leaves none
    ],
)
def test_budgets_that_nothing_meets_end_at_once_with_the_nearest(
    budgets: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "train", lambda self: pytest.fail("something was trained"))
    assert main(search_arguments("s", "--quiet", *budgets)) == 1
    error = capsys.readouterr().err
    nearest = re.search(
        r"the nearest budgets that one placement meets are .*" + budgets[-1].split("=")[0] + r" (\S+)", error
    )
    assert nearest is not None, error
    assert ("each alone could go down to" in error) == (len(budgets) > 1), "one number is told once"
    assert error.count("\n") == 1
    assert not Path("s").exists()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "classification needs data"),
        (["--data", "nowhere"], "there is no folder nowhere"),
        (["--data", "."], "no folders"),
    ],
)
def test_a_task_without_data_is_one_error(data: list[str], said: str, capsys: Capture) -> None:
    arguments = ["search", "zoo/resnet20_cifar", "--task", "classification", "--weights", "random", *data]
    assert main([*arguments, "-o", "s", "--quiet"]) == 2
    out, error = capsys.readouterr()
    assert said in error
    assert error.count("\n") == 1
    assert out == ""
    assert not Path("s").exists()


def test_a_search_without_any_replacement_says_which_budget_has_one(capsys: Capture) -> None:
    """Its end counted as a failed trial, and once more at every resumption."""
    for more in ([], ["--resume"]):
        assert main(search_arguments("s", "--trials", "4", "--max-params", "+0.01%", "--quiet", *more)) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert "trials: 1 complete note:" in told or "trials: 1 complete trial" in told
        assert "failed" not in told
        near = re.search(r"none replaces a layer: the nearest that does needs --max-params (\S+)", told)
        assert near is not None, told
    assert main(["study", "status", "s", "--json"]) == 0
    assert near[1] in document(capsys)["ended"]
    assert main(search_arguments("t", "--trials", "2", "--max-params", near[1], "--quiet")) == 0
    assert any(one.placement and one.counts for one in read_search("t").records)


def test_another_model_space_or_budget_is_refused_with_the_difference(capsys: Capture) -> None:
    assert main(search_arguments("s", "--trials", "1", "--quiet")) == 0
    assert main(search_arguments("s", "--trials", "1")) == 2
    assert "there is already a search in s" in capsys.readouterr().err
    assert main(search_arguments("s", "--trials", "1", "--max-flops", "+300%", "--resume")) == 2
    error = capsys.readouterr().err
    assert "--max-flops is " in error
    assert "Repeat the study's values to continue it, or start another search (another -o)" in error
    assert main(search_arguments("s", "--trials", "1", "--resume", "--model-args", "width=6")) == 2
    assert 'model options ({"width": 6}) is only in this search' in capsys.readouterr().err
    assert main(search_arguments("s", "--trials", "1", "--resume", "--steps", "9", "--seed", "7", "--lr", "0.5")) == 2
    error = capsys.readouterr().err
    assert "--steps is 4 in the study and 9 here" in error
    assert error.count("--seed is 0 in the study and 7 here") == 1
    (told,) = [line for line in error.splitlines() if line.startswith("surgeon: error: ")]
    assert not re.search(r"eval_every|evaluator|[a-z]+\.[a-z]+\.", told), "fields of the program"
    other = search_arguments("s", "--trials", "1", "--resume")
    other[1] = "tests.support.training.tasks:Restorer"
    assert main(other) == 2
    assert re.search(r"is a study of something else: model.*; name is .*make_plain.*Restorer", capsys.readouterr().err)
    assert main(search_arguments("s", "--trials", "2", "--resume", "--quiet")) == 0  # more trials are no difference
    assert main(search_arguments("nowhere", "--resume")) == 2
    assert "omit --resume" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train", failing(Interrupted(2), 1))
        assert main(search_arguments("s", "--trials", "3", "--no-pruning")) == 130
    out, error = capsys.readouterr()
    assert "resume with the same command and --resume" in error
    assert out == ""
    assert main(search_arguments("s", "--trials", "3", "--no-pruning", "--resume", "--json")) == 0
    assert document(capsys)["trials"]["complete"] == 3


def test_an_interrupted_trial_is_told_as_such(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was told as running, for good."""
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train", failing(Interrupted(2), 1))
        assert main(search_arguments("s", "--trials", "2", "--no-pruning")) == 130
    capsys.readouterr()
    assert main(["study", "status", "s"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "trials: 1 complete, 1 interrupted" in told
    assert "note: 1 trial was interrupted: the same command with --resume continues it" in told


def test_interrupted_finals_go_on(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(search_arguments("s", "--trials", "2", "--no-pruning", "--quiet")) == 0
    finals = ["--trials", "2", "--no-pruning", "--finals", "1", "--seeds", "1", "--final-rung", "0", "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train", failing(Interrupted(2), 1))
        assert main(search_arguments("s", *finals)) == 130
    calls: list[int] = []
    train = Run.train
    monkeypatch.setattr(Run, "train", lambda self: (calls.append(1), train(self))[1])
    assert main(search_arguments("s", *finals, "--quiet")) == 0
    assert len(calls) == 1  # the first was done
    found = read_search("s")
    assert found.finals is not None
    # the same steps and seed as a trial: the same values
    values = {one.hash: found.value(one) for one in found.ranked()}
    for arm in found.finals["arms"]:
        assert arm["values"] == [pytest.approx(values[arm["hash"]])]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--storage", "nonsense"], "expected a URL such as postgresql://"),
        (["--storage", "sqlite://"], "in memory is lost"),
        (["--join", "study"], "--join needs --storage"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (
            ["--jobs", "2", "--device", "cuda:1"],
            "--device cuda:1 names one GPU, but --jobs 2 workers share all of them",
        ),
        (["--layers", "k<=1"], "the selection 'k<=1' matches nothing"),
        (["--layers", "nowhere"], "nowhere"),
        (["--max-flops", "10%"], "has a sign"),
        (["--sampler", "guess"], "expected posterior, decoder, tpe, nsga2, random or module:Class, got 'guess'"),
        (["--sampler", "no.such.module:X"], "cannot import 'no.such.module': ModuleNotFoundError"),
        (["--sampler", "optuna.samplers:NoSampler"], "optuna.samplers has no 'NoSampler'"),
        (["--sampler", "collections:Counter"], "the class Counter of collections is not an Optuna sampler"),
        (["--sampler", "tests.support.search.tasks:make_plain"], "is not an Optuna sampler: it creates a"),
        (
            ["--sampler", "tests.support.search.tasks:Forgetful"],
            "the sampler tests.support.search.tasks:Forgetful leaves first out: got None",
        ),
        (["--sampler", "optuna.samplers:GridSampler"], "cannot be created: TypeError"),
        (["--objective", "flops"], "expected metric, alone or with some of flops, params, memory after it"),
        (["--objective", "metric,speed"], "expected metric, alone or with"),
        (["--trials", "0"], "--trials must be at least 1"),
        (["--gains", "guess"], "neither a file nor one of"),
        (["--types", "pafu", "--atoms", "2"], "option of none of the types"),
        (["--max-time", "soon"], "expected a time"),
        (["--task-option", "broken=true"], "image 3 of the training set cannot be read"),
    ],
)
def test_wrong_usage_is_one_clear_message(more: list[str], said: str, capsys: Capture) -> None:
    assert main(search_arguments("s", "--quiet", *more)) == 2
    out, error = capsys.readouterr()
    assert said in error
    assert error.count("\n") == 1
    assert out == ""
    assert not Path("s").exists()


def test_what_a_user_wrote_stands_for_what_was_read_from_it() -> None:
    old, new = ({"flops": {"text": text, "value": value}} for text, value in (("+60%", 1.6), ("+10%", 1.1)))
    assert list(differences(old, new)) == ['flops is "+60%" in the study and "+10%" here']


# --- TensorBoard, plots -------------------------------------------------------------------------------------------


def test_tensorboard_has_curves_and_hparams(capsys: Capture) -> None:
    assert main(search_arguments("s", "--trials", "3", "--no-pruning", "--max-flops", "+300%", "--quiet")) == 0
    found = read_search("s")
    done = [one for one in found.records if one.counts]
    assert len(done) == 3
    (folder,) = Path("s/tensorboard").iterdir()
    board = EventAccumulator(str(folder))
    board.Reload()
    best = [event.value for event in board.Scalars("search/best_mse")]
    values = {event.step: event.value for event in board.Scalars("search/mse")}
    assert values == {one.number: pytest.approx(found.value(one)) for one in done}
    assert best == sorted(best, reverse=True)
    use = [event.value for event in board.Scalars("budget/flops")]
    assert all(0 < share <= 1 for share in use)
    trials = sorted(path for path in folder.iterdir() if path.is_dir())
    assert [path.name for path in trials] == [f"trial-{one.number:04}" for one in done]
    summary = EventAccumulator(str(trials[1]))
    summary.Reload()
    session = HParamsPluginData.FromString(
        summary.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    ).session_start_info
    assert session.hparams["replaced"].number_value == len(found.records[1].placement)
    assert {layer: session.hparams[layer].string_value for layer in found.records[1].placement} == dict(
        found.records[1].placement
    )


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_optunas_own_plots_read_the_study(capsys: Capture) -> None:
    from optuna.visualization import matplotlib as plots

    assert main(search_arguments("s", "--trials", "6", "--sampler", "tpe", "--no-pruning", "--quiet")) == 0
    # as a user would do it: with Optuna alone
    storage = JournalStorage(optuna.storages.journal.JournalFileBackend("s/study.jsonl"))
    study = optuna.load_study(study_name="search", storage=storage)
    history = plots.plot_optimization_history(study)
    assert len(history.collections[0].get_offsets()) == 6
    for plot in (plots.plot_timeline, plots.plot_intermediate_values, plots.plot_edf, plots.plot_parallel_coordinate):
        assert plot(study) is not None
    import matplotlib.pyplot

    matplotlib.pyplot.close("all")
