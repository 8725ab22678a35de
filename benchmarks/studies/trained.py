"""Trained networks of the evaluation material, converted and fine-tuned beside the original."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models.segmentation.lraspp import LRASPP

from benchmarks import _data as data
from benchmarks._tasks import TASKS
from benchmarks.studies.study import (
    FAST,
    GENTLE,
    PUBLISHED,
    Scores,
    Study,
    arms,
    cifar_judge,
    cifar_task,
    place,
    rules,
    slow_and_fast,
    split,
)
from surgeon.records.recipe import Rule
from surgeon.zoo import load_foreign
from surgeon.zoo.evaluate import evaluate
from surgeon.zoo.networks.demosaicnet import grbg_mosaic
from surgeon.zoo.tasks import Task, create_task

CROP = 128  # pixels of a side of the images that judge


def classifier(name: str, where: Mapping[str, str], steps: int) -> Study:
    """With PAFU and ACDA where the papers place them; ACDA also at the full rate for new parameters."""
    found, ours = rules(where), {}
    if "ACDA" in found:
        found, ours = slow_and_fast(found)
    return Study(
        title=f"{name} converted and fine-tuned for {steps:,} steps on CIFAR-10 (JPEG)",
        arms=arms(TASKS[name].build, (3, 32, 32), found),
        task=cifar_task,
        judge=cifar_judge,
        needs=TASKS[name].needs,
        rates=(5e-4, 1e-3, 2e-3),
        steps=steps,
        batch=64,
        unit="% top-1",
        changes=GENTLE,
        ours=ours,
    )


def _crops(material: Path, folder: str, mode: str) -> list[torch.Tensor]:
    """(1, C, CROP, CROP) each: center crops."""
    found = data.images(material / "denoise" / folder, mode)
    return [data.to_tensor(data.center_crop(image, CROP))[None] for image in found]


def _mean_psnr(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    values = [data.psnr(restored.clamp(0, 1), clean) for restored, clean in pairs]
    return sum(values) / len(values)


@torch.no_grad()
def _blind_judge(mode: str, model: nn.Module, material: Path) -> Scores:
    """PSNR at σ 15 and 50."""
    scores = {}
    for folder in ("Kodak24", "CBSD68"):
        crops = _crops(material, folder, mode)
        for sigma in (15.0, 50.0):
            noisy = [data.noisy(clean, sigma, seed=index) for index, clean in enumerate(crops)]
            scores[f"{folder} σ {sigma:.0f}"] = _mean_psnr((model(x), y) for x, y in zip(noisy, crops, strict=True))
    return scores


def blind_denoiser(name: str, folder: str, spread: str, mode: str, extra: Mapping[str, Rule]) -> Study:
    """A denoiser of one noise level learns all levels: what to do depends on the image."""
    channels = len(mode)
    options = {"sigma": "0-55", "val_sigma": 40, "color": channels == 3, "patch": 40, "patches_per_image": 8}

    def task(material: Path, work: Path, seed: int) -> Task:
        train, choose = split(material / "denoise" / folder, work, CROP)
        return create_task("denoising", seed=seed, train=train, val=choose, val_limit=10, loss="mse", **options)

    made, ours = slow_and_fast(rules(dict.fromkeys(("sekg", "acda", "pafu"), spread)))
    return Study(
        title=f"{name}, trained for σ 25, converted and fine-tuned for any σ from 0 to 55",
        arms=arms(TASKS[name].build, (channels, 40, 40), made | extra),
        task=task,
        judge=partial(_blind_judge, mode),
        needs=TASKS[name].needs,
        rates=(1e-4, 3e-4, 1e-3),
        steps=200,
        batch=4,
        changes=GENTLE | PUBLISHED,
        ours=ours | dict.fromkeys(extra, FAST),
    )


def real_noise() -> Study:
    """Pairs of 15 scenes train, 5 choose, 5 judge."""
    ends = ("_real", "_mean")

    def pairs(material: Path) -> list[tuple[Path, ...]]:
        noisy = sorted((material / "denoise/PolyU_real").glob("*_real.JPG"))
        return [tuple(path.with_name(path.name.replace("_real", end)) for end in ends) for path in noisy]

    def task(material: Path, work: Path, seed: int) -> Task:
        for index, pair in enumerate(pairs(material)):
            part = ("train", "train", "choose", "train", "judge")[index % 5]
            for path in pair:
                place(path, work / "polyu" / part / path.name, 192 if part == "choose" else None)
        options: dict[str, Any] = {"noisy": "*_real", "clean": "*_mean", "patch": 40, "patches_per_image": 32}
        root = work / "polyu"
        return create_task(
            "real-denoising", seed=seed, train=root / "train", val=root / "choose", loss="mse", **options
        )

    @torch.no_grad()
    def judge(model: nn.Module, material: Path) -> Scores:
        shown = []
        for noisy, clean in pairs(material)[4::5]:
            x, y = (data.to_tensor(data.center_crop(data.image(path), 256))[None] for path in (noisy, clean))
            shown.append((model(x), y))
        return {"PolyU": _mean_psnr(shown)}

    spread = "body.8,body.16,body.24,body.32"
    found, ours = slow_and_fast(rules(dict.fromkeys(("sekg", "acda", "pafu"), spread)))
    return Study(
        title="dncnn_color, trained for Gaussian noise, converted and fine-tuned for a camera's noise (PolyU)",
        arms=arms(TASKS["dncnn_color"].build, (3, 40, 40), found),
        task=task,
        judge=judge,
        needs=("weights/CDnCNN-S-25_color.pth", "denoise/PolyU_real"),
        rates=(3e-5, 1e-4, 3e-4),
        steps=200,
        batch=4,
        changes=GENTLE | PUBLISHED,
        ours=ours,
    )


NOISE = 0.08  # read noise of the mosaics that judge


def noisy_demosaicking() -> Study:
    """A demosaicking network of clean mosaics learns noisy ones."""

    def task(material: Path, work: Path, seed: int) -> Task:
        train, choose = split(material / "denoise/BSDS500train_color", work, CROP)
        options: dict[str, Any] = {"pattern": "GRBG", "patch": 80, "patches_per_image": 8, "read": "0-0.15"}
        return create_task("demosaicking", seed=seed, train=train, val=choose, loss="mse", **options)

    @torch.no_grad()
    def judge(model: nn.Module, material: Path) -> Scores:
        scores = {}
        for folder in ("Kodak24", "McMaster"):
            shown = []
            for index, clean in enumerate(_crops(material, folder, "RGB")):
                mosaic = grbg_mosaic(clean)
                noisy = mosaic + grbg_mosaic(data.noisy(torch.zeros_like(clean), 255 * NOISE, seed=index))
                restored = model(noisy)
                edge = (CROP - restored.shape[-1]) // 2
                shown.append((restored, clean[..., edge : CROP - edge, edge : CROP - edge]))
            scores[folder] = _mean_psnr(shown)
        return scores

    spread = "chain.3,chain.7,chain.11"
    found, ours = slow_and_fast(rules(dict.fromkeys(("sekg", "acda", "pafu"), spread)))
    return Study(
        title="demosaicnet, trained for clean mosaics, converted and fine-tuned for read noise up to 0.15",
        arms=arms(TASKS["demosaicnet"].build, (3, 80, 80), found),
        task=task,
        judge=judge,
        needs=(*TASKS["demosaicnet"].needs, "denoise/BSDS500train_color"),
        rates=(1e-4, 3e-4, 1e-3),
        steps=200,
        batch=4,
        changes=GENTLE | PUBLISHED,
        ours=ours,
    )


MOBILENET = "weights/mobilenetv2_100_imagenet.pth"


class Backbone(nn.Module):
    """Features of a timm model under the names that torchvision's LR-ASPP reads: an eighth and a sixteenth of the size."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low, high = self.body(x)
        return {"low": low, "high": high}


def lraspp(material: Path) -> nn.Module:
    """LR-ASPP (Howard et al. 2019) of torchvision over the trained MobileNetV2; the head is new."""
    classifier = load_foreign(timm.create_model("mobilenetv2_100", pad_type="same"), material / MOBILENET)
    body = timm.create_model("mobilenetv2_100", pad_type="same", features_only=True, out_indices=(2, 3))
    wanted = body.state_dict()
    body.load_state_dict({name: value for name, value in classifier.state_dict().items() if name in wanted})
    low, high = body.feature_info.channels()
    return LRASPP(Backbone(body), low_channels=low, high_channels=high, num_classes=11).eval()


def segmenter() -> Study:
    options: dict[str, Any] = {"input_size": (3, 192, 256), "classes": 11, "ignore_index": 11, "multiple": 32}
    options |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}

    def task(material: Path, work: Path, seed: int) -> Task:
        """The last fifth of the training images chooses."""
        root = work / "camvid"
        for kind in ("images", "labels"):
            files = sorted((material / "seg_camvid/train" / kind).iterdir())
            for index, path in enumerate(files):
                place(path, root / ("val" if index % 5 == 4 else "train") / kind / path.name)
        return create_task("segmentation", seed=seed, data=root, **options)

    def judge(model: nn.Module, material: Path) -> Scores:
        own = create_task("segmentation", seed=0, data=material / "seg_camvid", **options)
        return {"mIoU": 100 * evaluate(own.bind(model), own, batch_size=5)["miou"]}

    last = "backbone.body.blocks.4.*.conv_dw"
    found, ours = slow_and_fast(rules({"acda": last, "sekg": last}))
    return Study(
        title="LR-ASPP over MobileNetV2 converted and fine-tuned on CamVid",
        arms=arms(lraspp, (3, 192, 256), found),
        task=task,
        judge=judge,
        needs=(MOBILENET, "seg_camvid"),
        rates=(1e-3, 2e-3, 4e-3),
        steps=150,
        batch=8,
        unit="% mIoU",
        changes=GENTLE | PUBLISHED,
        ours=ours,
    )
