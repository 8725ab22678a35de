"""Kokkinos et al., "Pixel Adaptive Filtering Units": its Tables 1 to 6."""

from dataclasses import replace

from benchmarks._paper_tables import Arm, Comparison, Scores, two
from surgeon.zoo.networks.resnet_cifar import RULES


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
        small_train={"max_steps": 3000},
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
        small_train={"max_steps": 5000},
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
        arms=two(*networks, published=published),
        small_train={"max_steps": 600},
    )


_SR_SETS = ("Set5", "Set14", "B100", "Urban100")
_SR = {  # Table 4: Set5, Set14, B100, Urban100 at ×2, ×3, ×4
    "SRCNN": ((36.66, 32.45, 31.36, 29.5), (32.75, 29.30, 28.41, 26.24), (30.48, 27.50, 26.90, 24.52)),
    "PAFU-SRCNN": ((36.91, 32.65, 31.44, 29.80), (32.83, 29.42, 28.40, 26.32), (30.65, 27.67, 26.95, 24.63)),
    "ESPCNN": ((36.83, 32.56, 31.38, 29.54), (32.92, 29.42, 28.44, 26.28), (30.57, 27.60, 26.92, 24.50)),
    "PAFU-ESPCNN": ((37.10, 32.76, 31.57, 30.04), (33.08, 29.53, 28.53, 26.48), (30.87, 27.77, 27.01, 24.73)),
}


def _sr(recipe: str, plain: str, scale: int, steps: int) -> Comparison:
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
        arms=two((plain, recipe), (f"PAFU-{plain}", f"pafu_{recipe}"), published=published),
        small_train={"max_steps": steps},
    )


def _resnet_pafu() -> list[Comparison]:
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
                small_train={"max_steps": 1000, "batch_size": 32},
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
                arms=two(
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

    plain, ours = two(
        ("ResNet50+PPM", "pspnet"),
        ("ResNet50+PAFU-PPM", "pafu_pspnet"),
        published=(printed(41.26, 79.73), printed(41.89, 80.17)),
    )
    scales = {"test_scales": (0.5, 0.75, 1.0, 1.25, 1.5)}
    arms = [plain, ours]
    for arm, scores, of in ((plain, printed(42.14, 80.13), None), (ours, printed(42.49, 80.60), plain)):
        name = f"{arm.name}, multi-scale"
        beside = of and f"{of.name}, multi-scale"
        arms.append(
            replace(arm, name=name, of=beside, trained_as=arm.name, judged_by=scales, published=scores),
        )
    return Comparison(
        table="PAFU 6",
        setting="ADE20K",
        title="Semantic segmentation, %; multi-scale is a mean over five sizes of the picture",
        recipe="pspnet",
        data="segmentation",
        arms=tuple(arms),
        metrics={"miou": 100.0, "pixel_accuracy": 100.0},
        small_train={"max_steps": 240},
    )


def pafu() -> list[Comparison]:
    """Tables 1 to 6."""
    return [
        _linear_demosaic(False, 39.25, 39.38),
        _linear_demosaic(True, 37.23, 37.37),
        _linear_sr(2, (36.22, 32.15), (35.70, 31.81), (36.54, 32.38), (36.08, 32.08)),
        _linear_sr(3, (31.79, 28.69), (31.90, 28.75), (32.07, 28.87), (32.12, 28.89)),
        _linear_sr(4, (29.71, 26.99), (29.74, 27.01), (29.92, 27.13), (29.96, 27.15)),
        _iterative(False, 42.77, 42.78),
        _iterative(True, 40.08, 40.15),
        *(_sr("srcnn", "SRCNN", scale, 2000) for scale in (2, 3, 4)),
        *(_sr("espcnn", "ESPCNN", scale, 4000) for scale in (2, 3, 4)),
        *_resnet_pafu(),
        _pspnet(),
    ]
