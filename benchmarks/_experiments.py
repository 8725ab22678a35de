"""Experiments of `benchmarks.finetuned`: networks with trained weights, their data, conversions, steps and rates."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn
from torchvision.models.segmentation.lraspp import LRASPP

from benchmarks._cifar import TEST_SET, TRAIN_SET, CifarTask
from benchmarks._tasks import TASKS
from surgeon.records.recipe import Recipe, Rule
from surgeon.zoo import load_foreign
from surgeon.zoo.tasks import Task, TaskConfig, create_task
from surgeon.zoo.tasks.base import Split
from surgeon.zoo.tasks.crowd_counting import CrowdConfig, CrowdCounting, Pair

MakeTask = Callable[..., Task]  # (folder of the data, seed, number of validation images[, fold])


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A trained network, what becomes of it in each arm, and how all arms are trained.

    The score is that of `benchmarks/_tasks.py` on at most `images` images a data set, or without `judge` the task's own metrics on
    at most so many, those named in `metrics` (with a factor).
    """

    name: str
    build: Callable[[Path], nn.Module]
    task: MakeTask
    arms: dict[str, Recipe]
    needs: tuple[str, ...]
    unit: str
    steps: int
    batch: int
    lr: float
    new_lr_scale: float = 0.1  # rate of new parameters as a part of `lr`
    input_size: tuple[int, int, int]
    judge: str | None = None
    images: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    folds: int = 1
    why: str = ""


# --- networks ---------------------------------------------------------------------------------------------------------


class Backbone(nn.Module):
    """Features of a timm model under the names that torchvision's LR-ASPP reads: an eighth and a sixteenth of the size."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low, high = self.body(x)
        return {"low": low, "high": high}


def lraspp(folder: Path) -> nn.Module:
    """LR-ASPP (Howard et al. 2019) of torchvision over the trained MobileNetV2; the head is new."""
    classifier = load_foreign(timm.create_model("mobilenetv2_100", pad_type="same"), folder / MOBILENET)
    body = timm.create_model("mobilenetv2_100", pad_type="same", features_only=True, out_indices=(2, 3))
    wanted = body.state_dict()
    body.load_state_dict({name: value for name, value in classifier.state_dict().items() if name in wanted})
    low, high = body.feature_info.channels()
    return LRASPP(Backbone(body), low_channels=low, high_channels=high, num_classes=11).eval()


# --- tasks ------------------------------------------------------------------------------------------------------------
# Where a judge of `_tasks.py` scores, the run itself looks at one validation image only.


def _cifar(folder: Path, seed: int, images: int | None) -> Task:
    return CifarTask(TaskConfig(data=folder, val_limit=images), seed=seed)


def _denoising(training: str, color: bool, folder: Path, seed: int, images: int | None) -> Task:
    root = folder / "denoise"
    options: dict[str, Any] = {"train": root / training, "val": root / "Kodak24", "val_limit": 1}
    return create_task(
        "denoising", seed=seed, sigma=25, color=color, patch=48, patches_per_image=8, loss="mse", **options
    )


def _super_resolution(folder: Path, seed: int, images: int | None) -> Task:
    options: dict[str, Any] = {"train": folder / "sr/T91", "val": folder / "sr/Set5", "val_limit": 1}
    return create_task("super-resolution", seed=seed, scale=2, patch=72, patches_per_image=8, **options)


def _demosaicking(folder: Path, seed: int, images: int | None) -> Task:
    root = folder / "denoise"
    options: dict[str, Any] = {"train": root / "BSDS500train_color", "val": root / "Kodak24", "val_limit": 1}
    return create_task("demosaicking", seed=seed, pattern="GRBG", patch=96, patches_per_image=8, loss="mse", **options)


class CrowdFold(CrowdCounting):
    """One of the folds of the data set's own protocol (Idrees et al. 2013): every fifth picture is held out."""

    fold = 0

    def items(self, split: Split) -> list[tuple[int, Pair]]:
        everything = sorted([*super().items("train"), *super().items("val")])
        return [item for i, item in enumerate(everything) if (i % FOLDS == self.fold) == (split == "val")]


def _crowd(folder: Path, seed: int, images: int | None, fold: int) -> Task:
    task = CrowdFold(
        CrowdConfig(data=folder / "crowd/UCF_CC_50", val_fraction=0.3, val_limit=images, patch=128), seed=seed
    )
    task.fold = fold
    return task


def _segmentation(folder: Path, seed: int, images: int | None) -> Task:
    size: dict[str, Any] = {"input_size": (3, 192, 256), "classes": 11, "ignore_index": 11, "val_limit": images}
    return create_task(
        "segmentation", seed=seed, data=folder / "seg_camvid", mean=(0.5,) * 3, std=(0.5,) * 3, multiple=32, **size
    )


def _real_denoising(folder: Path, seed: int, images: int | None) -> Task:
    pairs: dict[str, Any] = {
        "data": folder / "denoise/PolyU_real",
        "noisy": "*_real",
        "clean": "*_mean",
        "val_limit": images,
    }
    return create_task(
        "real-denoising", seed=seed, patch=40, patches_per_image=8, val_fraction=0.2, loss="mse", **pairs
    )


# --- experiments ------------------------------------------------------------------------------------------------------

MOBILENET = "weights/mobilenetv2_100_imagenet.pth"
CIFAR = ("resnet20_cifar", "resnet56_cifar")
FOLDS = 5


def _arms(acda: str | None, pafu: str | None, sekg: str | None, group_size: int = 8) -> dict[str, Recipe]:
    """Recipes by the name of the layer type."""
    options: dict[str, dict[str, Any]] = {"acda": {}, "pafu": {"group_size": group_size}, "sekg": {}}
    layers = {"acda": acda, "pafu": pafu, "sekg": sekg}
    return {
        kind: Recipe(rules=[Rule(layers=where, type=kind, options=options[kind])])
        for kind, where in layers.items()
        if where is not None
    }


def _classifier(name: str, weights: str, steps: int) -> Experiment:
    first_of_stages = "layer1.0.conv1,layer2.0.conv1,layer3.0.conv1"
    return Experiment(
        name=name,
        build=TASKS[name].build,
        task=_cifar,
        arms=_arms("layer3", first_of_stages, "layer3"),
        needs=(f"weights/{weights}", TRAIN_SET, TEST_SET),
        unit="% top-1",
        metrics={"top1": 100.0},
        images=2000,
        steps=steps,
        batch=64,
        lr=1e-3,
        input_size=(3, 32, 32),
        why="ACDA in the last stage, PAFU first in each stage (PAFU §4.2.3), SEKG in the last stage",
    )


def _restorer(name: str, *, task: MakeTask, arms: dict[str, Recipe], steps: int, side: int, **more: Any) -> Experiment:
    """A converged restorer, trained on gently."""
    channels = 1 if name == "dncnn" else 3
    gently: dict[str, Any] = {"steps": steps, "batch": 8, "lr": 2e-5, "new_lr_scale": 5.0}
    return Experiment(
        name=name,
        build=TASKS[name].build,
        task=task,
        arms=arms,
        needs=TASKS[name].needs,
        unit="dB",
        judge=name,
        input_size=(channels, side, side),
        **gently,
        **more,
    )


def _denoiser(name: str, middle: str, training: str, color: bool) -> Experiment:
    task, arms = partial(_denoising, training, color), _arms(middle, middle, middle)
    return _restorer(name, task=task, arms=arms, steps=100, side=48, images=4, why="one convolution in the middle")


EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        _classifier("resnet20_cifar", "resnet20_cifar10.pth", 320),
        _classifier("resnet56_cifar", "resnet56_cifar10.pth", 160),
        _denoiser("dncnn", "body.23", "Train400_gray", color=False),
        _denoiser("dncnn_color", "body.20", "BSDS500train_color", color=True),
        _restorer(
            "carn_m",
            task=_super_resolution,
            arms=_arms(None, "exit", None, group_size=16),
            steps=120,
            side=48,
            why="trained for x2 alone; PAFU of 16 kernels as the last convolution",
        ),
        _restorer(
            "demosaicnet",
            task=_demosaicking,
            arms=_arms(None, "chain.0", None, group_size=16),
            steps=120,
            side=96,
            images=4,
            why="PAFU of 16 kernels as the first convolution (PAFU §4.2.1)",
        ),
        Experiment(
            name="mcnn",
            build=TASKS["mcnn"].build,
            task=_crowd,
            arms=_arms("*.3", "*.3", "*.3"),
            needs=TASKS["mcnn"].needs,
            unit="people",
            metrics={"mae": 1.0},
            folds=FOLDS,
            steps=150,
            batch=4,
            lr=1e-5,
            input_size=(1, 128, 128),
            why="the second convolution of each column; five-fold cross-validation over all pictures",
        ),
        Experiment(
            name="camvid",
            build=lraspp,
            task=_segmentation,
            arms=_arms("backbone.body.blocks.4.*.conv_dw", "classifier.cbr.0", "backbone.body.blocks.4.*.conv_dw"),
            needs=(MOBILENET, "seg_camvid"),
            unit="%",
            metrics={"miou": 100.0, "pixel_accuracy": 100.0},
            steps=150,
            batch=8,
            lr=1e-3,
            input_size=(3, 192, 256),
            why="LR-ASPP over MobileNetV2; PAFU in the head (PAFU §4.2.4), ACDA and SEKG in the last stage",
        ),
        Experiment(
            name="polyu",
            build=TASKS["dncnn_color"].build,
            task=_real_denoising,
            arms=_arms("body.20", "body.20", "body.20"),
            needs=("weights/CDnCNN-S-25_color.pth", "denoise/PolyU_real"),
            unit="dB",
            metrics={"psnr": 1.0},
            steps=150,
            batch=4,
            lr=3e-5,
            new_lr_scale=1.0,
            input_size=(3, 40, 40),
            why="real noise, from a network trained for Gaussian noise of sigma 25; the noisy images have 35.9 dB",
        ),
    )
}
