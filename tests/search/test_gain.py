"""Gain tables as files, and the estimators that need only gradients at birth."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
import torch.nn.functional as F
from optuna.trial import TrialState
from torch import Tensor, nn

import surgeon
from surgeon.errors import ConfigError
from surgeon.search.gains.estimate import ESTIMATORS, _of_moments, gradient_gains
from surgeon.search.gains.gain import GainTable, cache_key, cached, uniform_gains
from surgeon.search.gains.names import DECREASE
from surgeon.search.gains.posterior import Posterior
from surgeon.search.gains.quadratic import Walk, decrease, walk_of
from surgeon.search.placement.place import gain_of, optimum
from surgeon.search.sampling.sampler import PlacementSampler
from surgeon.search.space import SpaceConfig, make_space
from surgeon.surgery.rewrite import dynamic_layers
from surgeon.zoo.finetune import FinetuneConfig
from tests.support.search.toys import toy_gains, toy_problem, toy_space, toy_table


def test_tables_survive_their_file(tmp_path: Path) -> None:
    space = toy_space()
    table = toy_table(space)
    table.write(tmp_path / "gains.json")
    read = GainTable.read(tmp_path / "gains.json")
    assert np.array_equal(read.gain, table.gain)
    assert np.array_equal(read.error, table.error)
    assert (read.layers, read.options, read.estimator) == (table.layers, table.options, "toy")
    again = GainTable.read(tmp_path / "gains.json").for_space(space)
    assert np.array_equal(again.gain, table.gain)
    assert [path.name for path in tmp_path.iterdir()] == ["gains.json"]


def test_a_table_is_brought_into_the_order_of_a_space() -> None:
    space = toy_space(4)
    table = toy_table(space)
    values = table.to_dict()
    values["gains"] = dict(reversed(values["gains"].items()))
    values["options"] = values["options"][::-1]
    turned = GainTable.from_dict(values)
    assert turned.layers == table.layers[::-1]
    assert np.array_equal(turned.for_space(space).gain, table.gain)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "x"}, "surgeon-gains"),
        ({"version": 2}, "version"),
        ({"gains": {"a": {"sekg": [1.0]}}}, "standard error"),
        ({"gains": {"a": {"sekg": [float("nan"), 0]}}}, "finite"),
        ({"gains": {"a": {"sekg": [1, -1]}}}, "negative"),
        ({"gains": 3}, "standard error"),
    ],
)
def test_wrong_tables(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    good = {
        "format": "surgeon-gains",
        "version": 1,
        "estimator": "x",
        "options": ["sekg"],
        "gains": {"a": {"sekg": [1, 0]}},
    }
    assert GainTable.from_dict(good).gain.tolist() == [[0, 1]]
    (tmp_path / "g.json").write_text(json.dumps(good | change))
    with pytest.raises(ConfigError, match=words) as caught:
        GainTable.read(tmp_path / "g.json")
    assert "g.json" in str(caught.value)


def test_tables_are_kept_by_what_they_were_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path))
    space = toy_space()
    keys = {cache_key(space, "fisher", seed=0), cache_key(space, "snr", seed=0), cache_key(space, "fisher", seed=1)}
    assert len(keys) == 3
    key = cache_key(space, "fisher", seed=0)
    made: list[int] = []

    def make() -> GainTable:
        made.append(1)
        return toy_table(space)

    for _ in range(2):
        assert np.array_equal(cached(key, make).gain, toy_table(space).gain)
    assert made == [1]
    next((tmp_path / "gains").iterdir()).write_text("{")
    cached(key, make)
    assert made == [1, 1]


def test_uniform_gains_replace_what_the_budgets_allow() -> None:
    space = toy_space()
    found = optimum(toy_problem(space, share=3.0), uniform_gains(space).gain)
    assert found is not None
    assert (found != 0).all()


# --- estimators ---------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two convolutions; what the second one computes does not reach the output."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Conv2d(2, 6, 3, padding=1)
        self.deaf = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.used(x).relu()
        x = x + 0.0 * self.deaf(x)
        return self.head(x.mean(dim=(2, 3)))


FEW_STEPS = Walk(rates=(1e-3,) * 10)


def data(batches: int, size: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    result = []
    for _ in range(batches):
        x = torch.randn(size, 2, 10, 10, generator=generator)
        result.append({"input": x, "target": (x[:, 0] * x[:, 1]).mean(dim=(1, 2))})
    return result


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(model(batch["input"]).squeeze(1), batch["target"])


def test_gradients_find_the_layer_that_matters() -> None:
    torch.manual_seed(0)
    model = Two()
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    config = SpaceConfig(types=("acda", "pafu", "sekg"), atoms=(4,), scales=(1,), group_sizes=(3,))
    space = make_space_of(model, config)
    tables = gradient_gains(model, space, loss, data(16), walk=FEW_STEPS, input_size=10)
    assert set(tables) == set(ESTIMATORS)
    used, deaf = space.layers.index("used"), space.layers.index("deaf")
    for name, table in tables.items():
        for j in range(1, len(space.labels)):
            assert table.gain[used, j] > table.gain[deaf, j], (name, space.labels[j])
            assert table.gain[deaf, j] == 0
            assert table.error[used, j] > 0
        assert table.facts["batches"] == 16
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    again = gradient_gains(model, space, loss, data(16), estimators=["fisher"], input_size=10)
    assert np.array_equal(again["fisher"].gain, tables["fisher"].gain)


def make_space_of(model: nn.Module, config: SpaceConfig) -> Any:
    from surgeon.sites.sites import find_sites

    return make_space(model, config, sites=find_sites(model, input_size=(2, 10, 10)).convs)


def test_the_gradient_is_that_of_the_converted_model() -> None:
    torch.manual_seed(0)
    model = Two()
    space = make_space_of(model, SpaceConfig(types=("sekg",)))
    batches = data(4)
    table = gradient_gains(model, space, loss, batches, estimators=["gradient"], input_size=10)["gradient"]
    converted, _ = surgeon.convert(model, recipe=space.recipe([1, 1]), input_size=10)
    converted.eval()
    for layer in dynamic_layers(converted).values():
        layer.train()  # its generator sees what it sees in training
    torch.stack([loss(converted, batch) for batch in batches]).mean().backward()
    layer: Any = converted.get_submodule("used")
    whole = torch.cat([p.grad.flatten() for _, p in layer.new_parameters() if p.grad is not None]).norm()
    assert table.gain[space.layers.index("used"), 1] == pytest.approx(float(whole), rel=1e-4)


def test_noise_alone_has_no_gain() -> None:
    """Targets that do not depend on the input: with the head at their mean no gradient stands out."""
    torch.manual_seed(0)
    model = Two()
    with torch.no_grad():
        model.head.weight.mul_(0.01)
        model.head.bias.zero_()
    space = make_space_of(model, SpaceConfig(types=("sekg",)))
    generator = torch.Generator().manual_seed(1)
    noise = [{"input": b["input"], "target": torch.randn(8, generator=generator)} for b in data(64)]
    signal = [{"input": b["input"], "target": b["input"][:, 0].amax(dim=(1, 2)) - 2.0} for b in data(64)]
    i = space.layers.index("used")
    names = ["snr", "nqm"]
    low, high = (
        gradient_gains(model, space, loss, b, estimators=names, walk=FEW_STEPS, input_size=10) for b in (noise, signal)
    )
    assert abs(low["snr"].gain[i, 1]) < 1.5
    assert high["snr"].gain[i, 1] > 5 * max(low["snr"].gain[i, 1], 1.0)
    assert high["nqm"].gain[i, 1] > 5 * abs(low["nqm"].gain[i, 1])
    # steps far too long for this loss do harm, and the more noise, the less signal it takes
    far = Walk(rates=(1e8,) * 10)
    for batches in (noise, signal):
        table = gradient_gains(model, space, loss, batches, estimators=["nqm"], walk=far, input_size=10)["nqm"]
        assert table.gain[i, 1] < 0


def test_the_walk_slows_the_last_weight_of_a_generator() -> None:
    """As training does: ACDA's has 576 inputs, SEKG's as many as the layer has channels, too few to be slowed."""
    torch.manual_seed(0)
    model = Two()
    space = make_space_of(model, SpaceConfig(types=("acda", "sekg")))
    plain, slowed = (
        gradient_gains(
            model, space, loss, data(8), estimators=["nqm"], walk=Walk(rates=(1e-3,), fan_in=on), input_size=10
        )["nqm"].gain[space.layers.index("used")]
        for on in (False, True)
    )
    for label, before, after in zip(space.labels[1:], plain[1:], slowed[1:], strict=True):
        assert before > 0
        assert (0 < after < before) if label.startswith("acda") else (after == before), label


def test_the_loss_is_recorded_and_fisher_is_no_decrease_of_it() -> None:
    torch.manual_seed(0)
    model = Two()
    space = make_space_of(model, SpaceConfig(types=("sekg",)))
    batches = data(4)
    tables = gradient_gains(model, space, loss, batches, walk=FEW_STEPS, input_size=10)
    mean = float(np.mean([float(loss(model.eval(), batch).detach()) for batch in batches]))
    assert tables["nqm"].facts["loss"] == pytest.approx(mean, rel=1e-4)
    assert [name for name, table in tables.items() if table.facts["unit"] == DECREASE] == ["nqm"]
    few, many = (_of_moments("fisher", torch.randn(16, n).double(), 32, 0.1) for n in (10**4, 10**5))
    assert few > 1  # of pure noise
    assert many == pytest.approx(10 * few, rel=0.1)


def test_what_estimators_refuse() -> None:
    model = Two()
    space = make_space_of(model, SpaceConfig(types=("sekg",)))
    with pytest.raises(ConfigError, match="at least 4 batches"):
        gradient_gains(model, space, loss, data(3), estimators=["fisher"])
    with pytest.raises(ConfigError, match="walk"):
        gradient_gains(model, space, loss, data(5))
    with pytest.raises(ConfigError, match="'hessian'"):
        gradient_gains(model, space, loss, data(4), estimators=["hessian"])
    with pytest.raises(ConfigError, match="number of samples"):
        gradient_gains(model, space, loss, [3, 3, 3, 3], estimators=["fisher"])


# --- the noisy quadratic model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_quadratic_model_foretells_sgd(momentum: float) -> None:
    """A linear regression with noise of variance 1, where the Fisher matrix is the Hessian: many trainings, averaged."""
    rng = torch.Generator().manual_seed(0)
    size, steps, rate, runs = 16, 6, 0.02, 20000
    config = FinetuneConfig(
        opt="momentum", lr=rate, momentum=momentum, new_lr_scale=1.0, max_steps=steps, sched="cosine", warmup="0"
    )
    walk = walk_of(config, 1000)
    scale = torch.tensor([3.0, 1.0, 0.3], dtype=torch.float64)
    true = torch.tensor([0.1, -0.1, 0.2], dtype=torch.float64)

    def gradients(x: Tensor) -> Tensor:
        inputs = torch.randn(len(x), size, 3, generator=rng, dtype=torch.float64) * scale
        residual = (inputs * (x - true)[:, None]).sum(dim=2) - torch.randn(
            len(x), size, generator=rng, dtype=torch.float64
        )
        return (residual[..., None] * inputs).mean(dim=1)

    rates = [rate * 0.5 * (1 + np.cos(np.pi * step / steps)) for step in range(steps)]
    x, speed = torch.zeros(runs, 3, dtype=torch.float64), torch.zeros(runs, 3, dtype=torch.float64)
    for one in rates:
        speed = momentum * speed + gradients(x)
        x = x - one * speed
    measured = 0.5 * float((scale**2 * (true**2 - (x - true) ** 2)).sum(dim=1).mean())
    start = gradients(torch.zeros(1000, 3, dtype=torch.float64)).numpy()
    told = np.sinh(decrease(start @ start.T, walk, size))
    assert told == pytest.approx(measured, rel=0.3)
    promised = sum(walk.rates) / (1 - momentum) * float(np.square(start.mean(axis=0)).sum())  # by the gradient alone
    assert abs(told - measured) < 0.3 * abs(promised - measured)


def test_the_quadratic_model_is_exact_where_it_holds() -> None:
    """Many walks of a quadratic loss with Gaussian noise, from its gradients alone."""
    rng = np.random.default_rng(0)
    samples, mean = 2, np.array([0.5, -1.0])
    root = np.array([[1.0, 0.5], [0.0, 2.0]])
    hessian = samples * root.T @ root
    for walk in (Walk(rates=(0.01, 0.02, 0.005)), Walk(rates=(0.005,) * 12, momentum=0.9, accumulate=2)):
        place, speed = np.zeros((20000, 2)), np.zeros((20000, 2))
        for rate in walk.rates:
            noise = rng.standard_normal((20000, 2)) @ root / np.sqrt(walk.accumulate)
            speed = walk.momentum * speed + mean + place @ hessian + noise
            place = place - rate * speed
        losses = place @ mean + 0.5 * ((place @ hessian) * place).sum(axis=1)
        draws = mean + rng.standard_normal((1000, 2)) @ root
        assert np.sinh(decrease(draws @ draws.T, walk, samples)) == pytest.approx(-losses.mean(), rel=0.15)


@pytest.mark.parametrize("opt", ["momentum", "adamw"])
def test_a_walk_is_what_the_optimizer_does_with_a_constant_gradient(opt: str) -> None:
    from surgeon.zoo.finetune.optimizer import make_optimizer

    config = FinetuneConfig(
        opt=opt, lr=0.02, new_lr_scale=0.5, max_steps=40, weight_decay=0.0, sched="constant", warmup="0"
    )
    walk = walk_of(config, 1000)
    assert walk.adaptive == (opt == "adamw")
    weight = nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer([{"params": [weight]}], config)
    for group in optimizer.param_groups:
        group["lr"] *= config.new_lr_scale
    for _ in range(40):
        weight.grad = torch.ones(1)
        optimizer.step()
    speed = place = 0.0
    for rate in walk.rates:
        speed = walk.momentum * speed + 1.0
        place += config.new_lr_scale * rate * speed
    assert place == pytest.approx(-float(weight.detach()), rel=1e-3)


@pytest.mark.parametrize("estimators", [["nqm"], ["fisher"]])
def test_gradients_that_are_not_finite_are_refused(estimators: list[str]) -> None:
    model = Two()
    space = make_space_of(model, SpaceConfig(types=("sekg",)))
    batches = data(4)
    batches[1]["target"] += float("nan")
    with pytest.raises(ConfigError, match="finite"):
        gradient_gains(model, space, loss, batches, estimators=estimators, walk=FEW_STEPS, input_size=10)


def test_a_walk_follows_the_phases_of_new_parameters() -> None:
    steady = FinetuneConfig(max_steps=8, sched="constant", warmup="0")
    turns = FinetuneConfig(max_steps=8, sched="constant", warmup="0", alternate=3)
    still = [rate == 0 for rate in walk_of(turns, 1000).rates]
    assert still == [True, False, False, False] * 2
    assert not any(rate == 0 for rate in walk_of(steady, 1000).rates)


# --- the posterior ------------------------------------------------------------------------------------------------


def test_the_posterior_learns_the_gains_it_is_shown() -> None:
    space = toy_space()
    true, table = toy_gains(space), toy_table(space, noise=1.5)
    rng = np.random.default_rng(0)
    shown = [np.array([rng.choice(np.flatnonzero(row)) for row in space.allowed]) for _ in range(80)]
    posterior = Posterior(space, table, shown, [gain_of(true, p) for p in shown])
    learned = posterior.draw(np.random.default_rng(1), 0.0)
    inside = space.allowed.copy()
    inside[:, 0] = False
    before = np.corrcoef(table.gain[inside], true[inside])[0, 1]
    after = np.corrcoef(learned[inside], true[inside])[0, 1]
    assert after > 0.95 > before
    assert (learned[:, 0] == 0).all()
    few = Posterior(space, table, shown[:3], [gain_of(true, p) for p in shown[:3]])
    spread = [
        np.std([p.draw(np.random.default_rng(k))[inside] for k in range(20)], axis=0).mean() for p in (few, posterior)
    ]
    assert spread[0] > 2 * spread[1]


def test_what_was_measured_is_not_proposed_again_while_there_is_anything_else() -> None:
    space = toy_space(3)
    problem = toy_problem(space, share=5.0)
    every = [np.array(one) for one in itertools.product(*(np.flatnonzero(row) for row in space.allowed))]
    true = toy_gains(space)
    sampler = PlacementSampler(space, problem, toy_table(space), optima=1, random=0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(lambda trial: gain_of(true, sampler.suggest(trial)), n_trials=len(every) + 5)
    found = {tuple(one.placement) for one in sampler.known(study)}
    assert found == {tuple(one) for one in every}
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.COMPLETE] * len(every) + [TrialState.PRUNED]  # everything was tried: the study stops
