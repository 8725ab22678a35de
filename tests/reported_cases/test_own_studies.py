"""`PlacementSampler` in a user's own study: threads, values that are not finite, trials that are done, fixed parameters."""

import warnings
from collections import Counter

import numpy as np
import optuna
import pytest
from optuna.samplers import PartialFixedSampler
from optuna.trial import FixedTrial

from surgeon.search import PlacementSampler
from surgeon.search.placement.problem import Ints
from tests.support.search.toys import toy_problem, toy_space

SPACE = toy_space()
PROBLEM = toy_problem(SPACE)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def value_of(placement: Ints) -> float:
    return float(np.count_nonzero(placement) + 0.1 * placement.sum())


def begun(trials: int, jobs: int = 1) -> tuple[PlacementSampler, optuna.Study]:
    sampler = PlacementSampler(SPACE, PROBLEM)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(lambda trial: value_of(sampler.suggest(trial)), n_trials=trials, n_jobs=jobs)
    return sampler, study


def test_threads_propose_nothing_twice() -> None:
    _, study = begun(14, jobs=3)
    assert max(Counter(trial.user_attrs["hash"] for trial in study.trials).values()) == 1
    assert all(max(trial.constraints.values()) <= 0 for trial in study.trials)


def test_values_that_are_not_finite_teach_nothing() -> None:
    sampler, study = begun(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (float("inf"), -float("inf"), float("inf")):
            trial = study.ask()
            sampler.suggest(trial)
            study.tell(trial, value)
        study.optimize(lambda trial: value_of(sampler.suggest(trial)), n_trials=3)
    assert all(max(trial.constraints.values()) <= 0 for trial in study.trials)


def test_a_trial_that_is_done_says_its_placement() -> None:
    """As in Optuna's own `objective(study.best_trial)`."""
    sampler, study = begun(9)
    assert value_of(sampler.suggest(study.best_trial)) == study.best_value
    assert value_of(sampler.suggest(FixedTrial(study.best_params))) == study.best_value


@pytest.mark.filterwarnings("ignore:PartialFixedSampler is experimental")
def test_a_layer_that_another_sampler_fixes_stays_as_it_says() -> None:
    sampler, study = begun(1)
    layer = SPACE.layers[0]
    study.sampler = PartialFixedSampler({layer: "acda"}, sampler)
    study.optimize(lambda trial: value_of(sampler.suggest(trial)), n_trials=3)
    told = [trial.user_attrs["placement"] for trial in study.trials[1:]]
    assert [trial.params[layer] for trial in study.trials[1:]] == ["acda"] * 3
    assert all(layer in placement for placement in told)
