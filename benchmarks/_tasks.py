"""Trained networks with their tasks: building, evaluation, and calibration images.

A `Task` is one trained network. Its datasets give samples (the model's inputs and the truth); `evaluate` runs a model over
them and returns one `Score` per dataset, with a value for every image, so that two models are compared image by image.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
import torchvision
from torch import Tensor, nn

import surgeon.zoo as zoo
from benchmarks import _data as data
from surgeon.zoo.networks.demosaicnet import grbg_mosaic

Kind = Literal["top1", "psnr", "count"]
UNITS: dict[Kind, str] = {"top1": "% top-1", "psnr": "dB", "count": "MAE"}
Split = Literal["all", "test"]  # "test" leaves out the images that `calibration` may use

Channels = tuple[float, ...]

BATCH = 50
SIGMA = 25.0  # gray levels
HELD_OUT = 5  # where there is no training set, every fifth image is for calibration
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Sample:
    """Inputs of one call of the model, and the truth about it (labels, image, number of people)."""

    inputs: tuple[Any, ...]
    truth: Any


@dataclass(frozen=True)
class Score:
    """Values of all images of a dataset: predicted class, PSNR in dB, or number of people; `truth` where it has a use."""

    kind: Kind
    values: list[float]
    truth: list[float]

    @property
    def summary(self) -> float:
        """Top-1 in per cent, mean PSNR in dB, or mean absolute error of the count."""
        if self.kind == "psnr":
            return float(np.mean(self.values))
        error = np.abs(np.subtract(self.values, self.truth))
        return float(100 * np.mean(error == 0)) if self.kind == "top1" else float(np.mean(error))

    def difference(self, other: "Score") -> float:
        """Number of images with another class, or the largest change of an image's PSNR (dB) or count."""
        change = np.abs(np.subtract(self.values, other.values))
        return float(np.sum(change > 0)) if self.kind == "top1" else float(np.max(change))

    @property
    def allowed(self) -> float:
        """Largest `difference` with which a conversion counts as having lost nothing."""
        return {"top1": 0.0, "psnr": 1e-3, "count": 1e-2}[self.kind]


Dataset = Callable[[Path, int | None, Split], Iterator[Sample]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A trained network. `published` is what the data's README measured on the same images, by dataset."""

    name: str
    build: Callable[[Path], nn.Module]
    kind: Kind
    datasets: dict[str, Dataset]
    calibration: Callable[[Path, int], tuple[Any, ...]]  # (folder, number of images) -> inputs of one call
    needs: tuple[str, ...]
    quick: int  # images a dataset with --quick
    published: dict[str, float]
    calibrate: int = 32  # images for calibration

    @property
    def unit(self) -> str:
        return UNITS[self.kind]

    def measure(self, out: Tensor, sample: Sample) -> tuple[list[float], list[float]]:
        """(values, truths) of one call."""
        if self.kind == "top1":
            return out.argmax(1).tolist(), sample.truth.tolist()
        if self.kind == "count":
            return [float(out.double().sum())], [float(sample.truth)]
        return [_image_psnr(out, sample)], [0.0]


def evaluate(
    model: nn.Module,
    task: Task,
    folder: Path,
    *,
    limit: int | None = None,
    split: Split = "all",
    progress: Callable[[int], None] = lambda images: None,
) -> dict[str, Score]:
    """Run the model in eval mode over the task's datasets, at most `limit` images of each."""
    model.eval()
    scores: dict[str, Score] = {}
    for name, dataset in task.datasets.items():
        values: list[float] = []
        truth: list[float] = []
        for sample in dataset(folder, limit, split):
            with torch.no_grad():
                out = model(*sample.inputs)
            measured, true = task.measure(out, sample)
            values += measured
            truth += true
            progress(len(measured))
        scores[name] = Score(task.kind, values, truth)
    return scores


def _image_psnr(out: Tensor, sample: Sample) -> float:
    clean: Tensor = sample.truth
    out = out.clamp(0, 1)
    border = (clean.shape[-1] - out.shape[-1]) // 2  # what a network without padding leaves out
    if border:
        clean = clean[..., border:-border, border:-border]
    if len(sample.inputs) == 2:  # super-resolution: 8-bit image, luma, without a border of `scale` pixels
        scale = sample.inputs[1]
        out, clean = (data.luma(a)[..., scale:-scale, scale:-scale] for a in ((out * 255).round() / 255, clean))
    return data.psnr(out, clean)


# --- datasets ---------------------------------------------------------------------------------------------------------


def _normalized(x: Tensor, mean: Channels, std: Channels) -> Tensor:
    return (x / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def _batches(images: data.Labeled, mean: Channels, std: Channels) -> Iterator[Sample]:
    for x, y in zip(images.x.split(BATCH), images.y.split(BATCH), strict=True):
        yield Sample((_normalized(x, mean, std),), y)


def _cifar(path: str, folder: Path, limit: int | None, split: Split) -> Iterator[Sample]:
    read = data.cifar_jpeg if "jpeg" in path else data.cifar_exact
    images = read(folder / path).every(limit)
    return _batches(images, IMAGENET_MEAN, IMAGENET_STD)


def _imagenet(mean: Channels, std: Channels, folder: Path, limit: int | None, split: Split) -> Iterator[Sample]:
    images = data.imagenet_sample(folder / "imagenet_sample")
    if split == "test":
        kept = torch.arange(len(images.y)) % HELD_OUT != 0
        images = data.Labeled(images.x[kept], images.y[kept])
    return _batches(images.every(limit), mean, std)


def _denoising(name: str, mode: str, folder: Path, limit: int | None, split: Split) -> Iterator[Sample]:
    for index, image in enumerate(data.images(folder / "denoise" / name, mode)):
        if limit is not None and index >= limit:
            return
        clean = data.to_tensor(image)[None]
        yield Sample((data.noisy(clean, SIGMA, seed=index),), clean)


def _super_resolution(scale: int, folder: Path, limit: int | None, split: Split) -> Iterator[Sample]:
    for index, image in enumerate(data.images(folder / "sr" / "Set5")):
        if limit is not None and index >= limit:
            return
        large, small = data.low_resolution(image, scale)
        yield Sample((data.to_tensor(small)[None], scale), data.to_tensor(large)[None])


def _demosaicking(name: str, folder: Path, limit: int | None, split: Split) -> Iterator[Sample]:
    for index, image in enumerate(data.images(folder / "denoise" / name)):
        if limit is not None and index >= limit:
            return
        clean = data.to_tensor(image)[None]
        yield Sample((grbg_mosaic(clean),), clean)


def _crowd_image(path: Path) -> Tensor:
    return (data.to_tensor(data.image(path, "L"))[None] * 255 - 127.5) / 128


def _crowd(folder: Path, limit: int | None, split: Split) -> Iterator[Sample]:
    paths = sorted((folder / "crowd" / "UCF_CC_50").glob("*.jpg"))
    if split == "test":
        paths = [path for index, path in enumerate(paths) if index % HELD_OUT]
    for path in paths[:limit]:
        yield Sample((_crowd_image(path),), len(np.load(path.with_suffix(".npy"))))


# --- images for calibration: training images, or such as `split="test"` leaves out --------------------------------------


def _calibrate_cifar(folder: Path, count: int) -> tuple[Any, ...]:
    """Half of them exact and half JPEG, as the test sets are: batch-norm statistics measured on the one do not suit the other."""
    exact = data.cifar_exact(folder / "cifar10/train_lossless_2k.npz").every(count - count // 2)
    jpeg = data.cifar_jpeg(folder / "cifar10/train_jpeg_20k.npz").every(count // 2)
    return (_normalized(torch.cat([exact.x, jpeg.x]), IMAGENET_MEAN, IMAGENET_STD),)


def _calibrate_imagenet(mean: Channels, std: Channels, folder: Path, count: int) -> tuple[Any, ...]:
    images = data.imagenet_sample(folder / "imagenet_sample")
    kept = torch.arange(len(images.y)) % HELD_OUT == 0
    return (_normalized(data.Labeled(images.x[kept], images.y[kept]).every(count).x, mean, std),)


def _crops(folder: Path, mode: str, size: int, count: int) -> Tensor:
    """(count, C, size, size): center crops of the first images."""
    crops = []
    for image in data.images(folder, mode):
        crops.append(data.to_tensor(data.center_crop(image, size)))
        if len(crops) == count:
            break
    return torch.stack(crops)


def _calibrate_denoising(name: str, mode: str, folder: Path, count: int) -> tuple[Any, ...]:
    return (data.noisy(_crops(folder / "denoise" / name, mode, 96, count), SIGMA, seed=1000),)


def _calibrate_super_resolution(folder: Path, count: int) -> tuple[Any, ...]:
    """For x4: the upsamplers for x2 and x3 do not run on it."""
    small = []
    for image in data.images(folder / "sr" / "T91"):
        if min(image.size) >= 144:
            _, reduced = data.low_resolution(image.crop((0, 0, 144, 144)), 4)
            small.append(data.to_tensor(reduced))
        if len(small) == count:
            break
    return (torch.stack(small), 4)


def _calibrate_demosaicking(folder: Path, count: int) -> tuple[Any, ...]:
    return (grbg_mosaic(_crops(folder / "denoise/BSDS500train_color", "RGB", 128, count)),)


def _calibrate_crowd(folder: Path, count: int) -> tuple[Any, ...]:
    paths = sorted((folder / "crowd" / "UCF_CC_50").glob("*.jpg"))[::HELD_OUT]
    return (torch.cat([_crowd_image(path)[..., :256, :256] for path in paths[:count]]),)


# --- networks ---------------------------------------------------------------------------------------------------------


def _zoo(name: str, weights: str, folder: Path) -> nn.Module:
    return zoo.load_foreign(zoo.create(name), folder / "weights" / weights, network=name).eval()


def _mobilenet(folder: Path) -> nn.Module:
    model: nn.Module = timm.create_model("mobilenetv2_100", pad_type="same")
    return zoo.load_foreign(model, folder / "weights/mobilenetv2_100_imagenet.pth").eval()


def _squeezenet(folder: Path) -> nn.Module:
    model: nn.Module = torchvision.models.squeezenet1_0(weights=None)
    return zoo.load_foreign(model, folder / "weights/squeezenet1_0_imagenet.pth").eval()


def _cifar_task(name: str, weights: str, exact: float, jpeg: float) -> Task:
    test, test_jpeg = "cifar10/test_lossless.npz", "cifar10/test_jpeg_5k.npz"
    return Task(
        name=name,
        build=partial(_zoo, name, weights),
        kind="top1",
        datasets={"CIFAR exact": partial(_cifar, test), "CIFAR JPEG": partial(_cifar, test_jpeg)},
        calibration=_calibrate_cifar,
        needs=(f"weights/{weights}", test, test_jpeg, "cifar10/train_jpeg_20k.npz", "cifar10/train_lossless_2k.npz"),
        quick=250,
        calibrate=256,
        published={"CIFAR exact": exact, "CIFAR JPEG": jpeg},
    )


def _imagenet_task(name: str, build: Callable[[Path], nn.Module], mean: Channels, std: Channels, top1: float) -> Task:
    return Task(
        name=name,
        build=build,
        kind="top1",
        datasets={"ImageNet sample": partial(_imagenet, mean, std)},
        calibration=partial(_calibrate_imagenet, mean, std),
        needs=(f"weights/{name}_imagenet.pth", "imagenet_sample"),
        quick=50,
        published={"ImageNet sample": top1},
    )


def _denoising_task(name: str, weights: str, mode: str, training: str, published: dict[str, float]) -> Task:
    sets = {"Kodak": "Kodak24", "CBSD": "CBSD68", "McMaster": "McMaster"}
    return Task(
        name=name,
        build=partial(_zoo, name, weights),
        kind="psnr",
        datasets={label: partial(_denoising, where, mode) for label, where in sets.items()},
        calibration=partial(_calibrate_denoising, training, mode),
        needs=(f"weights/{weights}", *(f"denoise/{where}" for where in (*sets.values(), training))),
        quick=2,
        published=published,
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _cifar_task("resnet20_cifar", "resnet20_cifar10.pth", 93.4, 81.0),
        _cifar_task("resnet56_cifar", "resnet56_cifar10.pth", 94.9, 83.0),
        _imagenet_task("mobilenetv2_100", _mobilenet, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 84.6),
        _imagenet_task("squeezenet1_0", _squeezenet, IMAGENET_MEAN, IMAGENET_STD, 59.0),
        _denoising_task("dncnn", "DnCNN-S-25.pth", "L", "Train400_gray", {}),
        _denoising_task(
            "dncnn_color",
            "CDnCNN-S-25_color.pth",
            "RGB",
            "BSDS500train_color",
            {"Kodak": 32.27, "CBSD": 31.54, "McMaster": 32.76},
        ),
        Task(
            name="carn_m",
            build=partial(_zoo, "carn_m", "carn_m_sr.pth"),
            kind="psnr",
            datasets={f"Set5 x{scale}": partial(_super_resolution, scale) for scale in (2, 3, 4)},
            calibration=_calibrate_super_resolution,
            needs=("weights/carn_m_sr.pth", "sr/Set5", "sr/T91"),
            quick=2,
            published={"Set5 x2": 37.68, "Set5 x3": 34.07, "Set5 x4": 31.89},
        ),
        Task(
            name="demosaicnet",
            build=partial(_zoo, "demosaicnet", "demosaicnet_bayer.pth"),
            kind="psnr",
            datasets={"Kodak": partial(_demosaicking, "Kodak24"), "McMaster": partial(_demosaicking, "McMaster")},
            calibration=_calibrate_demosaicking,
            needs=(
                "weights/demosaicnet_bayer.pth",
                "denoise/Kodak24",
                "denoise/McMaster",
                "denoise/BSDS500train_color",
            ),
            quick=2,
            published={"Kodak": 41.78, "McMaster": 38.99},
        ),
        Task(
            name="mcnn",
            build=partial(_zoo, "mcnn", "mcnn_shanghaitechA.pth"),
            kind="count",
            datasets={"UCF_CC_50": _crowd},
            calibration=_calibrate_crowd,
            needs=("weights/mcnn_shanghaitechA.pth", "crowd/UCF_CC_50"),
            quick=3,
            published={"UCF_CC_50": 432.0},
        ),
    )
}
