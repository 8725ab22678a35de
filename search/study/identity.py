"""The JSON identity that a study is bound to, and differences between identities."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from surgeon.errors import called

VERSION = 2  # 1: trials without parameters


FLAGS = {  # of surgeon search, by what they set in an identity
    "evaluator.task": "--task",
    "evaluator.training.max_steps": "--steps",
    "evaluator.training.batch_size": "--batch-size",
    "evaluator.training.lr": "--lr",
    "evaluator.training.opt": "--optimizer",
    "evaluator.training.weight_decay": "--weight-decay",
    "evaluator.training.new_lr_scale": "--new-lr-scale",
    "evaluator.training.amp": "--amp",
    "budgets.flops": "--max-flops",
    "budgets.params": "--max-params",
    "budgets.memory": "--max-memory",
    "budgets.latency": "--max-latency",
    "budgets.max_layers": "--max-layers",
    "evaluator.options.seed": "--seed",
    "evaluator.training.seed": "--seed",
    "evaluator.options.data": "--data",
    "sampler": "--sampler",
    "seed": "--seed",
}
FOLLOWS = {"eval_every": "max_steps"}  # differs where another value does


def as_stored(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity after a round trip through a study."""
    found: dict[str, Any] = json.loads(json.dumps({"version": VERSION, **identity}))
    return found


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Differences between two JSON values, in words. What a user wrote ("text") stands for what was read from it.

    At a terminal, values are called by the options that set them.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        if "text" in old and "text" in new and old["text"] != new["text"]:
            old, new = old["text"], new["text"]
            yield f"{_called(where)} is {_short(old)} in the study and {_short(new)} here"
            return
        for key in [*old, *(key for key in new if key not in old)]:
            inner = f"{where}.{key}" if where else str(key)
            if (cause := FOLLOWS.get(key)) is not None and old.get(cause) != new.get(cause):
                continue
            if key not in old or key not in new:
                side = "this search" if key in new else "the study"
                yield f"{_called(inner)} ({_short(new.get(key, old.get(key)))}) is only in {side}"
            else:
                yield from differences(old[key], new[key], inner)
    elif isinstance(old, list) and isinstance(new, list) and all(isinstance(x, str) for x in [*old, *new]):
        gone, come = [x for x in old if x not in new], [x for x in new if x not in old]
        if gone or come or old != new:
            parts = [f"without {', '.join(gone)}"] if gone else []
            parts += [f"with {', '.join(come)}"] if come else []
            yield f"{_called(where)} {' and '.join(parts) or 'in another order'}"
    elif old != new:
        yield f"{_called(where)} is {_short(old)} in the study and {_short(new)} here"


def _called(where: str) -> str:
    option = where.removeprefix("evaluator.options.")
    return called(FLAGS.get(where, where if option == where else f"--task-option {option}"), where)


def _short(value: Any) -> str:
    text = json.dumps(value["text"] if isinstance(value, dict) and "text" in value else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
