"""What `benchmarks.learning` trains, by name.

Every study has images that choose the learning rate and images that judge; none of either is trained on.
"""

from collections.abc import Callable

from benchmarks.studies import scratch, small, trained
from benchmarks.studies.study import Study
from surgeon.records.recipe import Rule

_FIRST_OF_STAGES = "layer1.0.conv1,layer2.0.conv1,layer3.0.conv1"  # of the CIFAR ResNets

STUDIES: dict[str, Callable[[], Study]] = {
    "sad": scratch.sad,
    "acda-sr": scratch.restorer,
    "dconv-denoising": scratch.denoiser,
    "mdcb-denoising": scratch.mdcb,
    "pafu-linear-sr": lambda: scratch.selected(
        "pafu_linear_sr_x3",
        "PAFU from scratch: linear ×3 super-resolution",
        {"scale": 3, "patch": 72},
        (1e-3, 2e-3, 4e-3),
    ),
    "pafu-espcnn": lambda: scratch.selected(
        "pafu_espcnn", "PAFU from scratch: ESPCN ×3", {"scale": 3, "patch": 72}, (1e-3, 2e-3, 4e-3)
    ),
    "pafu-srcnn": lambda: scratch.selected(
        "pafu_srcnn", "PAFU from scratch: SRCNN ×3", {"scale": 3, "patch": 48, "input": "bicubic"}, (2.5e-4, 5e-4, 1e-3)
    ),
    "resnet20": lambda: trained.classifier(
        "resnet20_cifar",
        {"pafu": _FIRST_OF_STAGES, "sekg": "layer3.1.conv1", "acda": "layer3"},
        320,
    ),
    "resnet20-1000": lambda: trained.classifier("resnet20_cifar", {"pafu": _FIRST_OF_STAGES, "acda": "layer3"}, 1000),
    "resnet56": lambda: trained.classifier("resnet56_cifar", {"pafu": _FIRST_OF_STAGES, "acda": "layer3"}, 320),
    "resnet56-1000": lambda: trained.classifier("resnet56_cifar", {"pafu": _FIRST_OF_STAGES}, 1000),
    "blind-gray": lambda: trained.blind_denoiser(
        "dncnn",
        "Train400_gray",
        "body.8,body.20,body.32,body.44",
        "L",
        {"SEKG, new rate × 1": Rule(layers="body.8,body.20,body.32,body.44", type="sekg")},
    ),
    "blind-color": lambda: trained.blind_denoiser(
        "dncnn_color", "BSDS500train_color", "body.8,body.16,body.24,body.32", "RGB", {}
    ),
    "real-noise": trained.real_noise,
    "noisy-demosaicking": trained.noisy_demosaicking,
    "camvid": trained.segmenter,
    "small-sr": small.super_resolution,
    "small-denoising": small.denoising,
    "small-demosaicking": small.demosaicking,
    "small-real-noise": small.camera_noise,
    "small-classification": small.classification,
    "espcn-sr": small.espcn,
    "linear-sr": small.linear_super_resolution,
    "linear-demosaicking": small.linear_demosaicking,
    "linear-denoising": small.linear_denoising,
    "linear-real-noise": small.linear_camera_noise,
}
