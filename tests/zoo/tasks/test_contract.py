"""What every task promises (zoo/tasks/base.py), run over all of them on tiny data."""

import dataclasses
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from surgeon.errors import ConfigError
from surgeon.zoo.tasks import Batch, Task, create_task, task_class, task_names
from tests.support.training.task_data import CASES, Case, scramble_global_state


@pytest.fixture(params=CASES, ids=lambda case: case.id)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def bound(case: Case, tmp_path: Path) -> tuple[Task, nn.Module]:
    """The task, looked through, and its model."""
    task = create_task(case.task, seed=3, **{**case.data(tmp_path), **case.options})
    task.check()
    return task, task.bind(case.model())


def equal(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_every_task_has_a_case() -> None:
    assert {case.task for case in CASES} == set(task_names())


def test_draws_depend_on_their_number_and_the_seed_alone(
    case: Case, bound: tuple[Task, nn.Module], tmp_path: Path
) -> None:
    task, _ = bound
    train = task.dataset("train")
    draws = [0, len(train) + 1, 5 * len(train)]
    first = [train[draw] for draw in draws]
    scramble_global_state(99)
    again = create_task(case.task, seed=3, **{**case.data(tmp_path), **case.options})
    again.bind(case.model())
    other = again.dataset("train")
    assert all(equal(other[draw], sample) for draw, sample in reversed(list(zip(draws, first, strict=True))))
    different = create_task(case.task, seed=4, **{**case.data(tmp_path), **case.options})
    different.bind(case.model())
    assert not all(equal(different.dataset("train")[draw], sample) for draw, sample in zip(draws, first, strict=True))


def test_drawing_leaves_the_global_generators_alone(bound: tuple[Task, nn.Module]) -> None:
    task, _ = bound
    datasets = task.dataset("train"), task.dataset("val")
    scramble_global_state(1)
    expected = random.random(), float(np.random.rand()), float(torch.rand(()))
    scramble_global_state(1)
    for dataset in datasets:
        _ = dataset[0]
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == expected


def test_training_samples_come_again_differently(case: Case, bound: tuple[Task, nn.Module]) -> None:
    train = bound[0].dataset("train")
    later = [train[index + k * len(train)] for k in range(1, 4) for index in range(2)]
    same = [equal(train[index % 2], sample) for index, sample in enumerate(later)]
    assert not all(same) if case.random_training else all(same)


def test_validation_samples_are_always_the_same(case: Case, bound: tuple[Task, nn.Module], tmp_path: Path) -> None:
    val = bound[0].dataset("val")
    assert all(equal(val[index], val[index + 3 * len(val)]) for index in range(len(val)))
    if case.task != "pattern-detection":  # there they are the training images, moved
        other = create_task(case.task, seed=7, **{**case.data(tmp_path), **case.options})
        other.bind(case.model())
        assert all(equal(val[index], other.dataset("val")[index]) for index in range(len(val)))


def test_limits_keep_so_many_samples(case: Case, tmp_path: Path) -> None:
    options = {**case.data(tmp_path), **case.options}
    task = create_task(case.task, **options, train_limit=2, val_limit=2)
    whole = create_task(case.task, **options)
    for limited in (task, whole):
        limited.bind(case.model())
    assert (len(task.dataset("train")), len(task.dataset("val"))) == (2, 2)
    kept = [task.dataset("val")[index] for index in range(2)]
    every = [whole.dataset("val")[index] for index in range(len(whole.dataset("val")))]
    assert all(any(equal(sample, one) for one in every) for sample in kept)  # with the same noise as in the whole set


def test_a_training_step_and_an_evaluation_run(bound: tuple[Task, nn.Module]) -> None:
    task, model = bound
    train = task.dataset("train")
    batch = task.augment(task.collate([train[draw] for draw in range(4)]), torch.Generator().manual_seed(0))
    output = task.forward(model.train(), batch)
    loss = task.loss(output, batch)
    assert loss.shape == ()
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert any(g.abs().sum() > 0 for g in gradients if g is not None)
    teacher = task.forward(model, batch)
    assert task.distillation_loss(output, teacher).detach().item() == pytest.approx(0, abs=1e-6)

    val = task.dataset("val")
    metrics = task.metrics()
    assert task.primary in metrics
    together = task.collate([val[index] for index in range(len(val))])
    with torch.no_grad():
        predicted = task.predict(model.eval(), together)
    assert task.loss(predicted, together).isfinite()
    task.update(metrics, predicted, together)
    picture = task.picture(together, predicted)
    assert isinstance(picture, Image.Image)
    assert min(picture.size) > 50
    alone = task.metrics()
    for index in range(len(val)):
        batch = task.collate([val[index]])
        with torch.no_grad():
            task.update(alone, task.predict(model, batch), batch)
    for name, metric in metrics.items():  # images of different sizes in one batch count as if each were alone
        assert metric.compute().item() == pytest.approx(alone[name].compute().item(), rel=1e-4), name


def test_equal_parts_of_a_batch_have_losses_that_average_to_its_own(bound: tuple[Task, nn.Module]) -> None:
    task, model = bound
    samples = [task.dataset("train")[draw] for draw in range(4)]
    with torch.no_grad():
        losses = []
        for part in (samples, samples[:2], samples[2:]):
            batch = task.collate(part)
            losses.append(task.loss(task.forward(model.eval(), batch), batch).item())
    assert losses[0] == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-5)


def test_data_sets_go_to_other_processes(bound: tuple[Task, nn.Module]) -> None:
    for split in ("train", "val"):
        dataset = bound[0].dataset(split)
        assert equal(pickle.loads(pickle.dumps(dataset))[1], dataset[1])


def test_metrics_of_two_processes_merge(bound: tuple[Task, nn.Module]) -> None:
    """What torchmetrics does between processes: gather the states of all, then reduce them."""
    task, model = bound
    val = task.dataset("val")
    whole, parts = task.metrics(), [task.metrics(), task.metrics()]
    for index in range(2):
        batch = task.collate([val[index]])
        with torch.no_grad():
            output = task.predict(model.eval(), batch)
        task.update(whole, output, batch)
        task.update(parts[index], output, batch)
    for name, metric in whole.items():
        parts[0][name].merge_state(parts[1][name])
        assert parts[0][name].compute().item() == pytest.approx(metric.compute().item(), rel=1e-5), name


def test_unknown_options_are_named(case: Case) -> None:
    with pytest.raises(ConfigError, match="has no option 'sigmar'"):
        create_task(case.task, sigmar=1)


def test_every_option_is_documented(root: Path) -> None:
    text = (root / "docs/tasks.md").read_text()
    common, *sections = text.split("\n## ")[1:]
    by_name = {section.split("\n")[0]: section for section in sections}
    assert set(by_name) == set(task_names())
    for name in task_names():
        options = [field.name for field in dataclasses.fields(task_class(name).config_class)]
        missing = [option for option in options if f"`{option}`" not in common + by_name[name]]
        assert missing == [], name
