"""Values of placements by training: the same for the same seed, pruned, failed, out of memory; and gains by training."""

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch

import surgeon
from surgeon.errors import ConfigError, TrainingError
from surgeon.search.evaluate.evaluator import OutOfMemoryError, StoppedError
from surgeon.search.evaluate.training import ShortConfig, TrainingEvaluator, bound
from surgeon.search.gains.gain import GainTable, uniform_gains
from surgeon.search.gains.method import METHODS, gains_of, make_gains
from surgeon.search.gains.probe import ProbeConfig, entries, single
from surgeon.search.gate import Gate
from surgeon.search.placement.problem import Ints
from surgeon.search.run import MAX_ATTEMPTS, Search, SearchConfig
from surgeon.search.space import Space, SpaceConfig, make_space
from surgeon.search.study.folder import read_kept
from surgeon.search.study.record import Record, ranked
from surgeon.search.study.study_file import StudyFile
from surgeon.zoo.evaluate import evaluate as measure
from surgeon.zoo.finetune import FinetuneConfig
from surgeon.zoo.finetune.loop import Interrupted, Run
from tests.support.search.tasks import make_plain
from tests.support.training.runs import failing
from tests.support.training.tasks import SIZE, classification, converted, regression

BASE = FinetuneConfig(batch_size=4, lr=0.01, device="cpu")
CONFIG = SpaceConfig(types=("acda", "sekg"), atoms=(2,), scales=(1,))
SEKG = SpaceConfig(types=("sekg",))


def no_report(step: int, value: float) -> None:
    """Nobody listens."""


def space_of(config: SpaceConfig = CONFIG) -> Space:
    from surgeon.sites.sites import find_sites

    model = make_plain()
    return make_space(model, config, sites=find_sites(model, input_size=(3, SIZE, SIZE)).convs)


def evaluator_of(steps: int = 4, **options: Any) -> TrainingEvaluator:
    task = options.pop("task", None) or regression()
    space = space_of(options.pop("space", CONFIG))
    short = ShortConfig(steps=steps, base=options.pop("base", BASE))
    return TrainingEvaluator(bound(make_plain(), task), task, space, short, **options)


def search_of(folder: Path, evaluator: TrainingEvaluator, **options: Any) -> Search:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    gate = Gate(evaluator.model, CONFIG, input_size=(3, SIZE, SIZE), batch_size=4, optimizer="adamw")
    config = SearchConfig(sampler="random", optima=2, random=1, trials=options.pop("trials", 3))
    return Search(
        StudyFile(folder / "s.jsonl"), gate.space, uniform_gains(gate.space), evaluator, gate, config, **options
    )


# --- one evaluation -----------------------------------------------------------------------------------------------


def test_a_value_is_that_of_a_fine_tune_and_always_the_same() -> None:
    evaluator = evaluator_of()
    placement = single(evaluator.space, 1, 1)
    reports: list[tuple[int, float]] = []
    assert evaluator.start is None  # not measured yet
    value = evaluator.evaluate(placement, lambda step, value: reports.append((step, value)), 0)
    torch.manual_seed(99)  # what was drawn before does not matter
    assert evaluator_of().evaluate(placement, no_report, 0) == value
    assert [step for step, _ in reports] == [1, 2, 3]  # the fourth is the result
    assert value == evaluator.train(placement).metrics["mse"]
    assert value < evaluator.train(placement).summary.start.metrics["mse"]
    untrained = measure(evaluator.model, evaluator.task)["mse"]
    assert evaluator.start == pytest.approx(untrained, rel=1e-5)
    assert evaluator.evaluate(single(evaluator.space, 1, 0), no_report, 0) != value


def test_conversion_keeps_what_the_model_computes() -> None:
    evaluator = evaluator_of()
    x = torch.randn(2, 3, SIZE, SIZE)
    for layer, option in entries(evaluator.space):
        model = evaluator.converted(single(evaluator.space, layer, option))[0]
        assert type(model.get_submodule(evaluator.space.layers[layer])) is not torch.nn.Conv2d
        torch.testing.assert_close(model(x), evaluator.model(x), rtol=1e-4, atol=1e-5)


def test_what_all_start_from_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = evaluator_of()
    asked: list[int] = []
    measure = Run.evaluate

    def counted(run: Run) -> Any:
        asked.append(run.progress.step)
        return measure(run)

    monkeypatch.setattr(Run, "evaluate", counted)
    first, second = (evaluator.train(single(evaluator.space, 1, option)) for option in (0, 1))
    assert [step for step in asked if step == 0] == [0]
    assert second.summary.start.metrics == first.summary.start.metrics
    alone = evaluator_of().train(single(evaluator.space, 1, 1))
    assert second.summary.result.metrics == alone.summary.result.metrics
    assert second.summary.start.parameters == alone.summary.start.parameters


def test_a_rung_doubles_the_steps() -> None:
    evaluator = evaluator_of(steps=3)
    for rung, steps in ((0, 3), (1, 6), (2, 12)):
        assert evaluator.train(single(evaluator.space, 0, 1), rung=rung).summary.steps == steps


def test_the_best_with_replacements_is_kept(tmp_path: Path) -> None:
    evaluator = evaluator_of(steps=6, keep=tmp_path / "best")
    found = {}
    for layer, option in [(0, 0), (0, 1), (1, 1), (1, 2)]:
        placement = single(evaluator.space, layer, option)
        found[evaluator.evaluate(placement, no_report, 0)] = placement
    replaced = {value: placement for value, placement in found.items() if placement.any()}
    best = min(replaced)
    kept = read_kept(tmp_path / "best")
    assert kept is not None
    assert kept["value"] == best
    assert [path.name for path in (tmp_path / "best").iterdir() if path.is_dir()] == [kept["hash"]]
    model = surgeon.load(tmp_path / "best" / kept["hash"], base=make_plain())
    expected = evaluator.train(replaced[best]).model
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize("losses", [True, False])
def test_equal_values_are_told_apart_by_loss_then_cost_everywhere(
    losses: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, lost = TrainingEvaluator.train, iter([0.9, 0.5, 0.8, 0.2, 0.7])

    def same(self: TrainingEvaluator, placement: Ints, **options: Any) -> Any:
        result = train(self, placement, **options)
        result.summary.result.metrics.update({"mse": 1.0} | ({"loss": next(lost)} if losses else {}))
        return result

    monkeypatch.setattr(TrainingEvaluator, "train", same)
    gate = Gate(make_plain(), CONFIG, input_size=(3, SIZE, SIZE), batch_size=4, optimizer="adamw")
    costs = {"costs": lambda placement: gate.check(placement).traced}
    search = search_of(tmp_path, evaluator_of(steps=1, keep=tmp_path / "best", **costs), trials=5)
    search.open()
    search.run()
    done = search.file.records()
    order = [one.number for one in ranked(done, higher=False)]
    flops = [one.attributes["traced"]["flops"] for one in done]
    assert len(set(flops)) > 2
    assert order == ([3, 1, 4, 2, 0] if losses else sorted(range(5), key=lambda n: (flops[n], done[n].costs["memory"])))
    best = search.file.best()
    assert best is not None
    assert best.number == order[0]
    kept = read_kept(tmp_path / "best")
    assert kept is not None
    assert kept["hash"] == next(done[number].hash for number in order if done[number].placement)


def test_a_converted_model_is_no_start() -> None:
    with pytest.raises(ConfigError, match="surgeon revert"):
        bound(converted("pafu"), regression())


def test_the_direction_is_that_of_the_task() -> None:
    assert evaluator_of().directions == ("minimize",)
    assert evaluator_of(task=classification()).directions == ("maximize",)


@pytest.mark.parametrize(
    ("error", "caught"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."), OutOfMemoryError),
        (RuntimeError("shapes do not fit"), RuntimeError),
        (Interrupted(3), StoppedError),
    ],
)
def test_what_a_training_raises(error: BaseException, caught: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Run) -> None:
        raise error

    monkeypatch.setattr(Run, "train", broken)
    evaluator = evaluator_of()
    with pytest.raises(caught) as raised:
        evaluator.evaluate(single(evaluator.space, 0, 1), no_report, 0)
    assert type(raised.value) is caught


# --- in a search --------------------------------------------------------------------------------------------------


def states(search: Search) -> list[str]:
    return [one.state for one in search.file.records()]


def test_out_of_memory_is_learned_from_and_the_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = search_of(tmp_path, evaluator_of())
    assert search.gate is not None
    search.open()
    monkeypatch.setattr(Run, "train", failing(torch.OutOfMemoryError("CUDA out of memory"), 1))
    before = search.gate.calibration
    outcome = search.run()
    records = search.file.records()
    assert records[1].state == "refused"
    assert records[1].attributes["refused"] == ["out of memory at run time"]
    assert (outcome.stopped, outcome.evaluated) == ("trials", 3)
    kept = search.file.calibration
    assert kept is not None
    assert kept != before
    assert len(kept.events) == 1
    assert not search.gate.check(search.space.placement(records[1].placement)).fits


def test_numbers_that_are_not_finite_fail_the_trial_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Record] = []
    search = search_of(tmp_path, evaluator_of(), progress=lambda one, best: told.append(one))
    search.open()
    monkeypatch.setattr(Run, "train", failing(TrainingError("step 3: the loss is nan"), 1))
    outcome = search.run()
    assert outcome.evaluated == 3
    assert states(search).count("failed") == 1
    failed = next(one for one in search.file.records() if one.state == "failed")
    assert failed.attributes["error"] == "TrainingError: step 3: the loss is nan"
    assert [one.number for one in told] == [one.number for one in search.file.records()]


@pytest.mark.filterwarnings("ignore:Encountered `nan` values:UserWarning")  # torchmetrics leaves them out
def test_a_rate_that_diverges_fails_every_trial_and_ends_the_search(tmp_path: Path) -> None:
    base = FinetuneConfig(batch_size=4, lr=1e30, clip=None, opt="sgd", device="cpu", max_rollbacks=0)
    search = search_of(tmp_path, evaluator_of(base=base), trials=6)
    search.open()
    with pytest.raises(TrainingError):
        search.run()
    assert states(search).count("failed") == MAX_ATTEMPTS


def test_ctrl_c_leaves_the_trial_open_and_resume_takes_it_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = search_of(tmp_path, evaluator_of())
    search.open()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train", failing(Interrupted(2), 1))
        outcome = search.run()
    assert (outcome.stopped, outcome.evaluated) == ("interrupted", 1)
    assert states(search)[:2] == ["complete", "running"]
    again = search_of(tmp_path, evaluator_of())
    again.open(resume=True)
    assert again.run().stopped == "trials"
    records = again.file.records()
    assert records[1].state == "complete"
    assert records[1].attempts == 1, "to be asked to stop is no death of a trial"
    whole = search_of(tmp_path / "whole", evaluator_of())
    whole.open()
    whole.run()
    assert [one.values for one in records] == [one.values for one in whole.file.records()]


def test_successive_halving_prunes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = evaluator_of(steps=8)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=2, reduction_factor=2)
    search = search_of(tmp_path, evaluator, pruner=pruner, trials=6)
    search.open()
    search.run()
    counts = {state: states(search).count(state) for state in ("complete", "pruned")}
    assert counts["pruned"] >= 1
    assert counts["complete"] >= 1
    for one, trial in zip(search.file.records(), search.file.trials(), strict=True):
        if one.duplicate_of is None and one.state == "pruned":
            assert 0 < len(trial.intermediate_values) < 4


def test_another_network_or_training_is_another_study(tmp_path: Path) -> None:
    search = search_of(tmp_path, evaluator_of(), trials=1)
    search.open()
    longer = search_of(tmp_path, evaluator_of(steps=5))
    with pytest.raises(OSError, match=r"evaluator.training.max_steps is 4 in the study and 5 here"):
        longer.open(resume=True)
    other = evaluator_of()
    with torch.no_grad():
        other.model.get_submodule("first").get_parameter("weight").add_(1.0)
    changed = TrainingEvaluator(other.model, other.task, other.space, other.config)
    with pytest.raises(OSError, match=r"evaluator.weights"):
        search_of(tmp_path, changed).open(resume=True)


# --- gains by training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [method for method in METHODS if method != "halving"])  # which has its own test
def test_every_method_makes_a_whole_table(method: str, tiny_tasks: None, tmp_path: Path) -> None:
    evaluator = evaluator_of(space=SEKG)
    table = make_gains(method, evaluator, ProbeConfig(steps=3), batches=4)
    assert table.estimator == method
    allowed = evaluator.space.allowed.copy()
    allowed[:, 0] = False
    assert (table.error[allowed] > 0).all()
    assert not table.gain[~allowed].any()
    table.write(tmp_path / "gains.json")
    again = GainTable.read(tmp_path / "gains.json").for_space(evaluator.space)
    np.testing.assert_array_equal(again.gain, table.gain)
    np.testing.assert_array_equal(again.error, table.error)
    fresh = make_gains(method, evaluator, ProbeConfig(steps=3), batches=4, fresh=True)
    np.testing.assert_array_equal(fresh.gain, table.gain)
    assert make_gains(method, evaluator, ProbeConfig(steps=3), batches=4).facts["seconds"] == table.facts["seconds"]


def test_a_probe_is_a_difference_of_equal_trainings() -> None:
    """An option whose new parameters cannot move gains nothing: it is trained as the convolution is."""
    base = FinetuneConfig(batch_size=4, lr=0.01, new_lr_scale=1e-30, weight_decay=0.0, clip=None, device="cpu")
    still = make_gains("probe", evaluator_of(base=base), ProbeConfig(steps=3), fresh=True)
    moving = make_gains("probe", evaluator_of(), ProbeConfig(steps=3), fresh=True)
    sekg = moving.options.index("sekg")
    assert np.abs(still.gain[:, sekg]).max() < 1e-5
    assert np.abs(moving.gain[:, sekg]).max() > 1e-5


@pytest.mark.long
def test_halving_gives_the_better_half_more_steps() -> None:
    evaluator = evaluator_of(space=SEKG)
    count = len(entries(evaluator.space))
    table = make_gains("halving", evaluator, ProbeConfig(steps=2), fresh=True)
    left, trainings, rounds = count, 0, 0
    while True:
        trainings, rounds = trainings + 2 * (left + 1), rounds + 1
        if left <= 2:
            break
        left = (left + 1) // 2
    allowed = evaluator.space.allowed.copy()
    allowed[:, 0] = False
    assert (table.error[allowed] > 0).all()
    assert not table.gain[~allowed].any()
    assert table.facts["trainings"] == trainings
    assert table.facts["rounds"] == rounds
    # in the last round: the difference to the unmodified model after as many steps, by hand
    sign, layer, option = -1.0, *np.unravel_index(int(np.argmax(table.gain)), table.gain.shape)
    short = evaluator_of(steps=2, space=SEKG)
    by_hand = []
    for rung in range(rounds):
        values = [
            sign
            * (
                short.train(single(short.space, int(layer), int(option)), rung=rung, seed=seed).metrics["mse"]
                - short.train(single(short.space, 0, 0), rung=rung, seed=seed).metrics["mse"]
            )
            for seed in range(2)
        ]
        by_hand.append(np.mean(values))
    assert table.gain[layer, option] in by_hand


def test_ablation_is_what_the_metric_loses() -> None:
    evaluator = evaluator_of()
    table = make_gains("ablation", evaluator, ProbeConfig(steps=3), fresh=True)
    assert table.facts["trainings"] == 2 * (len(table.options) - 1)
    assert table.facts["unit"] == "mse"
    assert len(set(table.gain[:, 1])) == len(table.layers)


def test_unknown_gains_and_settings() -> None:
    evaluator = evaluator_of()
    with pytest.raises(ConfigError, match="neither a file nor one of uniform, gradient"):
        gains_of("guess", evaluator)
    with pytest.raises(ConfigError, match="no gain method 'guess'"):
        make_gains("guess", evaluator)
    with pytest.raises(ConfigError, match="seeds must be at least 2, got 1: the standard error"):
        ProbeConfig(seeds=1)
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        ShortConfig(steps=0)
