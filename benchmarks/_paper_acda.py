"""Wang et al., "Adaptive Convolutions with Per-pixel Dynamic Filter Atom": its Tables 1, 3, 4, 5 and B."""

from typing import Any

from benchmarks._paper_tables import Arm, Comparison, Scores, two
from surgeon.records.recipe import Rule
from surgeon.zoo.networks.ad_resnet import ACDA
from surgeon.zoo.networks.restorer import RULES


def _lenet(setting: str, data: str, plain: float, ours: float) -> Comparison:
    published = ({"test error": plain}, {"test error": ours})
    return Comparison(
        table="ACDA 1",
        setting=setting,
        title=f"LeNet on {setting}, top-1 error in %",
        recipe="lenet",
        data=data,
        arms=two(("LeNet", "lenet"), ("LeNet + ACDA", "lenet_acda"), published=published),
        metrics={"error": 100.0},
        lower=True,
        small_train={"max_steps": 1500},
    )


def _crowd(setting: str, data: str, *scores: tuple[float, float]) -> Comparison:
    names = ("Baseline", "Ad-ResNet-s", "Ad-ResNet-m")
    networks = ("ad_resnet_crowd_baseline", "ad_resnet_crowd_s", "ad_resnet_crowd_m")
    arms = tuple(
        Arm(
            name=name,
            network=network,
            of=None if name == "Baseline" else "Baseline",
            published={f"{setting} mae": mae, f"{setting} mse": mse},
        )
        for name, network, (mae, mse) in zip(names, networks, scores, strict=True)
    )
    return Comparison(
        table="ACDA 3",
        setting=setting,
        title=f"Crowd counting, {setting}",
        recipe="ad_resnet_crowd",
        data=data,
        arms=arms,
        metrics={"mae": 1.0, "mse": 1.0},
        lower=True,
        small_train={"max_steps": 200},
        note="no weights from ImageNet at small scale",
    )


_BICUBIC: dict[str, Any] = {"scale": 3, "input": "bicubic", "patch": 48, "loss": "mse", "val_limit": 5}


def _realsr(scale: int, *scores: tuple[float, float]) -> Comparison:
    names = ("Conv", "KPN, l = 5", "KPN, l = 19", "ACDA")
    networks = ("realsr_conv", "kpn", "kpn_l19", "acda_realsr")
    printed: tuple[Scores, ...] = ({}, *({"RealSR psnr": p, "RealSR ssim": s} for p, s in scores))
    arms = tuple(
        Arm(name=name, network=network, of=None if name == "Conv" else "Conv", published=published)
        for name, network, published in zip(names, networks, printed, strict=True)
    )
    return Comparison(
        table="ACDA 4",
        setting=f"x{scale}",
        title=f"RealSR (final), ×{scale}",
        recipe="realsr",
        presets=() if scale == 2 else (f"x{scale}",),
        data=f"realsr-x{scale}",
        arms=arms,
        metrics={"psnr": 1.0, "ssim": 1.0},
        small_task="super-resolution",
        small_options=_BICUBIC,
        small_train={"max_steps": 3000},
        note="the paper has no row for the convolutional twin",
    )


def _sidd() -> Comparison:
    def printed(psnr: float, ssim: float) -> Scores:
        return {"SIDD psnr": psnr, "SIDD ssim": ssim}

    return Comparison(
        table="ACDA 5",
        setting="SIDD",
        title="Real denoising",
        recipe="sidd",
        data="sidd",
        arms=(
            Arm(name="Baseline + MSE", network="sidd_conv", published=printed(38.74, 0.902)),
            Arm(name="ACDA + MSE", network="acda_sidd", of="Baseline + MSE", published=printed(38.96, 0.905)),
            Arm(
                name="ACDA + VDNet",
                network="acda_vdn",
                of="Baseline + MSE",
                recipe="sidd_variational",
                published=printed(39.32, 0.912),
            ),
        ),
        metrics={"psnr": 1.0, "ssim": 1.0},
        small_train={"max_steps": 3000},
    )


def _ablation_b() -> Comparison:
    atoms = {3: (30.52, 0.858), 5: (30.68, 0.866), 7: (30.73, 0.868), 9: (30.74, 0.868), 11: (30.75, 0.869)}
    atoms |= {13: (30.73, 0.866), 15: (30.74, 0.868)}
    scales = {1: (30.63, 0.866), 2: (30.73, 0.868), 3: (30.72, 0.868), 4: (30.70, 0.865), 5: (30.69, 0.866)}

    def arm(name: str, options: dict[str, Any], scores: tuple[float, float], of: str | None) -> Arm:
        rules = tuple(Rule(layers=rule.layers, type=rule.type, options=ACDA | options) for rule in RULES)
        printed = {"RealSR psnr": scores[0], "RealSR ssim": scores[1]}
        return Arm(name=name, network="realsr_conv", rules=rules, published=printed, of=of)

    rows = [arm(f"m = {m}", {"atoms": m}, scores, None if m == 3 else "m = 3") for m, scores in atoms.items()]
    rows += [arm(f"S = {s}", {"scales": s}, scores, None if s == 1 else "S = 1") for s, scores in scales.items()]
    return Comparison(
        table="ACDA B",
        setting="x3",
        title="Number of atoms m (S = 3) and of scales S (m = 6), RealSR (final) ×3",
        recipe="realsr",
        presets=("x3",),
        data="realsr-x3",
        arms=tuple(rows),
        metrics={"psnr": 1.0, "ssim": 1.0},
        small_task="super-resolution",
        small_options=_BICUBIC,
        small_train={"max_steps": 2000},
    )


def acda() -> list[Comparison]:
    """Tables 1, 3, 4, 5 and B."""
    return [
        _lenet("CIFAR-10", "cifar10", 24.74, 16.27),
        _lenet("CIFAR-100", "cifar100", 56.60, 49.53),
        _crowd("SHTech-A", "crowd-a", (67.73, 110.12), (57.88, 91.27), (56.04, 89.76)),
        _crowd("UCF-QNRF", "crowd-qnrf", (124.77, 210.05), (99.22, 182.13), (96.08, 176.87)),
        _realsr(2, (33.41, 0.913), (33.45, 0.914), (33.54, 0.918)),
        _realsr(3, (30.47, 0.860), (30.57, 0.864), (30.73, 0.868)),
        _realsr(4, (28.80, 0.826), (28.99, 0.832), (29.28, 0.836)),
        _sidd(),
        _ablation_b(),
    ]
