"""What `benchmarks.learning` trains: dynamic networks beside plain twins, from scratch or from trained weights.

Every study has images that choose (a tenth of the training images, which nothing is trained on) and images that judge.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

import surgeon
from benchmarks import _data as data
from benchmarks import toys
from benchmarks._cifar import TEST_SET, TRAIN_SET, Cifar, CifarTask
from benchmarks._experiments import EXPERIMENTS, lraspp
from benchmarks._tasks import TASKS
from surgeon.layers import PAFUConfig, PAFUConv2d
from surgeon.recipe import Recipe, Rule
from surgeon.zoo import create
from surgeon.zoo.evaluate import evaluate
from surgeon.zoo.networks.demosaicnet import grbg_mosaic
from surgeon.zoo.tasks import Task, TaskConfig, create_task

Scores = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Study:
    """Arms trained alike. The first is the plain network; `wide` names the plain one with as many parameters as ours.

    `task` (material, work folder, seed) makes the training task whose validation images choose the rate; `judge` scores the trained
    network on images that neither trained nor chose. `needs` are folders of the evaluation material.
    """

    title: str
    arms: Mapping[str, Callable[[Path], nn.Module]]
    task: Callable[[Path, Path, int], Task]
    judge: Callable[[nn.Module, Path], Scores]
    needs: tuple[str, ...]
    rates: tuple[float, ...]
    steps: int
    batch: int
    unit: str = "dB"
    lower: bool = False
    wide: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the fine-tuning's options
    ours: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # arm -> changes of its own


# --- from scratch -----------------------------------------------------------------------------------------------------

SCRATCH: dict[str, Any] = {"opt": "adam", "weight_decay": 0.0, "new_lr_scale": 1.0, "warmup": "5%"}


def _place(path: Path, target: Path, crop: int | None = None) -> None:
    """The image at another place: a link, or its center crop as PNG."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if crop:
        target = target.with_suffix(".png")
    if target.exists():
        return
    if crop:
        data.center_crop(data.image(path), crop).save(target)
    else:
        target.symlink_to(path)


@cache
def _split(folder: Path, work: Path, crop: int | None = None) -> tuple[Path, Path]:
    """(training images, images that choose) of a folder: every tenth chooses, its center only with `crop`."""
    parts = (work / folder.name / "train", work / folder.name / "choose")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    for index, path in enumerate(files):
        chooses = index % 10 == 9
        _place(path, parts[chooses] / path.name, crop if chooses else None)
    return parts


def _sr_task(options: Mapping[str, Any], material: Path, work: Path, seed: int) -> Task:
    train, choose = _split(material / "sr/T91", work)
    return create_task("super-resolution", seed=seed, train=train, val=choose, **options)


def _sr_judge(options: Mapping[str, Any], model: nn.Module, material: Path) -> Scores:
    scores = {}
    for name in ("Set5", "Set14"):
        task = create_task("super-resolution", seed=0, train=material / "sr/T91", val=material / "sr" / name, **options)
        scores[name] = evaluate(task.bind(model), task, batch_size=1)["psnr"]
    return scores


def _denoise_task(options: Mapping[str, Any], folder: str, material: Path, work: Path, seed: int) -> Task:
    train, choose = _split(material / "denoise" / folder, work)
    return create_task("denoising", seed=seed, train=train, val=choose, val_limit=10, **options)


def _denoise_judge(options: Mapping[str, Any], model: nn.Module, material: Path) -> Scores:
    scores = {}
    for name in ("Kodak24", "CBSD68"):
        root = material / "denoise"
        task = create_task("denoising", seed=0, train=root / name, val=root / name, **options)
        scores[name] = evaluate(task.bind(model), task, batch_size=1)["psnr"]
    return scores


def _zoo(name: str, material: Path, **options: Any) -> nn.Module:
    return create(name, **options)


def _restorer() -> Study:
    options = {"scale": 3, "input": "bicubic", "patch": 48, "loss": "mse"}
    small = {"width": 64, "inner": 32, "blocks": 2}
    return Study(
        title="ACDA from scratch: ×3 super-resolution, two bottleneck blocks of 64-32-64 channels",
        arms={
            "conv": partial(_zoo, "realsr_conv", **small),
            "conv, as many parameters": partial(_zoo, "realsr_conv", **(small | {"inner": 84})),
            "ACDA, as published": partial(_zoo, "acda_realsr", **small),
            "ACDA, norm": partial(_zoo, "acda_realsr", **small, layer_options={"norm": "batch"}),
        },
        wide="conv, as many parameters",
        task=partial(_sr_task, options),
        judge=partial(_sr_judge, options),
        needs=("sr/T91", "sr/Set5", "sr/Set14"),
        rates=(5e-4, 1e-3, 2e-3),
        steps=2000,
        batch=4,
        changes=SCRATCH,
    )


def _denoiser() -> Study:
    options = {"sigma": 50, "color": False, "patch": 48, "patches_per_image": 8, "loss": "mse"}
    small: dict[str, Any] = {"channels": 1, "depth": 5, "width": 16}
    return Study(
        title="DConv from scratch: gray denoising, σ 50, DnCNN of 5 layers and 16 channels",
        arms={
            "DnCNN": partial(_zoo, "dncnn", **small),
            "DnCNN, as many parameters": partial(_zoo, "dncnn", **(small | {"width": 17})),
            "DConv-DnCNN, as published": partial(_zoo, "dncnn_dconv", **small),
            "DConv-DnCNN, norm": partial(_zoo, "dncnn_dconv", **small, norm="batch"),
        },
        wide="DnCNN, as many parameters",
        task=partial(_denoise_task, options, "Train400_gray"),
        judge=partial(_denoise_judge, options),
        needs=("denoise/Train400_gray", "denoise/Kodak24", "denoise/CBSD68"),
        rates=(1e-3, 2e-3, 4e-3),
        steps=1500,
        batch=8,
        changes=SCRATCH,
    )


def _mdcb() -> Study:
    options = {"sigma": 50, "color": False, "patch": 48, "patches_per_image": 8, "loss": "mse"}
    small: dict[str, Any] = {"channels": 1, "blocks": 3, "width": 16, "layers": 4}
    return Study(
        title="MDCB from scratch: gray denoising, σ 50, RDN of 3 dense blocks and 16 channels",
        arms={
            "RDN": partial(_zoo, "rdn", **small),
            "RDN, as many parameters": partial(_zoo, "rdn", **(small | {"width": 22})),
            "RDN with MDCB, as published": partial(_zoo, "rdn_mdcb", **small),
            "RDN with MDCB, norm": partial(_zoo, "rdn_mdcb", **small, norm="batch"),
        },
        wide="RDN, as many parameters",
        task=partial(_denoise_task, options, "Train400_gray"),
        judge=partial(_denoise_judge, options),
        needs=("denoise/Train400_gray", "denoise/Kodak24", "denoise/CBSD68"),
        rates=(5e-4, 1e-3, 2e-3),
        steps=500,
        batch=4,
        changes=SCRATCH,
    )


def _selected(name: str, title: str, options: dict[str, Any], rates: tuple[float, ...], **network: Any) -> Study:
    new = {"shared": True, "selection": "argmax", "norm": "batch"}
    plain = name.removeprefix("pafu_")
    return Study(
        title=title,
        arms={
            "plain": partial(_zoo, plain, **network),
            "PAFU, as published": partial(_zoo, name, **network),
            "PAFU, shared base": partial(_zoo, name, **network, layer_options=new),
        },
        task=partial(_sr_task, options),
        judge=partial(_sr_judge, options),
        needs=("sr/T91", "sr/Set5", "sr/Set14"),
        rates=rates,
        steps=1000,
        batch=8,
        changes=SCRATCH,
    )


# --- from trained weights ---------------------------------------------------------------------------------------------

GENTLE: dict[str, Any] = {"new_lr_scale": 0.1}  # the default: new parameters beside trained ones


def _converted(
    build: Callable[[Path], nn.Module], rule: Rule | None, size: tuple[int, ...], material: Path
) -> nn.Module:
    model = build(material)
    if rule is None:
        return model
    return surgeon.convert(model, recipe=Recipe(rules=(rule,)), input_size=size)[0]


def _arms(
    build: Callable[[Path], nn.Module], size: tuple[int, ...], rules: Mapping[str, Rule]
) -> dict[str, Callable[[Path], nn.Module]]:
    arms = {"original": partial(_converted, build, None, size)}
    return arms | {name: partial(_converted, build, rule, size) for name, rule in rules.items()}


def _rules(where: Mapping[str, str], group_size: int = 4) -> dict[str, Rule]:
    options: dict[str, dict[str, Any]] = {"acda": {}, "pafu": {"group_size": group_size}, "sekg": {}}
    return {kind.upper(): Rule(layers=layers, type=kind, options=options[kind]) for kind, layers in where.items()}


def _test_images(material: Path, *, choose: bool) -> data.Labeled:
    """Every fifth test image chooses, the others judge. (The networks have seen the training images before.)"""
    images = data.cifar_jpeg(material / TEST_SET)
    mask = (torch.arange(len(images.y)) % 5 == 4) == choose
    return data.Labeled(images.x[mask], images.y[mask])


class CifarStudyTask(CifarTask):
    """Rates are chosen by the accuracy: a higher one lowers the cross-entropy of overconfident networks, and the accuracy, too."""

    primary: ClassVar[str] = "top1"
    higher_is_better: ClassVar[bool] = True

    def __init__(self, config: TaskConfig, *, seed: int = 0, choose: bool = True) -> None:
        Task.__init__(self, config, seed=seed)
        material = config.data or data.data_folder()
        self.sets = {
            "train": Cifar(data.cifar_jpeg(material / TRAIN_SET), seed, train=True),
            "val": Cifar(_test_images(material, choose=choose), seed, train=False),
        }


def _cifar_task(material: Path, work: Path, seed: int) -> Task:
    return CifarStudyTask(TaskConfig(data=material), seed=seed)


def _cifar_judge(model: nn.Module, material: Path) -> Scores:
    found = evaluate(model, CifarStudyTask(TaskConfig(data=material), choose=False), batch_size=100)
    return {"top-1": 100 * found["top1"]}


def _classifier(name: str, where: Mapping[str, str], steps: int) -> Study:
    return Study(
        title=f"{name} converted and fine-tuned on CIFAR-10 (JPEG), {steps} steps of 64",
        arms=_arms(TASKS[name].build, (3, 32, 32), _rules(where)),
        task=_cifar_task,
        judge=_cifar_judge,
        needs=TASKS[name].needs,
        rates=(5e-4, 1e-3, 2e-3),
        steps=steps,
        batch=64,
        unit="% top-1",
        changes=GENTLE,
    )


FAST: dict[str, Any] = {"new_lr_scale": 1.0}
CROP = 128  # pixels of a side of the images that judge


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


def _blind_denoiser(name: str, folder: str, spread: str, mode: str, extra: Mapping[str, Rule]) -> Study:
    """A denoiser of one noise level learns all levels: what to do depends on the image."""
    channels = len(mode)
    options = {"sigma": "0-55", "val_sigma": 40, "color": channels == 3, "patch": 40, "patches_per_image": 8}

    def task(material: Path, work: Path, seed: int) -> Task:
        train, choose = _split(material / "denoise" / folder, work, CROP)
        return create_task("denoising", seed=seed, train=train, val=choose, val_limit=10, loss="mse", **options)

    rules = _rules(dict.fromkeys(("sekg", "acda", "pafu"), spread))
    return Study(
        title=f"{name}, trained for σ 25, converted and fine-tuned for any σ from 0 to 55",
        arms=_arms(TASKS[name].build, (channels, 40, 40), rules | extra),
        task=task,
        judge=partial(_blind_judge, mode),
        needs=TASKS[name].needs,
        rates=(1e-4, 3e-4, 1e-3),
        steps=200,
        batch=4,
        changes=GENTLE,
        ours=dict.fromkeys(extra, FAST),
    )


def _real_noise() -> Study:
    """Pairs of 15 scenes train, 5 choose, 5 judge."""
    ends = ("_real", "_mean")

    def pairs(material: Path) -> list[tuple[Path, ...]]:
        noisy = sorted((material / "denoise/PolyU_real").glob("*_real.JPG"))
        return [tuple(path.with_name(path.name.replace("_real", end)) for end in ends) for path in noisy]

    def task(material: Path, work: Path, seed: int) -> Task:
        for index, pair in enumerate(pairs(material)):
            part = ("train", "train", "choose", "train", "judge")[index % 5]
            for path in pair:
                _place(path, work / "polyu" / part / path.name, 192 if part == "choose" else None)
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
    return Study(
        title="dncnn_color, trained for Gaussian noise, converted and fine-tuned for a camera's noise (PolyU)",
        arms=_arms(TASKS["dncnn_color"].build, (3, 40, 40), _rules(dict.fromkeys(("sekg", "acda", "pafu"), spread))),
        task=task,
        judge=judge,
        needs=("weights/CDnCNN-S-25_color.pth", "denoise/PolyU_real"),
        rates=(3e-5, 1e-4, 3e-4),
        steps=200,
        batch=4,
        changes=GENTLE,
    )


NOISE = 0.08  # read noise of the mosaics that judge


def _noisy_demosaicking() -> Study:
    """A demosaicking network of clean mosaics learns noisy ones."""

    def task(material: Path, work: Path, seed: int) -> Task:
        train, choose = _split(material / "denoise/BSDS500train_color", work, CROP)
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
    return Study(
        title="demosaicnet, trained for clean mosaics, converted and fine-tuned for read noise up to 0.15",
        arms=_arms(TASKS["demosaicnet"].build, (3, 80, 80), _rules(dict.fromkeys(("sekg", "acda", "pafu"), spread))),
        task=task,
        judge=judge,
        needs=(*TASKS["demosaicnet"].needs, "denoise/BSDS500train_color"),
        rates=(1e-4, 3e-4, 1e-3),
        steps=200,
        batch=4,
        changes=GENTLE,
    )


def _segmenter() -> Study:
    experiment = EXPERIMENTS["camvid"]

    def task(material: Path, work: Path, seed: int) -> Task:
        """The last fifth of the training images chooses."""
        root = work / "camvid"
        for kind in ("images", "labels"):
            files = sorted((material / "seg_camvid/train" / kind).iterdir())
            for index, path in enumerate(files):
                _place(path, root / ("val" if index % 5 == 4 else "train") / kind / path.name)
        size: dict[str, Any] = {"input_size": (3, 192, 256), "classes": 11, "ignore_index": 11}
        return create_task("segmentation", seed=seed, data=root, mean=(0.5,) * 3, std=(0.5,) * 3, multiple=32, **size)

    def judge(model: nn.Module, material: Path) -> Scores:
        own = experiment.task(material, 0, None)
        return {"mIoU": 100 * evaluate(own.bind(model), own, batch_size=5)["miou"]}

    def build(material: Path) -> nn.Module:
        return lraspp(material)

    last = "backbone.body.blocks.4.*.conv_dw"
    return Study(
        title="LR-ASPP over MobileNetV2 converted and fine-tuned on CamVid",
        arms=_arms(build, (3, 192, 256), _rules({"acda": last, "sekg": last})),
        task=task,
        judge=judge,
        needs=experiment.needs,
        rates=(1e-3, 2e-3, 4e-3),
        steps=150,
        batch=8,
        unit="% mIoU",
        changes=GENTLE,
    )


# --- made images ------------------------------------------------------------------------------------------------------


def _selector_from_scratch(material: Path) -> nn.Module:
    """Two independent kernels, drawn at random, and a selector of 3 layers and 44 channels."""
    config = PAFUConfig(group_size=2, hidden=44, selector_depth=3, perturbation=1.0, shared=False)
    layer = PAFUConv2d.from_conv(nn.Conv2d(3, 3, 5, padding=2, bias=False), config)
    layer.selector.expand.reset_parameters()
    return layer


def _sad() -> Study:
    def judge(model: nn.Module, material: Path) -> Scores:
        """On 100 images that neither train nor choose: another seed's training images."""
        task = create_task("sad", seed=1000, train_limit=100)
        return {"error × 1000": 1000 * evaluate(model, task, split="train", batch_size=10)["l1"]}

    return Study(
        title="SAD (PAFU §3.2): dilate black pixels, leave the others; smooth L1",
        arms={
            "plain": lambda material: toys.Plain(35),
            "residual": lambda material: toys.Residual(35),
            "kernel prediction": lambda material: toys.Predicted(38, outputs=25, layers=4),
            "PAFU, two kernels": _selector_from_scratch,
            "PAFU, without the regularizer": _selector_from_scratch,
        },
        wide="kernel prediction",
        task=lambda material, work, seed: create_task("sad", seed=seed, beta=0.1, images=2000),
        judge=judge,
        needs=(),
        rates=(3e-3, 1e-2, 3e-2),
        steps=2000,
        batch=1,
        unit="mean absolute error, lower is better",
        lower=True,
        changes=SCRATCH | {"regularization": 1.0},  # eq. 4
        ours={"PAFU, without the regularizer": {"regularization": 0.0}},
    )


STUDIES: dict[str, Callable[[], Study]] = {
    "sad": _sad,
    "acda-sr": _restorer,
    "dconv-denoising": _denoiser,
    "mdcb-denoising": _mdcb,
    "pafu-linear-sr": lambda: _selected(
        "pafu_linear_sr_x3",
        "PAFU from scratch: linear ×3 super-resolution",
        {"scale": 3, "patch": 72},
        (1e-3, 2e-3, 4e-3),
    ),
    "pafu-espcnn": lambda: _selected(
        "pafu_espcnn", "PAFU from scratch: ESPCN ×3", {"scale": 3, "patch": 72}, (1e-3, 2e-3, 4e-3)
    ),
    "pafu-srcnn": lambda: _selected(
        "pafu_srcnn", "PAFU from scratch: SRCNN ×3", {"scale": 3, "patch": 48, "input": "bicubic"}, (2.5e-4, 5e-4, 1e-3)
    ),
    "resnet20": lambda: _classifier(
        "resnet20_cifar",
        {"pafu": "layer1.0.conv1,layer2.0.conv1,layer3.0.conv1", "sekg": "layer3.1.conv1", "acda": "layer3"},
        320,
    ),
    "blind-gray": lambda: _blind_denoiser(
        "dncnn",
        "Train400_gray",
        "body.8,body.20,body.32,body.44",
        "L",
        {"SEKG, new rate × 1": Rule(layers="body.8,body.20,body.32,body.44", type="sekg")},
    ),
    "blind-color": lambda: _blind_denoiser(
        "dncnn_color", "BSDS500train_color", "body.8,body.16,body.24,body.32", "RGB", {}
    ),
    "real-noise": _real_noise,
    "noisy-demosaicking": _noisy_demosaicking,
    "camvid": _segmenter,
}
