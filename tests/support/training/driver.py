"""Runs of fine-tuning in processes of their own: killed and taken up again, or several processes together.

`kill FOLDER MOMENTS SEED` prints what became of every run that was killed; `train FOLDER` trains once, in as many processes as
there are.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from surgeon.zoo.finetune import FinetuneConfig, finetune
from surgeon.zoo.finetune.state import read_log
from tests.support.training.tasks import converted, regression

KILLED = FinetuneConfig(
    epochs=20,
    batch_size=4,
    accumulate=1,
    lr=1e-2,
    eval_every="15",
    checkpoint_every="20",
    log_every=1,
    ema=0.9,
    workers=0,
    recalibrate=4,
)
TOGETHER = FinetuneConfig(
    epochs=6, batch_size=4, accumulate=2, lr=1e-2, eval_every="3", log_every=1, new_first="2", device="cpu"
)


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of every logged step."""
    return [(row["step"], row["loss"]) for row in read_log(folder / "training" / "log.jsonl") if "loss" in row]


def outcome(folder: Path) -> dict[str, Any]:
    """What must not depend on kills."""
    weights = load_file(folder / "model.safetensors")
    summary = json.loads((folder / "training" / "summary.json").read_text())
    return {
        "weights": {name: value.double().flatten().tolist() for name, value in weights.items()},
        "metrics": summary["result"]["metrics"],
        "kept": summary["kept_step"],
        "losses": losses(folder),
    }


def _train(folder: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    resume = (folder / "training" / "run.json").is_file()
    finetune(converted("pafu"), regression(), KILLED, folder, resume=resume)


def kill(folder: Path, moments: int, seed: int) -> dict[str, Any]:
    """An unbroken run, then runs that are killed once or twice at random moments and taken up again."""
    context = multiprocessing.get_context("fork")

    def child(where: Path) -> Any:
        process = context.Process(target=_train, args=(where,))
        process.start()
        return process

    started = time.perf_counter()
    whole = child(folder / "whole")
    whole.join()
    length = time.perf_counter() - started
    expected = outcome(folder / "whole")
    draw = random.Random(seed)
    result: dict[str, Any] = {"seconds": length, "killed": 0, "equal": []}
    attempts = 0
    while result["killed"] < moments:
        where = folder / f"run{attempts}"  # its own: a run that has ended cannot be killed any more
        attempts += 1
        for _ in range(draw.choice((1, 2))):
            process = child(where)
            process.join(draw.uniform(0.05, 0.95) * length)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                result["killed"] += 1
            else:  # the machine is faster now than it was for the whole run
                length *= 0.8
            process.join()
        process = child(where)
        process.join()
        result["equal"].append(process.exitcode == 0 and outcome(where) == expected)
    return result


def main(arguments: Sequence[str]) -> None:
    mode, folder = arguments[0], Path(arguments[1])
    if mode == "kill":
        print(json.dumps(kill(folder, int(arguments[2]), int(arguments[3]))))
    else:
        finetune(converted("acda", norms=False, norm=None), regression(noise=0.0), TOGETHER, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
