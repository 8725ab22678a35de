"""Small networks, trained here first, then converted and trained on beside the original.

The large networks of `trained` lack steps, not capacity; these lack capacity.
"""

import copy
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks._tasks import TASKS
from benchmarks.studies.study import (
    GENTLE,
    PUBLISHED,
    SCRATCH,
    Scores,
    Study,
    arms,
    cifar_judge,
    cifar_task,
    denoise_judge,
    denoise_task,
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


def _wide_restorer() -> nn.Module:
    """92 inner channels in place of 32: as many parameters as with ACDA in the blocks."""
    return create("realsr_conv", width=64, inner=92, blocks=2)


def _lenet() -> nn.Module:
    return create("lenet")


def _wide_lenet() -> nn.Module:
    """44 channels in place of 16: as many parameters as with ACDA in conv2."""
    model = create("lenet")
    model.conv2 = nn.Conv2d(6, 44, 5)
    model.fc1 = nn.Linear(44 * 5 * 5, 120)
    return model


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
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3),
    steps: int = 2000,
    kernels: int = 4,
    wide: Callable[[], nn.Module] | None = None,
    more: Mapping[str, Mapping[str, Any]] | None = None,
) -> Study:
    """A network trained here goes on, as it is or converted; `wide` does alike. `more`: ACDA with other options of fine-tuning."""

    def start(build: Callable[[], nn.Module], material: Path) -> nn.Module:
        return copy.deepcopy(_trained_here(build, task, batch, first_rate, material))

    found = {
        "ACDA": Rule(layers=layers, type="acda"),
        "SEKG": Rule(layers=layers, type="sekg"),
        "PAFU": Rule(layers=layers, type="pafu", options={"group_size": kernels}),
    }
    found |= dict.fromkeys(more or {}, found["ACDA"])
    networks = arms(partial(start, build), size, found)
    return Study(
        title=f"{title}, trained for 2,000 steps, converted, and trained on for {steps:,}",
        arms=networks if wide is None else networks | {WIDE: partial(start, wide)},
        task=task,
        judge=judge,
        needs=needs,
        changes=SCRATCH,
        rates=rates,
        steps=steps,
        batch=batch,
        unit=unit,
        ours=more or {},
        wide=None if wide is None else WIDE,
    )


WIDE = "original, as many parameters as with ACDA"
SR_SETS = ("sr/T91", "sr/Set5", "sr/Set14")
BLOCKS = "trunk.blocks.*.conv2"  # where the ACDA paper has its layers


# --- restorers of two blocks ------------------------------------------------------------------------------------------


def super_resolution() -> Study:
    options = {"scale": 3, "input": "bicubic", "patch": 48, "loss": "mse"}
    task, judge = partial(sr_task, options), partial(sr_judge, options)
    title = "×3 super-resolution, restorer of two blocks"
    return _continued(title, _restorer_network, task, judge, SR_SETS, BLOCKS, (3, 48, 48), wide=_wide_restorer)


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


MOSAIC: dict[str, Any] = {"pattern": "GRBG", "patch": 48, "patches_per_image": 8, "loss": "mse"}


def _mosaic_task(material: Path, work: Path, seed: int) -> Task:
    train, choose = split(material / "denoise/BSDS500train_color", work)
    return create_task("demosaicking", seed=seed, train=train, val=choose, **MOSAIC)


def _mosaic_judge(model: nn.Module, material: Path) -> Scores:
    scores = {}
    for name in ("Kodak24", "McMaster"):
        root = material / "denoise" / name
        own = create_task("demosaicking", seed=0, train=root, val=root, **MOSAIC)
        scores[name] = evaluate(own.bind(model), own, batch_size=1)["psnr"]
    return scores


def demosaicking() -> Study:
    title = "demosaicking, restorer of two blocks"
    return _continued(title, _restorer_network, _mosaic_task, _mosaic_judge, COLOR_SETS, BLOCKS, (3, 48, 48))


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
        rates=(2.5e-4, 5e-4, 1e-3),
        first_rate=5e-4,  # a higher one leaves dead units: the noise is weak, the start at the identity is nearly right
        wide=_wide_restorer,
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
        wide=_wide_lenet,
        more={"ACDA, new rate × 0.1": GENTLE | PUBLISHED},
    )


# --- one convolution, and few -----------------------------------------------------------------------------------------


SMALL_IMAGES: dict[str, Any] = {"scale": 3, "patch": 72, "loss": "mse"}  # not enlarged beforehand
SHORT = 1000  # steps
FAST_RATES = (2e-3, 4e-3, 8e-3)


def _wide_espcn() -> nn.Module:
    """Twice as wide: as many parameters as with ACDA in the last convolution."""
    model = create("espcnn")
    model.conv1 = nn.Conv2d(3, 138, 5, padding=2)
    model.conv2 = nn.Conv2d(138, 64, 3, padding=1)
    model.output = nn.Conv2d(64, 27, 3, padding=1)
    return model


_last_layer = partial(_continued, layers="output", rates=FAST_RATES, steps=SHORT)
_super_resolved = partial(
    _last_layer,
    task=partial(sr_task, SMALL_IMAGES),
    judge=partial(sr_judge, SMALL_IMAGES),
    needs=SR_SETS,
    size=(3, 24, 24),
)


def espcn() -> Study:
    return _super_resolved(
        "×3 super-resolution, ESPCN, its last convolution", partial(create, "espcnn"), wide=_wide_espcn
    )


def linear_super_resolution() -> Study:
    title = "×3 super-resolution, one 5×5 convolution (linear_sr, PAFU §4.2)"
    return _super_resolved(title, partial(create, "linear_sr_x3"), kernels=16)


def linear_demosaicking() -> Study:
    return _last_layer(
        "demosaicking, one 5×5 convolution (linear_demosaic, PAFU §5.2)",
        partial(create, "linear_demosaic"),
        task=_mosaic_task,
        judge=_mosaic_judge,
        needs=COLOR_SETS,
        size=(3, 48, 48),
        kernels=16,
    )


def _one_filter() -> nn.Module:
    return nn.Sequential(OrderedDict(output=nn.Conv2d(3, 3, 5, padding=2)))


def linear_denoising() -> Study:
    options = {"sigma": 25.0, "val_sigma": 25.0, "color": True, "patch": 48, "patches_per_image": 8, "loss": "mse"}
    return _last_layer(
        "color denoising, σ 25, one 5×5 convolution",
        _one_filter,
        task=partial(denoise_task, options, "BSDS500train_color"),
        judge=partial(denoise_judge, options),
        needs=COLOR_SETS,
        size=(3, 48, 48),
        kernels=16,
    )


def linear_camera_noise() -> Study:
    big = real_noise()
    study = _last_layer(
        "a camera's noise (PolyU), one 5×5 convolution",
        _one_filter,
        task=big.task,
        judge=big.judge,
        needs=big.needs,
        size=(3, 40, 40),
        rates=(5e-4, 1e-3, 2e-3),
        kernels=16,
    )
    return replace(study, arms={**study.arms, "no network: the noisy images": lambda material: nn.Identity()})
