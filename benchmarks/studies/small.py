"""Small networks, trained here first, then converted and trained on beside the original.

The large networks of `trained` lack steps, not capacity; these lack capacity.
"""

import copy
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks._tasks import TASKS
from benchmarks.studies.study import (
    FAST,
    GENTLE,
    SCRATCH,
    Scores,
    Study,
    arms,
    cifar_judge,
    cifar_task,
    denoise_judge,
    split,
    sr_judge,
    sr_task,
)
from benchmarks.studies.trained import real_noise
from surgeon.records.recipe import Rule
from surgeon.zoo import create
from surgeon.zoo.evaluate import evaluate
from surgeon.zoo.finetune import FinetuneConfig, finetune
from surgeon.zoo.tasks import Task, create_task


@cache
def _trained_here(
    build: Callable[[], nn.Module], task: Callable[[Path, Path, int], Task], batch: int, rate: float, material: Path
) -> nn.Module:
    """The network after 2,000 steps on its task, the same for all arms and seeds."""
    torch.manual_seed(0)
    config = FinetuneConfig(
        max_steps=2000,
        epochs=1e6,
        lr=rate,
        keep="last",
        eval_every="100%",
        checkpoint_every="100%",
        recalibrate=0,
        batch_size=batch,
        **SCRATCH,
    )
    with tempfile.TemporaryDirectory() as work:
        return finetune(build(), task(material, Path(work), 100), config).model.eval()


def _restorer_network() -> nn.Module:
    return create("realsr_conv", width=64, inner=32, blocks=2)


def _lenet() -> nn.Module:
    return create("lenet")


def _continued(
    title: str,
    build: Callable[[], nn.Module],
    task: Callable[[Path, Path, int], Task],
    judge: Callable[[nn.Module, Path], Scores],
    needs: tuple[str, ...],
    layers: str,
    size: tuple[int, ...],
    batch: int = 4,
    unit: str = "dB",
    first_rate: float = 2e-3,
) -> Study:
    """A network trained here goes on for as many steps, as it is or converted."""

    def start(material: Path) -> nn.Module:
        return copy.deepcopy(_trained_here(build, task, batch, first_rate, material))

    found = {
        "ACDA": Rule(layers=layers, type="acda"),
        "ACDA, new rate × 1": Rule(layers=layers, type="acda"),
        "SEKG": Rule(layers=layers, type="sekg"),
        "PAFU": Rule(layers=layers, type="pafu", options={"group_size": 4}),
    }
    return Study(
        title=f"{title}, trained for 2,000 steps, converted, and trained on",
        arms=arms(start, size, found),
        task=task,
        judge=judge,
        needs=needs,
        changes=SCRATCH | GENTLE,
        ours={"ACDA, new rate × 1": FAST},
        rates=(5e-4, 1e-3, 2e-3),
        steps=2000,
        batch=batch,
        unit=unit,
    )


BLOCKS = "trunk.blocks.*.conv2"  # where the ACDA paper has its layers


def super_resolution() -> Study:
    options = {"scale": 3, "input": "bicubic", "patch": 48, "loss": "mse"}
    sets = ("sr/T91", "sr/Set5", "sr/Set14")
    task, judge = partial(sr_task, options), partial(sr_judge, options)
    return _continued(
        "×3 super-resolution, restorer of two blocks", _restorer_network, task, judge, sets, BLOCKS, (3, 48, 48)
    )


COLOR_SETS = ("denoise/BSDS500train_color", "denoise/Kodak24", "denoise/CBSD68", "denoise/McMaster")


def denoising() -> Study:
    options = {"sigma": "0-55", "val_sigma": 40, "color": True, "patch": 48, "patches_per_image": 8, "loss": "mse"}

    def task(material: Path, work: Path, seed: int) -> Task:
        train, choose = split(material / "denoise/BSDS500train_color", work)
        return create_task("denoising", seed=seed, train=train, val=choose, **options)

    def judge(model: nn.Module, material: Path) -> Scores:
        scores = {}
        for sigma in (15.0, 50.0):
            found = denoise_judge(options | {"sigma": sigma, "val_sigma": sigma}, model, material)
            scores |= {f"{name} σ {sigma:.0f}": value for name, value in found.items()}
        return scores

    title = "color denoising of any σ from 0 to 55, restorer of two blocks"
    return _continued(title, _restorer_network, task, judge, COLOR_SETS, BLOCKS, (3, 48, 48))


def demosaicking() -> Study:
    options: dict[str, Any] = {"pattern": "GRBG", "patch": 48, "patches_per_image": 8, "loss": "mse"}

    def task(material: Path, work: Path, seed: int) -> Task:
        train, choose = split(material / "denoise/BSDS500train_color", work)
        return create_task("demosaicking", seed=seed, train=train, val=choose, **options)

    def judge(model: nn.Module, material: Path) -> Scores:
        scores = {}
        for name in ("Kodak24", "McMaster"):
            root = material / "denoise" / name
            own = create_task("demosaicking", seed=0, train=root, val=root, **options)
            scores[name] = evaluate(own.bind(model), own, batch_size=1)["psnr"]
        return scores

    return _continued(
        "demosaicking, restorer of two blocks", _restorer_network, task, judge, COLOR_SETS, BLOCKS, (3, 48, 48)
    )


def camera_noise() -> Study:
    big = real_noise()
    return _continued(
        "a camera's noise (PolyU), restorer of two blocks",
        _restorer_network,
        big.task,
        big.judge,
        big.needs,
        BLOCKS,
        (3, 40, 40),
        first_rate=5e-4,  # a higher one leaves dead units: the noise is weak, the start at the identity is nearly right
    )


def classification() -> Study:
    return _continued(
        "CIFAR-10 (JPEG), LeNet",
        _lenet,
        cifar_task,
        cifar_judge,
        TASKS["resnet20_cifar"].needs,
        "conv2",
        (3, 32, 32),
        batch=64,
        unit="% top-1",
    )
