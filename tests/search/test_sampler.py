"""Samplers of placements: parameters that are the decisions, budgets that hold, and Optuna's own tools on what they found."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import optuna
import pytest
from optuna.samplers import BruteForceSampler, RandomSampler, TPESampler
from optuna.trial import TrialState

import surgeon.search
from surgeon.costs.table import Option
from surgeon.errors import ConfigError
from surgeon.search import PlacementSampler
from surgeon.search.evaluate.evaluator import TableEvaluator
from surgeon.search.placement.place import gain_of
from surgeon.search.placement.problem import InfeasibleError, Problem
from surgeon.search.run import Search
from surgeon.search.sampling.parameters import DEFAULT, Parameters, constraints
from surgeon.search.sampling.sampler import BudgetedSampler, published
from surgeon.search.sampling.tuners import NAMES, RepairedSampler, make_sampler
from surgeon.search.space import Space
from surgeon.search.study.study import OtherStudyError
from tests.support.search.toys import toy_gains, toy_problem, toy_search, toy_space, toy_table

if TYPE_CHECKING:
    from surgeon.search.gate import Gate

OTHERS = ("optuna.samplers:TPESampler", "tests.support.search.tasks:unseeded")
SPACE = Space(
    layers=("a", "b.c"),
    stages=("stage1", "stage2"),
    options=(
        Option("acda", {"atoms": 6, "scales": 3}),
        Option("acda", {"atoms": 4, "scales": 1}),
        Option("acda", {"atoms": 6, "scales": 1}),
        Option("sekg", {}),
        Option("sekg", {"kernel_groups": 4}),
        Option("pafu", {"group_size": 4}),
    ),
    allowed=np.array([[True] * 7, [True, True, False, True, False, True, False]]),
)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_the_papers_placements_come_first_with_the_first_option_that_is_within_the_budgets() -> None:
    layers = toy_space().layers
    space = replace(toy_space(), papers={"acda": frozenset(layers[4:]), "pafu": frozenset({"layer1", "layer4"})})
    wide = toy_problem(space, share=2.0)
    names = [space.names(one.placement) for one in PlacementSampler(space, wide).prelude(wide) if one.source == "paper"]
    assert names == [dict.fromkeys(layers[4:], space.labels[1]), dict.fromkeys(("layer1", "layer4"), space.labels[2])]
    narrow = toy_problem(space, share=2.0, max_layers=3)
    assert [space.names(one) for one in published(space, narrow)] == names[1:]
    assert published(toy_space(), wide) == []


class MovingGate:
    """A gate whose memory limit sinks whenever it is read, as after refusals by the whole trace."""

    def __init__(self, problem: Problem) -> None:
        self._problem, self._limit = problem, problem.limit("memory") or 0

    @property
    def problem(self) -> Problem:
        self._limit -= 10**4
        return self._problem.limited({"memory": self._limit})


def test_a_study_starts_as_documented_also_if_the_limits_move() -> None:
    space = replace(toy_space(), papers={"pafu": frozenset({"layer1", "layer4"})})
    sampler = PlacementSampler(space, cast("Gate", MovingGate(toy_problem(space, share=1.0))))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(lambda trial: float(sampler.suggest(trial).sum()), n_trials=11)
    sources = [trial.user_attrs["source"] for trial in study.trials]
    assert sources[:9] == ["original", *4 * ["optimum"], "paper", *3 * ["random"]]
    assert not {"optimum", "paper", "random"} & set(sources[9:])


# --- parameters ---------------------------------------------------------------------------------------------------


def test_parameters_are_the_decisions_and_nothing_else() -> None:
    parameters = Parameters(SPACE)
    assert {name: one.choices for name, one in parameters.distributions.items()} == {
        "a": ("keep", "acda", "sekg", "pafu"),
        "a.atoms": (4, 6),
        "a.scales": (1, 3),
        "a.kernel_groups": (DEFAULT, 4),
        "b.c": ("keep", "acda", "sekg"),  # pafu has but one group size, sekg of this layer but one option
        "b.c.scales": (1, 3),
    }
    assert parameters.of(np.array([0, 0])) == {"a": "keep", "b.c": "keep"}
    assert parameters.of(np.array([4, 1])) == {"a": "sekg", "a.kernel_groups": DEFAULT, "b.c": "acda", "b.c.scales": 3}
    for i, j in np.argwhere(SPACE.allowed):
        placement = np.zeros(2, dtype=np.int64)
        placement[i] = j
        found = parameters.placement(parameters.of(placement))
        assert found is not None
        assert np.array_equal(found, placement)


def test_odd_combinations_become_the_nearest_option_and_missing_ones_none() -> None:
    parameters = Parameters(SPACE)
    odd = parameters.placement({"a": "acda", "a.atoms": 4, "a.scales": 3, "b.c": "keep"})
    assert odd is not None
    assert SPACE.labels[odd[0]] in (
        "acda(atoms=6, scales=3)",
        "acda(atoms=4, scales=1)",
        SPACE.labels[1],
        SPACE.labels[2],
    )
    assert parameters.placement({"a": "acda", "a.atoms": 4, "b.c": "keep"}) is None
    assert parameters.placement({"a": "keep"}) is None
    assert parameters.placement({"a": "something", "b.c": "keep"}) is None


def test_one_name_for_two_things_is_refused() -> None:
    twice = Space(
        layers=("a", "a.atoms"), stages=("s", "s"), options=SPACE.options[:3], allowed=np.ones((2, 4), dtype=bool)
    )
    with pytest.raises(ConfigError, match=r"a\.atoms is a layer and an option of another one"):
        _ = Parameters(twice).distributions


def test_constraints_say_how_far_over_the_budgets() -> None:
    space = toy_space()
    problem = toy_problem(space, max_layers=1)
    rng = np.random.default_rng(0)
    for _ in range(50):
        placement = np.array([rng.choice(np.flatnonzero(row)) for row in space.allowed])
        found = constraints(problem, placement)
        assert set(found) == {"flops", "params", "memory", "layers"}
        assert all(value <= 0 for value in found.values()) == bool(problem.feasible(placement)[0])
    assert constraints(problem.limited({"flops": None, "params": None}), placement).keys() == {"memory", "layers"}


# --- proposals ----------------------------------------------------------------------------------------------------


def proposals(name: str, seed: int, trials: int) -> int:
    """How many trials of a study under a budget of its own were proposed; every one is checked."""
    space = toy_space(6)
    problem = toy_problem(space, seed, share=float(np.random.default_rng(seed).uniform(0.2, 1.2)))
    true = toy_gains(space, seed)
    sampler = make_sampler(name, space, problem, toy_table(space, seed), seed=seed)
    trained: list[bytes] = []

    def objective(trial: optuna.Trial) -> float:
        placement = sampler.suggest(trial)
        assert problem.feasible(placement)[0]
        trained.append(placement.tobytes())
        assert sampler.parameters.of(placement) == trial.params
        assert all(value <= 0 for value in trial.constraints.values())
        return gain_of(true, placement)

    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(objective, n_trials=trials)
    assert len(trained) == len(set(trained))  # nothing twice
    return len(trained)


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_no_proposal_is_over_budget(name: str) -> None:
    assert sum(proposals(name, seed, 12) for seed in range(2)) == 24


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_no_proposal_of_ten_thousand_is_over_budget(name: str) -> None:
    made, seed = 0, 0
    while made < 10_000:
        made, seed = made + proposals(name, seed, 50), seed + 1


@pytest.mark.parametrize("name", NAMES)
def test_another_process_goes_on_with_the_same_proposals(name: str) -> None:
    space = toy_space()
    true, problem = toy_gains(space), toy_problem(space)

    def begin() -> tuple[optuna.Study, BudgetedSampler]:
        sampler = make_sampler(name, space, problem, toy_table(space), seed=3)
        return optuna.create_study(direction="maximize", sampler=sampler, study_name="x"), sampler

    def go_on(study: optuna.Study, sampler: BudgetedSampler, trials: int) -> list[dict[str, Any]]:
        study.optimize(lambda trial: gain_of(true, sampler.suggest(trial)), n_trials=trials)
        return [trial.params for trial in study.trials]

    whole = go_on(*begin(), 11)
    broken, sampler = begin()
    go_on(broken, sampler, 9)
    again, fresh = begin()
    again.add_trials(broken.trials)
    assert go_on(again, fresh, 2) == whole


def test_own_parameters_beside_the_placement_and_enqueued_ones() -> None:
    space = toy_space()
    sampler = PlacementSampler(space, toy_problem(space), toy_table(space))

    def objective(trial: optuna.Trial) -> float:
        return float((sampler.suggest(trial) != 0).sum()) + trial.suggest_float("lr", 0.0, 1.0)

    study = optuna.create_study(sampler=sampler)
    study.enqueue_trial({"layer1": "sekg", "layer2": "keep"})
    study.optimize(objective, n_trials=10)
    assert all(0 <= trial.params["lr"] <= 1 for trial in study.trials)
    first = study.trials[0]
    assert (first.params["layer1"], first.params["layer2"]) == ("sekg", "keep")
    assert first.user_attrs["placement"]["layer1"] == "sekg"
    assert Counter(trial.user_attrs["source"] for trial in study.trials)["enqueued"] == 1
    with pytest.raises(ConfigError, match="has another sampler"):
        sampler.suggest(optuna.create_study().ask())


def test_what_is_enqueued_over_budget_is_not_trained(tmp_path: Path) -> None:
    search = toy_search(tmp_path / "s.jsonl", trials=3)
    search.open()
    everything = np.array([np.flatnonzero(row)[-1] for row in search.space.allowed])
    assert not search.problem.feasible(everything)[0]
    search.file.study.enqueue_trial(search.sampler.parameters.of(everything))
    search.run()
    refused = search.file.records()[0]
    assert (refused.state, refused.attributes["refused"]) == ("refused", ["it is over budget"])
    assert refused.hash not in (tmp_path / "calls.txt").read_text()
    assert search.file.study.best_trial.number != 0


# --- other samplers -----------------------------------------------------------------------------------------------


class Broken(RandomSampler):
    """Fails in one way or another."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def sample_independent(self, *args: Any, **options: Any) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, r"leaves layer0 out: got None, expected one of keep, acda, pafu"),
        ("conv", r"leaves layer0 out: got 'conv'"),
        (ValueError("nothing to sample"), r"the sampler repaired failed: ValueError: nothing to sample"),
    ],
)
def test_a_sampler_that_leaves_parameters_out_is_one_error(value: Any, said: str) -> None:
    space = toy_space()
    with pytest.raises(ConfigError, match=said):
        RepairedSampler(Broken(value), space, toy_problem(space)).check(1)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_sampler_that_goes_by_the_trials_own_parameters() -> None:
    space = toy_space(2)
    problem = toy_problem(space, share=9.0)
    sampler = RepairedSampler(BruteForceSampler(seed=0), space, problem, optima=1, random=0)
    study = optuna.create_study(sampler=sampler)
    study.optimize(lambda trial: float(sampler.suggest(trial).sum()), n_trials=12)
    assert len({tuple(one.placement) for one in sampler.known(study)}) == 12  # all there are
    assert Counter(trial.state for trial in study.trials) == {TrialState.COMPLETE: 12}


def test_optunas_samplers_alone_go_by_the_constraints() -> None:
    space = toy_space()
    problem, true, parameters = toy_problem(space, share=1.0), toy_gains(space), Parameters(space)

    def objective(trial: optuna.Trial) -> float:
        placement = parameters.suggest(trial)
        for name, value in constraints(problem, placement).items():
            trial.set_constraint(name, value)
        return gain_of(true, placement)

    study = optuna.create_study(direction="maximize", sampler=TPESampler(seed=0))
    study.optimize(objective, n_trials=30)
    best = parameters.placement(study.best_params)
    assert best is not None
    assert problem.feasible(best)[0]
    assert not all(problem.feasible(parameters.placement(trial.params))[0] for trial in study.trials)


# --- what Optuna makes of a study -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Search:
    """A search in which one layer alone matters."""
    search = toy_search(tmp_path_factory.mktemp("searched") / "s.jsonl", trials=30)
    weight = np.zeros(8)
    weight[2] = 5.0
    search.evaluator = TableEvaluator(
        search.space, lambda placement: [float((placement != 0) @ weight) + 0.01 * placement.sum()]
    )
    search._identity["evaluator"] = dict(search.evaluator.identity())
    search.open()
    search.run()
    return search


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_importances_and_plots_show_layers_by_name(searched: Search) -> None:
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    study = searched.file.study
    found = optuna.importance.get_param_importances(study)
    assert set(found) == set(searched.space.layers)
    assert next(iter(found)) == "layer2"
    assert study.best_params["layer2"] != "keep"
    axes = plots.plot_param_importances(study)
    assert {label.get_text() for label in axes.get_yticklabels()} == set(searched.space.layers)
    for plot in (plots.plot_parallel_coordinate, plots.plot_slice, plots.plot_contour):
        assert plot(study, params=["layer1", "layer2"]) is not None
    pyplot.close("all")


def test_plotly_and_pandas_show_layers_by_name(searched: Search) -> None:
    figure = optuna.visualization.plot_param_importances(searched.file.study)
    assert set(figure.data[0].y) == set(searched.space.layers)
    table = searched.file.study.trials_dataframe()
    assert {f"params_{layer}" for layer in searched.space.layers} <= set(table.columns)


# --- several objectives -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "optuna.samplers:TPESampler"])
def test_a_pareto_front_in_optunas_terms(name: str, tmp_path: Path) -> None:
    search = toy_search(tmp_path / "s.jsonl", sampler=name, trials=15, resources=("flops",))
    search.open()
    assert search.run().evaluated == 15
    study = search.file.study
    assert [one.name for one in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    true = toy_gains(search.space)
    for trial in study.trials:
        placement = search.sampler.parameters.placement(trial.params)
        assert placement is not None
        assert search.problem.feasible(placement)[0]
        assert trial.values == pytest.approx([gain_of(true, placement), search.problem.costs(placement)["flops"]])
    front = sorted((trial.values[1], trial.values[0]) for trial in study.best_trials)
    assert len(front) >= 3
    assert [value for _, value in front] == sorted(value for _, value in front)
    assert search.file.front() == tuple(sorted(trial.number for trial in study.best_trials))
    alone = toy_search(tmp_path / "s.jsonl", sampler=name, trials=15)
    with pytest.raises(OtherStudyError, match="objectives"):
        alone.open(resume=True)


def test_objectives_that_the_sampler_knows_nothing_of() -> None:
    space = toy_space()
    sampler = PlacementSampler(space, toy_problem(space), optima=1, random=0)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    with pytest.raises(
        ConfigError, match=r"one measured objective followed by the costs in resources=, minimized: none are named"
    ):
        study.optimize(lambda trial: (float(sampler.suggest(trial).sum()), 1.0), n_trials=5)
    with pytest.raises(ConfigError, match="no resource 'speed'"):
        PlacementSampler(space, toy_problem(space), resources=["speed"])
    with pytest.raises(InfeasibleError):
        PlacementSampler(space, toy_problem(space).limited({"flops": 1})).prelude(
            toy_problem(space).limited({"flops": 1})
        )


# --- the rest -----------------------------------------------------------------------------------------------------


def test_a_study_without_parameters_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgeon.search.study import identity

    with monkeypatch.context() as patch:
        patch.setattr(identity, "VERSION", 1)
        search = toy_search(tmp_path / "s.jsonl", trials=2)
        search.open()
        search.run()
    with pytest.raises(OtherStudyError, match=r"started by another version of surgeon.*can be viewed.*not resumed"):
        toy_search(tmp_path / "s.jsonl", trials=3).open(resume=True)


def test_the_public_list() -> None:
    assert surgeon.search.__all__ == sorted(surgeon.search.__all__)
    for name in surgeon.search.__all__:
        assert getattr(surgeon.search, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Tuner'"):
        _ = surgeon.search.Tuner
