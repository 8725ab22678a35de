"""Gain tables by method name, cached on disk by the hash of all their inputs."""

from collections.abc import Callable
from typing import Any

from surgeon.errors import DataError
from surgeon.search.evaluate.training import TrainingEvaluator, sample_size
from surgeon.search.gains.estimate import gradient_gains
from surgeon.search.gains.gain import GainTable, cache_key, cached, uniform_gains
from surgeon.search.gains.names import ESTIMATORS, METHODS, check_gains, check_method
from surgeon.search.gains.probe import ProbeConfig, ablation_gains, halving_gains, probe_gains, training_batches
from surgeon.search.gains.quadratic import walk_of
from surgeon.util.progress import OnProgress

TRAINED: dict[str, Callable[..., GainTable]] = {
    "probe": probe_gains,
    "halving": halving_gains,
    "ablation": ablation_gains,
}
GRADIENT_BATCHES = 16


def make_gains(
    method: str,
    evaluator: TrainingEvaluator,
    config: ProbeConfig | None = None,
    *,
    batches: int = GRADIENT_BATCHES,
    progress: OnProgress | None = None,
    fresh: bool = False,
) -> GainTable:
    """The gain table of a method for the evaluator's model, task and space.

    `config` is for the methods that train, `batches` for those that use gradients. An existing table is taken from the cache
    unless `fresh`.
    """
    check_method(method)
    config = config or ProbeConfig()

    def make() -> GainTable:
        if method in TRAINED:
            return TRAINED[method](evaluator, config, progress)
        return _from_gradients(method, evaluator, batches, progress)

    if fresh:
        return make()
    facts: dict[str, Any] = dict(evaluator.identity()) | {"probe": vars(config), "batches": batches}
    facts["unit"] = ESTIMATORS.get(method)
    return cached(cache_key(evaluator.space, method, **facts), make)


def _from_gradients(method: str, evaluator: TrainingEvaluator, count: int, progress: Any) -> GainTable:
    task, base = evaluator.task, evaluator.config.base
    if not len(task.dataset("train")):
        raise DataError(f"task {task.name}: the train split has no samples")
    batches = training_batches(task, count, base.batch_size, base.seed)
    tables = gradient_gains(
        evaluator.model,
        evaluator.space,
        lambda model, batch: task.loss(task.forward(model, batch), batch),
        batches,
        estimators=[method],
        walk=walk_of(evaluator.config.at(0), len(task.dataset("train"))),
        seed=base.seed,
        input_size=sample_size(task),
        progress=progress,
    )
    return tables[method]


def gains_of(what: str, evaluator: TrainingEvaluator, **options: Any) -> GainTable:
    """A gain table from a file, "uniform", or a method."""
    if what == "uniform":
        return uniform_gains(evaluator.space)
    if what in METHODS:
        return make_gains(what, evaluator, **options)
    check_gains(what)
    return GainTable.read(what).for_space(evaluator.space, what)
