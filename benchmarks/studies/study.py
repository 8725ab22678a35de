"""A study: networks trained alike, on images of which some choose and others judge; and what studies share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

import surgeon
from benchmarks import _data as data
from benchmarks._cifar import TEST_SET, TRAIN_SET, Cifar, CifarTask
from surgeon.records.recipe import Recipe, Rule
from surgeon.zoo.evaluate import evaluate
from surgeon.zoo.tasks import Task, TaskConfig, create_task

Scores = dict[str, float]

# changes of the fine-tuning's options
SCRATCH: dict[str, Any] = {"opt": "adam", "weight_decay": 0.0, "new_lr_scale": 1.0, "warmup": "5%"}
PUBLISHED: dict[str, Any] = {"fan_in_lr": False, "regularization": 1e-3}  # the defaults before `fan_in_lr`
TODAY: dict[str, Any] = {"fan_in_lr": True, "regularization": 0.0}  # the defaults since
GENTLE: dict[str, Any] = {"new_lr_scale": 0.1}  # new parameters beside trained ones
FAST: dict[str, Any] = {"new_lr_scale": 1.0}


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


# --- images -----------------------------------------------------------------------------------------------------------


def place(path: Path, target: Path, crop: int | None = None) -> None:
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
def split(folder: Path, work: Path, crop: int | None = None) -> tuple[Path, Path]:
    """(training images, images that choose) of a folder: every tenth chooses, its center only with `crop`."""
    parts = (work / folder.name / "train", work / folder.name / "choose")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    for index, path in enumerate(files):
        chooses = index % 10 == 9
        place(path, parts[chooses] / path.name, crop if chooses else None)
    return parts


def sr_task(options: Mapping[str, Any], material: Path, work: Path, seed: int) -> Task:
    train, choose = split(material / "sr/T91", work)
    return create_task("super-resolution", seed=seed, train=train, val=choose, **options)


def sr_judge(options: Mapping[str, Any], model: nn.Module, material: Path) -> Scores:
    scores = {}
    for name in ("Set5", "Set14"):
        task = create_task("super-resolution", seed=0, train=material / "sr/T91", val=material / "sr" / name, **options)
        scores[name] = evaluate(task.bind(model), task, batch_size=1)["psnr"]
    return scores


def denoise_task(options: Mapping[str, Any], folder: str, material: Path, work: Path, seed: int) -> Task:
    train, choose = split(material / "denoise" / folder, work)
    return create_task("denoising", seed=seed, train=train, val=choose, val_limit=10, **options)


def denoise_judge(options: Mapping[str, Any], model: nn.Module, material: Path) -> Scores:
    scores = {}
    for name in ("Kodak24", "CBSD68"):
        root = material / "denoise"
        task = create_task("denoising", seed=0, train=root / name, val=root / name, **options)
        scores[name] = evaluate(task.bind(model), task, batch_size=1)["psnr"]
    return scores


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


def cifar_task(material: Path, work: Path, seed: int) -> Task:
    return CifarStudyTask(TaskConfig(data=material), seed=seed)


def cifar_judge(model: nn.Module, material: Path) -> Scores:
    found = evaluate(model, CifarStudyTask(TaskConfig(data=material), choose=False), batch_size=100)
    return {"top-1": 100 * found["top1"]}


# --- conversions ------------------------------------------------------------------------------------------------------


def converted(
    build: Callable[[Path], nn.Module], rule: Rule | None, size: tuple[int, ...], material: Path
) -> nn.Module:
    model = build(material)
    if rule is None:
        return model
    return surgeon.convert(model, recipe=Recipe(rules=(rule,)), input_size=size)[0]


def arms(
    build: Callable[[Path], nn.Module], size: tuple[int, ...], rules: Mapping[str, Rule]
) -> dict[str, Callable[[Path], nn.Module]]:
    arms = {"original": partial(converted, build, None, size)}
    return arms | {name: partial(converted, build, rule, size) for name, rule in rules.items()}


def slow_and_fast(found: Mapping[str, Rule]) -> tuple[dict[str, Rule], dict[str, dict[str, Any]]]:
    """ACDA at today's defaults with both rates of new parameters: the rules with that added, and each arm's own options."""
    fast = "ACDA, new rate × 1"
    return {**found, fast: found["ACDA"]}, {"ACDA": GENTLE | TODAY, fast: FAST | TODAY}


def rules(where: Mapping[str, str], group_size: int = 4) -> dict[str, Rule]:
    options: dict[str, dict[str, Any]] = {"acda": {}, "pafu": {"group_size": group_size}, "sekg": {}}
    return {kind.upper(): Rule(layers=layers, type=kind, options=options[kind]) for kind, layers in where.items()}
