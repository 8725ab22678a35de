"""Dynamic networks from scratch, beside plain ones of equal depth and of as many parameters."""

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks import toys
from benchmarks.studies.study import PUBLISHED, SCRATCH, Scores, Study, denoise_judge, denoise_task, sr_judge, sr_task
from surgeon.layers import PAFUConfig, PAFUConv2d
from surgeon.zoo import create
from surgeon.zoo.evaluate import evaluate
from surgeon.zoo.tasks import create_task


def _zoo(name: str, material: Path, **options: Any) -> nn.Module:
    return create(name, **options)


def restorer() -> Study:
    options = {"scale": 3, "input": "bicubic", "patch": 48, "loss": "mse"}
    small = {"width": 64, "inner": 32, "blocks": 2}
    return Study(
        title="ACDA from scratch: ×3 super-resolution, two bottleneck blocks of 64-32-64 channels",
        arms={
            "conv": partial(_zoo, "realsr_conv", **small),
            "conv, as many parameters": partial(_zoo, "realsr_conv", **(small | {"inner": 84})),
            "ACDA, as published": partial(_zoo, "acda_realsr", **small),
            "ACDA, norm": partial(_zoo, "acda_realsr", **small, layer_options={"norm": "batch"}),
            "ACDA, norm, slowed": partial(_zoo, "acda_realsr", **small, layer_options={"norm": "batch"}),
        },
        ours={"ACDA, norm, slowed": {"fan_in_lr": True}},
        wide="conv, as many parameters",
        task=partial(sr_task, options),
        judge=partial(sr_judge, options),
        needs=("sr/T91", "sr/Set5", "sr/Set14"),
        rates=(5e-4, 1e-3, 2e-3),
        steps=2000,
        batch=4,
        changes=SCRATCH | PUBLISHED,
    )


def _gray_denoiser(
    title: str,
    plain: str,
    ours: str,
    names: tuple[str, str],
    small: dict[str, Any],
    wide: int,
    rates: tuple[float, ...],
    steps: int,
    batch: int,
) -> Study:
    """Gray denoising of σ 50 by networks of `small` options; `wide` is the width of as many parameters; `names` are shown."""
    options = {"sigma": 50, "color": False, "patch": 48, "patches_per_image": 8, "loss": "mse"}
    theirs, mine = names
    return Study(
        title=title,
        arms={
            theirs: partial(_zoo, plain, **small),
            f"{theirs}, as many parameters": partial(_zoo, plain, **(small | {"width": wide})),
            f"{mine}, as published": partial(_zoo, ours, **small),
            f"{mine}, norm": partial(_zoo, ours, **small, norm="batch"),
        },
        wide=f"{theirs}, as many parameters",
        task=partial(denoise_task, options, "Train400_gray"),
        judge=partial(denoise_judge, options),
        needs=("denoise/Train400_gray", "denoise/Kodak24", "denoise/CBSD68"),
        rates=rates,
        steps=steps,
        batch=batch,
        changes=SCRATCH | PUBLISHED,
    )


def denoiser() -> Study:
    return _gray_denoiser(
        "DConv from scratch: gray denoising, σ 50, DnCNN of 5 layers and 16 channels",
        "dncnn",
        "dncnn_dconv",
        ("DnCNN", "DConv-DnCNN"),
        {"channels": 1, "depth": 5, "width": 16},
        wide=17,
        rates=(1e-3, 2e-3, 4e-3),
        steps=1500,
        batch=8,
    )


def mdcb() -> Study:
    return _gray_denoiser(
        "MDCB from scratch: gray denoising, σ 50, RDN of 3 dense blocks and 16 channels",
        "rdn",
        "rdn_mdcb",
        ("RDN", "RDN with MDCB"),
        {"channels": 1, "blocks": 3, "width": 16, "layers": 4},
        wide=31,
        rates=(5e-4, 1e-3, 2e-3),
        steps=500,
        batch=4,
    )


def selected(name: str, title: str, options: dict[str, Any], rates: tuple[float, ...], **network: Any) -> Study:
    new = {"shared": True, "selection": "argmax", "norm": "batch"}
    plain = name.removeprefix("pafu_")
    return Study(
        title=title,
        arms={
            "plain": partial(_zoo, plain, **network),
            "PAFU, as published": partial(_zoo, name, **network),
            "PAFU, shared base": partial(_zoo, name, **network, layer_options=new),
        },
        task=partial(sr_task, options),
        judge=partial(sr_judge, options),
        needs=("sr/T91", "sr/Set5", "sr/Set14"),
        rates=rates,
        steps=1000,
        batch=8,
        changes=SCRATCH | PUBLISHED,
        ours={"PAFU, shared base": {"regularization": 0.0}},  # which at 1e-3 outweighs an error of 0.003
    )


def _selector_from_scratch(material: Path) -> nn.Module:
    """Two independent kernels, drawn at random, and a selector of 3 layers and 44 channels."""
    config = PAFUConfig(group_size=2, hidden=44, selector_depth=3, perturbation=1.0, shared=False)
    layer = PAFUConv2d.from_conv(nn.Conv2d(3, 3, 5, padding=2, bias=False), config)
    layer.selector.expand.reset_parameters()
    return layer


def sad() -> Study:
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
        changes=SCRATCH | PUBLISHED | {"regularization": 1.0},  # eq. 4
        ours={"PAFU, without the regularizer": {"regularization": 0.0}},
    )
