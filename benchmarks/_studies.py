"""What `benchmarks.learning` trains: dynamic networks beside plain twins, from scratch or from trained weights.

Every study has images that choose (a tenth of the training images, which nothing is trained on) and images that judge.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import surgeon
from benchmarks import _data as data
from benchmarks import toys
from benchmarks._cifar import TRAIN_SET, Cifar, CifarTask
from benchmarks._experiments import EXPERIMENTS, lraspp
from benchmarks._tasks import TASKS
from benchmarks._tasks import evaluate as evaluate_trained
from surgeon.layers import PAFUConfig, PAFUConv2d
from surgeon.recipe import Recipe, Rule
from surgeon.zoo import create
from surgeon.zoo.evaluate import evaluate
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


@cache
def _split(folder: Path, work: Path) -> tuple[Path, Path]:
    """(training images, images that choose) of a folder: every tenth chooses."""
    parts = (work / folder.name / "train", work / folder.name / "choose")
    for part in parts:
        part.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    for index, path in enumerate(files):
        target = parts[index % 10 == 9] / path.name
        if not target.exists():
            target.symlink_to(path)
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
        title="DConv from scratch: grey denoising, σ 50, DnCNN of 5 layers and 16 channels",
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
        title="MDCB from scratch: grey denoising, σ 50, RDN of 3 dense blocks and 16 channels",
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


class CifarStudyTask(CifarTask):
    """Trains on nine tenths of the training images; the other tenth chooses."""

    def __init__(self, config: TaskConfig, *, seed: int = 0) -> None:
        Task.__init__(self, config, seed=seed)
        images = data.cifar_jpeg((config.data or data.data_folder()) / TRAIN_SET)
        kept = torch.arange(len(images.y)) % 10 != 9
        parts = (data.Labelled(images.x[mask], images.y[mask]) for mask in (kept, ~kept))
        self.sets = {
            split: Cifar(part, seed, train=split == "train")
            for split, part in zip(("train", "val"), parts, strict=True)
        }


def _cifar_task(material: Path, work: Path, seed: int) -> Task:
    return CifarStudyTask(TaskConfig(data=material), seed=seed)


def _cifar_judge(model: nn.Module, material: Path) -> Scores:
    task = CifarTask(TaskConfig(data=material))
    return {"top-1": 100 * evaluate(model, task, batch_size=100)["top1"]}


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


def _judged(name: str, model: nn.Module, material: Path) -> Scores:
    return {key: score.summary for key, score in evaluate_trained(model, TASKS[name], material).items()}


def _trained_denoiser(
    name: str, folder: str, where: Mapping[str, str], channels: int, rates: tuple[float, ...]
) -> Study:
    options = {"sigma": 25, "color": channels == 3, "patch": 48, "patches_per_image": 8, "loss": "mse"}
    return Study(
        title=f"{name} converted and fine-tuned for Gaussian noise of σ 25",
        arms=_arms(TASKS[name].build, (channels, 48, 48), _rules(where)),
        task=partial(_denoise_task, options, folder),
        judge=partial(_judged, name),
        needs=(*TASKS[name].needs, f"denoise/{folder}"),
        rates=rates,
        steps=200,
        batch=8,
        changes=GENTLE,
    )


def _trained_sr() -> Study:
    options = {"scale": 2, "patch": 72, "patches_per_image": 8}
    return Study(
        title="CARN-M converted and fine-tuned for ×2 super-resolution",
        arms=_arms(TASKS["carn_m"].build, (3, 36, 36), _rules({"pafu": "exit", "sekg": "exit", "acda": "exit"})),
        task=partial(_sr_task, options),
        judge=partial(_judged, "carn_m"),
        needs=TASKS["carn_m"].needs,
        rates=(1e-5, 3e-5, 1e-4),
        steps=200,
        batch=8,
        changes=GENTLE,
    )


def _trained_demosaicking() -> Study:
    def task(material: Path, work: Path, seed: int) -> Task:
        train, choose = _split(material / "denoise/BSDS500train_color", work)
        options: dict[str, Any] = {"pattern": "GRBG", "patch": 96, "patches_per_image": 8, "loss": "mse"}
        return create_task("demosaicking", seed=seed, train=train, val=choose, **options)

    return Study(
        title="demosaicnet converted and fine-tuned",
        arms=_arms(
            TASKS["demosaicnet"].build, (3, 96, 96), _rules({"pafu": "chain.0", "acda": "chain.6", "sekg": "chain.6"})
        ),
        task=task,
        judge=partial(_judged, "demosaicnet"),
        needs=(*TASKS["demosaicnet"].needs, "denoise/BSDS500train_color"),
        rates=(1e-5, 3e-5, 1e-4),
        steps=150,
        batch=8,
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
                target = root / ("val" if index % 5 == 4 else "train") / kind / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.exists():
                    target.symlink_to(path)
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
        {"acda": "layer3", "pafu": "layer1.0.conv1,layer2.0.conv1,layer3.0.conv1"},
        320,
    ),
    "dncnn": lambda: _trained_denoiser(
        "dncnn", "Train400_gray", dict.fromkeys(("acda", "pafu", "sekg"), "body.23"), 1, (1e-4, 3e-4, 1e-3)
    ),
    "dncnn_color": lambda: _trained_denoiser(
        "dncnn_color", "BSDS500train_color", dict.fromkeys(("acda", "pafu", "sekg"), "body.20"), 3, (1e-5, 3e-5, 1e-4)
    ),
    "carn_m": _trained_sr,
    "demosaicnet": _trained_demosaicking,
    "camvid": _segmenter,
}
