"""The comparisons of the three papers: which networks, by which recipe, on which data, and what the papers print.

Scores are those of the papers' tables, by the name of a judgement and of a metric: PSNR in dB, errors in per cent of images,
MAE and (root) MSE of counts, mIoU and pixel accuracy in per cent.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from surgeon.recipe import Rule

Scores = Mapping[str, float]  # "Set5 psnr" -> 36.22


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One network of a comparison.

    `of` is the arm whose difference from this one is asked for (None: this is what the others are measured against).
    `rules` make the network of `network` by surgery. `small_network` takes its place at small scale. `judged_by` are options
    for the judgement; an arm `trained_as` another is that one judged otherwise.
    """

    name: str
    network: str
    of: str | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    small_network: str | None = None
    small_model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    presets: tuple[str, ...] = ()
    judged_by: Mapping[str, Any] = field(default_factory=dict)
    trained_as: str | None = None
    published: Scores = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Arms trained alike and judged on the same images: one table, or one setting of a table (a scale, a level of noise).

    `small` are options at small scale that are laid over the recipe's; `small_task` takes the place of the recipe's task there.
    `differences` are gains that the paper prints without the scores.
    """

    table: str
    setting: str
    title: str
    recipe: str
    data: str
    arms: tuple[Arm, ...]
    metrics: Mapping[str, float] = field(default_factory=lambda: {"psnr": 1.0})  # name -> factor on what the task gives
    lower: bool = False
    presets: tuple[str, ...] = ()
    task_options: Mapping[str, Any] = field(default_factory=dict)
    small_task: str | None = None
    small_options: Mapping[str, Any] = field(default_factory=dict)
    small_train: Mapping[str, Any] = field(default_factory=dict)
    differences: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def key(self) -> str:
        """Name of the comparison in rows."""
        return f"{self.table}/{self.setting}"


def _two(first: tuple[str, str], second: tuple[str, str], **more: Any) -> tuple[Arm, Arm]:
    """The plain network and ours, (name, network) each; `more` holds (plain, ours) pairs of further fields."""
    plain = {key: pair[0] for key, pair in more.items()}
    ours = {key: pair[1] for key, pair in more.items()}
    return (Arm(name=first[0], network=first[1], **plain), Arm(name=second[0], network=second[1], of=first[0], **ours))


# --- ACDA -------------------------------------------------------------------------------------------------------------


def _lenet(setting: str, data: str, plain: float, ours: float) -> Comparison:
    published = ({"test error": plain}, {"test error": ours})
    return Comparison(
        table="ACDA 1",
        setting=setting,
        title=f"LeNet on {setting}, top-1 error in %",
        recipe="lenet",
        data=data,
        arms=_two(("LeNet", "lenet"), ("LeNet + ACDA", "lenet_acda"), published=published),
        metrics={"error": 100.0},
        lower=True,
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
    )


def _ablation_b() -> Comparison:
    from surgeon.zoo.networks.ad_resnet import ACDA
    from surgeon.zoo.networks.restorer import RULES

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
    )


# --- PAFU -------------------------------------------------------------------------------------------------------------


def _linear_demosaic(noisy: bool, small: float, both: float) -> Comparison:
    return Comparison(
        table="PAFU 1",
        setting="noisy" if noisy else "noise-free",
        title=f"Linear demosaicking, {'noisy' if noisy else 'noise-free'}",
        recipe="linear_demosaic",
        presets=("noisy",) if noisy else (),
        data="demosaic",
        arms=(
            Arm(name="5×5 convolution", network="linear_demosaic"),
            Arm(name="5×5", network="pafu_linear_demosaic", of="5×5 convolution", published={"MSR psnr": small}),
            Arm(name="5×5&7×7", network="pafu_linear_demosaic_7x7", of="5×5 convolution", published={"MSR psnr": both}),
        ),
        note="the paper has no row for the plain convolution",
    )


def _linear_sr(scale: int, *scores: tuple[float, float]) -> Comparison:
    printed = [{"Set5 psnr": a, "Set14 psnr": b} for a, b in scores]
    plain, ensemble = "5×5 convolution", {"self_ensemble": True}
    networks = (f"pafu_linear_sr_x{scale}", f"pafu_linear_sr_7x7_x{scale}")
    names = ("5×5", "5×5&7×7")
    arms = [Arm(name=plain, network=f"linear_sr_x{scale}")]
    arms += [
        Arm(name=n, network=net, of=plain, published=p) for n, net, p in zip(names, networks, printed[:2], strict=True)
    ]
    arms += [
        Arm(name=f"{n}, +", network=net, of=n, published=p, trained_as=n, judged_by=ensemble)
        for n, net, p in zip(names, networks, printed[2:], strict=True)
    ]
    return Comparison(
        table="PAFU 2",
        setting=f"x{scale}",
        title=f"Linear super-resolution ×{scale}; + is self-ensemble",
        recipe="linear_sr",
        presets=() if scale == 2 else (f"x{scale}",),
        data="sr",
        arms=tuple(arms),
        note="the paper has no row for the plain convolution",
    )


def _iterative(noisy: bool, plain: float, ours: float) -> Comparison:
    published = ({"MSR psnr": plain}, {"MSR psnr": ours})
    networks = ("Kokkinos", "iterative_demosaic"), ("PAFU-Kokkinos", "pafu_iterative_demosaic")
    return Comparison(
        table="PAFU 3",
        setting="noisy" if noisy else "noise-free",
        title=f"Iterative demosaicking, {'noisy' if noisy else 'noise-free'}",
        recipe="iterative_demosaic",
        presets=("noisy",) if noisy else (),
        data="demosaic",
        arms=_two(*networks, published=published),
    )


_SR_SETS = ("Set5", "Set14", "B100", "Urban100")
_SR = {  # Table 4: Set5, Set14, B100, Urban100 at ×2, ×3, ×4
    "SRCNN": ((36.66, 32.45, 31.36, 29.5), (32.75, 29.30, 28.41, 26.24), (30.48, 27.50, 26.90, 24.52)),
    "PAFU-SRCNN": ((36.91, 32.65, 31.44, 29.80), (32.83, 29.42, 28.40, 26.32), (30.65, 27.67, 26.95, 24.63)),
    "ESPCNN": ((36.83, 32.56, 31.38, 29.54), (32.92, 29.42, 28.44, 26.28), (30.57, 27.60, 26.92, 24.50)),
    "PAFU-ESPCNN": ((37.10, 32.76, 31.57, 30.04), (33.08, 29.53, 28.53, 26.48), (30.87, 27.77, 27.01, 24.73)),
}


def _sr(recipe: str, plain: str, scale: int) -> Comparison:
    published = tuple(
        {f"{name} psnr": value for name, value in zip(_SR_SETS, _SR[row][scale - 2], strict=True)}
        for row in (plain, f"PAFU-{plain}")
    )
    return Comparison(
        table="PAFU 4",
        setting=f"{plain} x{scale}",
        title=f"{plain} ×{scale}",
        recipe=recipe,
        presets=() if scale == 2 else (f"x{scale}",),
        data="sr",
        arms=_two((plain, recipe), (f"PAFU-{plain}", f"pafu_{recipe}"), published=published),
    )


def _resnet_pafu() -> list[Comparison]:
    from surgeon.zoo.networks.resnet_cifar import RULES

    made = []
    for name, data, network, plain, ours in (
        ("CIFAR-10", "cifar10", "pafu_resnet110_cifar", 6.41, 5.33),
        ("CIFAR-100", "cifar100", "pafu_resnet110_cifar100", 27.76, 26.02),
    ):
        arms = (
            Arm(
                name="ResNet-110",
                network="resnet110_cifar",
                small_network="resnet20_cifar",
                published={"test error": plain},
            ),
            Arm(
                name="PAFU-ResNet-110",
                network=network,
                small_network="resnet20_cifar",
                rules=RULES,
                of="ResNet-110",
                published={"test error": ours},
            ),
        )
        made.append(
            Comparison(
                table="PAFU 5",
                setting=name,
                title=f"{name}, top-1 error in %",
                recipe="pafu_resnet_cifar",
                data=data,
                arms=arms,
                metrics={"error": 100.0},
                lower=True,
                small_train={"max_steps": 250, "batch_size": 32},
                small_options={"val_limit": 1000},
                note='ResNet-20 with PAFU in the same places at small scale; the plain network\'s number is "By [19]"',
            )
        )
    for depth, (top1, top5), (ours1, ours5) in ((50, (24.7, 7.8), (23.42, 6.82)), (101, (23.6, 7.1), (22.08, 5.9))):
        made.append(
            Comparison(
                table="PAFU 5",
                setting=f"ImageNet {depth}",
                title=f"ResNet-{depth} on ImageNet, errors in %",
                recipe="pafu_resnet",
                data="imagenet",
                arms=_two(
                    (f"ResNet-{depth}", f"timm:resnet{depth}"),
                    (f"PAFU-ResNet-{depth}", f"pafu_resnet{depth}"),
                    published=({"val error": top1, "val error5": top5}, {"val error": ours1, "val error5": ours5}),
                ),
                metrics={"error": 100.0, "error5": 100.0},
                lower=True,
            )
        )
    return made


def _pspnet() -> Comparison:
    def printed(miou: float, accuracy: float) -> Scores:
        return {"ADE20K miou": miou, "ADE20K pixel_accuracy": accuracy}

    return Comparison(
        table="PAFU 6",
        setting="ADE20K",
        title="Semantic segmentation, single scale, %",
        recipe="pspnet",
        data="segmentation",
        arms=_two(
            ("ResNet50+PPM", "pspnet"),
            ("ResNet50+PAFU-PPM", "pafu_pspnet"),
            published=(printed(41.26, 79.73), printed(41.89, 80.17)),
        ),
        metrics={"miou": 100.0, "pixel_accuracy": 100.0},
    )


# --- ADFNet -----------------------------------------------------------------------------------------------------------

_DENOISE = {  # Table 1: Kodak24, BSD68, McMaster (σ = 50 only)
    30: {"DnCNN": (31.39, 30.40, None), "RDN": (31.94, 30.67, None), "ADFNet": (32.01, 30.74, None)},
    50: {"DnCNN": (29.16, 28.01, 28.62), "RDN": (29.66, 28.31, None), "ADFNet": (29.81, 28.43, 29.96)},
    70: {"DnCNN": (27.64, 26.56, None), "RDN": (28.20, 26.85, None), "ADFNet": (28.48, 27.03, None)},
}


def _denoised(row: tuple[float | None, ...]) -> Scores:
    named = zip(("Kodak24 psnr", "BSD68 psnr", "McMaster psnr"), row, strict=False)
    return {name: value for name, value in named if value is not None}


def _adfnet(sigma: int) -> Comparison:
    printed = _DENOISE[sigma]
    color = {"channels": 3}
    return Comparison(
        table="ADFNet 1",
        setting=f"σ = {sigma}",
        title=f"Colour denoising, σ = {sigma}",
        recipe="adfnet",
        data="denoise",
        task_options={"sigma": sigma},
        arms=(
            Arm(
                name="DnCNN",
                network="dncnn",
                recipe="adfnet_backbones",
                model=color,
                small_model={"depth": 10},
                published=_denoised(printed["DnCNN"]),
            ),
            Arm(
                name="RDN",
                network="rdn",
                recipe="adfnet_backbones",
                of="DnCNN",
                small_model={"blocks": 3, "layers": 4},
                published=_denoised(printed["RDN"]),
            ),
            Arm(name="static ADFNet", network="adfnet_wo_dcb_mdcb", of="DnCNN"),
            Arm(name="ADFNet", network="adfnet", of="static ADFNet", published=_denoised(printed["ADFNet"])),
        ),
        note="the static ADFNet is the first row of Table 4",
    )


def _adfnet_large() -> Comparison:
    return Comparison(
        table="ADFNet 2",
        setting="σ = 50",
        title="Performance and cost, colour, σ = 50 (cost is that of one 128×128 image)",
        recipe="adfnet",
        data="denoise",
        arms=(
            Arm(name="ADFNet", network="adfnet", published={"Kodak24 psnr": 29.81, "McMaster psnr": 29.96}),
            Arm(
                name="ADFNet*",
                network="adfnet_l",
                of="ADFNet",
                presets=("large",),
                small_model={"widths": [16, 32, 64, 128]},
                published={"Kodak24 psnr": 29.92, "McMaster psnr": 30.12},
            ),
        ),
        note="published: 13.9 and 46.2 GFLOPs, 0.027 and 0.057 s on a 2080 Ti; the star is trained on more data, here it is not",
    )


def _adfnet_ablation() -> Comparison:
    rows = {
        "w/o (DCB and MDCB)": ("adfnet_wo_dcb_mdcb", 29.61, 28.33),
        "w/o DCB": ("adfnet_wo_dcb", 29.69, 28.36),
        "w/o MDCB": ("adfnet_wo_mdcb", 29.66, 29.37),
        "w/o MFI": ("adfnet_wo_mfi", 29.77, 28.40),
        "w/ all": ("adfnet_all", 29.77, 28.38),
        "w/ encoder": ("adfnet_encoder", 29.73, 28.38),
        "w/ decoder, ADFNet": ("adfnet", 29.81, 28.43),
    }
    plain = "w/o (DCB and MDCB)"
    return Comparison(
        table="ADFNet 4",
        setting="σ = 50",
        title="Ablation, colour, σ = 50",
        recipe="adfnet",
        data="denoise",
        arms=tuple(
            Arm(name=name, network=network, of=None if name == plain else plain, published=_denoised((kodak, bsd)))
            for name, (network, kodak, bsd) in rows.items()
        ),
        note="29.37 dB of w/o MDCB on BSD68 is as printed (its neighbours have 28.3)",
    )


def _figure_7() -> list[Comparison]:
    gains = {5: 0.60, 10: 0.24, 15: 0.15}  # dB, "with the increases in the network depth"
    made = []
    for depth in (5, 10, 15):
        for width in (32, 64):
            options = {"depth": depth, "width": width}
            arms = _two(("DnCNN", "dncnn"), ("DConv-DnCNN", "dncnn_dconv"), model=(options, options))
            title = f"DnCNN with {depth} layers of {width}, with a DConv in the middle, σ = 50"
            gain = {"Kodak24 psnr": gains[depth]} if width == 32 else {}
            made.append(_backbone(f"DnCNN {depth}-{width}", title, arms, gain, {"width": width // 2}))
    for blocks in (3, 6, 9):
        for width in (16, 32):
            options = {"blocks": blocks, "width": width}
            arms = _two(("RDN", "rdn"), ("MDCB-RDN", "rdn_mdcb"), model=(options, options))
            title = f"RDN with {blocks} blocks of {width}, with MDCBs in the middle, σ = 50"
            made.append(_backbone(f"RDN {blocks}-{width}", title, arms, {}, {"width": width // 2, "layers": 4}))
    return made


def _backbone(
    setting: str, title: str, arms: tuple[Arm, Arm], gains: dict[str, float], small: dict[str, Any]
) -> Comparison:
    from dataclasses import replace

    return Comparison(
        table="ADFNet 7",
        setting=setting,
        title=title,
        recipe="adfnet_backbones",
        data="denoise",
        arms=tuple(replace(arm, small_model=small) for arm in arms),
        differences=gains,
        note="half the width at small scale; the paper prints gains of 0.60, 0.24 and 0.15 dB for depths 5, 10, 15 without saying "
        "for which width and test set",
    )


def comparisons() -> list[Comparison]:
    """All that are trained, in the order of the papers."""
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
        _linear_demosaic(False, 39.25, 39.38),
        _linear_demosaic(True, 37.23, 37.37),
        _linear_sr(2, (36.22, 32.15), (35.70, 31.81), (36.54, 32.38), (36.08, 32.08)),
        _linear_sr(3, (31.79, 28.69), (31.90, 28.75), (32.07, 28.87), (32.12, 28.89)),
        _linear_sr(4, (29.71, 26.99), (29.74, 27.01), (29.92, 27.13), (29.96, 27.15)),
        _iterative(False, 42.77, 42.78),
        _iterative(True, 40.08, 40.15),
        *(
            _sr(recipe, plain, scale)
            for recipe, plain in (("srcnn", "SRCNN"), ("espcnn", "ESPCNN"))
            for scale in (2, 3, 4)
        ),
        *_resnet_pafu(),
        _pspnet(),
        *(_adfnet(sigma) for sigma in (30, 50, 70)),
        _adfnet_large(),
        _adfnet_ablation(),
        *_figure_7(),
    ]
