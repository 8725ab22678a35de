"""The tasks on real data and trained networks, where those are there: known figures come out, every task runs end to end."""

import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import surgeon.zoo as zoo
from surgeon.zoo.tasks import Task, create_task


def trained(data: Path, name: str, weights: str) -> nn.Module:
    return zoo.load_foreign(zoo.create(name), data / "weights" / weights, network=name).eval()


def scores(task: Task, model: nn.Module, batch: int = 1) -> dict[str, float]:
    """Metrics over the validation set, after the data were looked through."""
    task.check()
    model = task.bind(model).eval()
    val, metrics = task.dataset("val"), task.metrics()
    for start in range(0, len(val), batch):
        part = task.collate([val[index] for index in range(start, min(start + batch, len(val)))])
        with torch.no_grad():
            output = task.predict(model, part)
        task.update(metrics, output, part)
    assert min(task.picture(part, output).size) > 100
    return {name: metric.compute().item() for name, metric in metrics.items()}


def training_loss(task: Task, model: nn.Module) -> torch.Tensor:
    train = task.dataset("train")
    batch = task.collate([train[draw] for draw in range(2)])
    return task.loss(task.forward(model.train(), batch), batch)


def test_gray_and_color_denoising(data: Path) -> None:
    folder = data / "denoise"
    gray = create_task("denoising", train=folder / "Train400_gray", val=folder / "Kodak24", val_limit=1)
    model = trained(data, "dncnn", "DnCNN-S-25.pth")
    assert 31 < scores(gray, model)["psnr"] < 34
    assert training_loss(gray, model).item() < 0.04
    color = create_task("denoising", train=folder / "BSDS500train_color", val=folder / "CBSD68", val_limit=1)
    assert scores(color, trained(data, "dncnn_color", "CDnCNN-S-25_color.pth"))["psnr"] > 28


def test_real_pairs(data: Path) -> None:
    task = create_task(
        "real-denoising", data=data / "denoise/PolyU_real", noisy="*_real", clean="*_mean", val_fraction=0.9
    )
    found = scores(task, nn.Conv2d(3, 3, 1).requires_grad_(False).apply(_identity))
    assert found["psnr"] == pytest.approx(35.88, abs=0.3)  # of the noisy pictures themselves, over all 25


def _identity(module: nn.Module) -> None:
    assert isinstance(module, nn.Conv2d)
    nn.init.dirac_(module.weight)
    assert module.bias is not None
    nn.init.zeros_(module.bias)


def test_super_resolution_has_its_known_figure(data: Path) -> None:
    task = create_task("super-resolution", train=data / "sr/T91", val=data / "sr/Set5", scale=4, patch=48)
    model = trained(data, "carn_m", "carn_m_sr.pth")
    assert scores(task, model, batch=5)["psnr"] == pytest.approx(31.89, abs=0.01)
    assert training_loss(task, model).item() < 0.1


def test_the_bicubic_filter_has_its_known_figure(data: Path) -> None:
    task = create_task(
        "super-resolution", train=data / "sr/T91", val=data / "sr/Set5", scale=2, input="bicubic", patch=48
    )
    found = scores(task, nn.Conv2d(3, 3, 1).requires_grad_(False).apply(_identity))
    assert found["psnr"] == pytest.approx(33.67, abs=0.01)
    assert found["ssim"] == pytest.approx(0.930, abs=0.002)


def test_demosaicking(data: Path) -> None:
    folder = data / "denoise"
    options = {"train": folder / "BSDS500train_color", "val": folder / "Kodak24"}
    task = create_task("demosaicking", **options, pattern="GRBG", val_limit=1)
    model = trained(data, "demosaicnet", "demosaicnet_bayer.pth")
    right = scores(task, model)["psnr"]
    wrong = scores(create_task("demosaicking", **options, pattern="RGGB", val_limit=1), model)["psnr"]
    assert right > 38 > wrong + 5


def test_crowd_counting(data: Path) -> None:
    task = create_task("crowd-counting", data=data / "crowd/UCF_CC_50", val_limit=2)
    model = trained(data, "mcnn", "mcnn_shanghaitechA.pth")
    found = scores(task, model, batch=2)
    assert found["mae"] < 1000
    assert training_loss(task, model).isfinite()
    density = task.dataset("val")[0]
    assert density["target"].sum().item() == pytest.approx(density["count"].item(), rel=1e-4)


def test_segmentation(data: Path) -> None:
    task = create_task("segmentation", data=data / "seg_camvid", ignore_index=11, input_size=(3, 96, 96), val_limit=2)
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
    found = scores(task, model)
    assert 0 <= found["miou"] < found["pixel_accuracy"] < 1
    assert training_loss(task, model).isfinite()


def test_classification_of_folders(data: Path, tmp_path: Path) -> None:
    for index, path in enumerate(sorted((data / "imagenet_sample").glob("*.jpg"))[:24]):
        folder = tmp_path / f"group{index // 8}"
        folder.mkdir(exist_ok=True)
        shutil.copy(path, folder)
    task = create_task("classification", data=tmp_path, val_fraction=0.25, input_size=(3, 96, 96))
    model = torchvision.models.squeezenet1_0(weights=None)
    zoo.load_foreign(model, data / "weights/squeezenet1_0_imagenet.pth")
    assert 0 <= scores(task, model, batch=6)["top1"] <= 1
    assert training_loss(task, model).isfinite()
