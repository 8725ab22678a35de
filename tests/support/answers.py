"""Answers of `surgeon try` that nobody had to train for."""

from typing import Any

from surgeon.zoo.trial.answer import Answer, ArmCost


def make_answer(original: list[float], converted: list[float], **changes: Any) -> Answer:
    costs = {
        "original": ArmCost(flops=100, params=10, step_seconds=0.1),
        "converted": ArmCost(flops=108, params=11, step_seconds=0.14),
    }
    values: dict[str, Any] = {"primary": "top1", "higher_is_better": True, "stopped": "seeds", "seconds": 1.0}
    values |= {
        "model": "net",
        "task": "classification",
        "becomes": "all to acda",
        "replaced": 2,
        "steps": 9,
        "epochs": 2.0,
    }
    values |= {"batch_size": 4, "samples": {"train": 8, "val": 4000, "choose": 2000, "judge": 2000}, "costs": costs}
    values |= {"rates": dict.fromkeys(costs, 1e-3), "swept": {arm: {"0.001": 0.5} for arm in costs}}
    return Answer(
        **values
        | {"seeds": list(range(len(original))), "scores": {"original": original, "converted": converted}}
        | changes
    )
