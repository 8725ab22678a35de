"""Models of other libraries x every layer type: built from small configurations, with random weights, offline.

    python -m benchmarks.third_party [--only GLOB …]

Libraries that are not installed are skipped; nothing is installed. All spatial convolutions of each model are converted, once
to each type. The outputs in eval mode are compared, on other inputs than those of the conversion; then one training step.
Resumes if interrupted. Writes benchmarks/results/third_party.json and the last section of docs/coverage.md.
Exit code 1 if something failed.
"""

import argparse
import copy
import fnmatch
import importlib
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import surgeon
from benchmarks._models import awaken, relative_change, settle_norms, spatial_convolutions, tensors
from benchmarks._results import RESULTS, ROOT, Rows, markdown, write_json

TYPES = ("acda", "pafu", "sekg")
FLOAT32_ERROR, FLOAT64_ERROR = 1e-5, 1e-10
TITLE = "## Models of other libraries"
# what a library is called by its installer
PACKAGES = {
    "diffusers": "diffusers",
    "monai": "monai",
    "segmentation_models_pytorch": "segmentation_models_pytorch",
    "ultralytics": "ultralytics",
    "open_clip": "open_clip_torch",
    "kornia": "kornia",
    "transformers": "transformers",
}

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Model:
    """How to build a model of `library`, and arguments of a call for a seed."""

    library: str
    name: str
    build: Callable[[Any], nn.Module]  # gets the library's module
    arguments: Callable[[torch.Generator], Arguments]

    @property
    def key(self) -> str:
        return f"{self.library}/{self.name}"


def _image(*shape: int) -> Callable[[torch.Generator], Arguments]:
    return lambda g: (torch.rand(2, *shape, generator=g),)


def _diffusion(g: torch.Generator) -> Arguments:
    return torch.randn(2, 4, 32, 32, generator=g), torch.tensor([3, 500])


def _conditioned(g: torch.Generator) -> Arguments:
    return *_diffusion(g), torch.randn(2, 5, 16, generator=g)


def _image_and_text(g: torch.Generator) -> Arguments:
    return torch.rand(2, 3, 64, 64, generator=g), torch.randint(1, 50, (2, 8), generator=g)


def _clip(library: Any) -> nn.Module:
    vision = {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    return importlib.import_module("open_clip.model").CLIP(64, vision, text)


def _of_transformers(model: str, config: str, **options: Any) -> Callable[[Any], nn.Module]:
    return lambda library: getattr(library, model)(getattr(library, config)(**options))


def _yolo(name: str, kind: str = "DetectionModel") -> Callable[[Any], nn.Module]:
    def build(library: Any) -> nn.Module:
        return getattr(importlib.import_module("ultralytics.nn.tasks"), kind)(name, verbose=False)

    return build


def _diffusers_unet(library: Any) -> nn.Module:
    return library.UNet2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def _diffusers_conditioned(library: Any) -> nn.Module:
    return library.UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def _diffusers_vae(library: Any) -> nn.Module:
    return library.AutoencoderKL(
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def _monai(name: str, **options: Any) -> Callable[[Any], nn.Module]:
    def build(library: Any) -> nn.Module:
        return getattr(importlib.import_module("monai.networks.nets"), name)(**options)

    return build


def _segmentation(name: str, encoder: str) -> Callable[[Any], nn.Module]:
    return lambda library: getattr(library, name)(encoder, encoder_weights=None, classes=4)


def _kornia(name: str, **options: Any) -> Callable[[Any], nn.Module]:
    def build(library: Any) -> nn.Module:
        return getattr(importlib.import_module("kornia.feature"), name)(**options)

    return build


def _kornia_disk(library: Any) -> nn.Module:
    return importlib.import_module("kornia.feature").DISK(desc_dim=16).unet  # the whole gives objects with key points


_FLAT: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
_UNET: dict[str, Any] = _FLAT | {"channels": (8, 16, 32), "strides": (2, 2)}
MODELS = (
    Model("diffusers", "UNet2DModel", _diffusers_unet, _diffusion),
    Model("diffusers", "UNet2DConditionModel", _diffusers_conditioned, _conditioned),
    Model("diffusers", "AutoencoderKL", _diffusers_vae, _image(3, 32, 32)),
    Model("monai", "UNet", _monai("UNet", **_UNET, num_res_units=1), _image(1, 32, 32)),
    Model("monai", "AttentionUnet", _monai("AttentionUnet", **_UNET), _image(1, 32, 32)),
    Model("monai", "SegResNet", _monai("SegResNet", **_FLAT, init_filters=8), _image(1, 32, 32)),
    Model("segmentation_models_pytorch", "Unet", _segmentation("Unet", "resnet18"), _image(3, 64, 64)),
    Model("segmentation_models_pytorch", "FPN", _segmentation("FPN", "mobilenet_v2"), _image(3, 64, 64)),
    Model(
        "segmentation_models_pytorch", "DeepLabV3Plus", _segmentation("DeepLabV3Plus", "resnet18"), _image(3, 64, 64)
    ),
    Model("ultralytics", "yolov8n", _yolo("yolov8n.yaml"), _image(3, 64, 64)),
    Model("ultralytics", "yolo11n", _yolo("yolo11n.yaml"), _image(3, 64, 64)),
    Model("ultralytics", "yolo11n-seg", _yolo("yolo11n-seg.yaml", "SegmentationModel"), _image(3, 64, 64)),
    Model("open_clip", "CLIP, ModifiedResNet", _clip, _image_and_text),
    Model("kornia", "HardNet", _kornia("HardNet", pretrained=False), _image(1, 32, 32)),
    Model("kornia", "SOSNet", _kornia("SOSNet", pretrained=False), _image(1, 32, 32)),
    Model("kornia", "DISK, its U-Net", _kornia_disk, _image(3, 64, 64)),
    Model(
        "transformers",
        "ResNetForImageClassification",
        _of_transformers(
            "ResNetForImageClassification", "ResNetConfig", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1]
        ),
        _image(3, 64, 64),
    ),
    Model(
        "transformers",
        "ConvNextModel",
        _of_transformers("ConvNextModel", "ConvNextConfig", hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1]),
        _image(3, 64, 64),
    ),
    Model(
        "transformers",
        "SegformerForSemanticSegmentation",
        _of_transformers(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            depths=[1, 1, 1, 1],
            hidden_sizes=[8, 16, 32, 64],
            decoder_hidden_size=16,
        ),
        _image(3, 64, 64),
    ),
    Model(
        "transformers",
        "MobileNetV2Model",
        _of_transformers("MobileNetV2Model", "MobileNetV2Config", depth_multiplier=0.35),
        _image(3, 64, 64),
    ),
)


# --- one model ---------------------------------------------------------------------------------------------------------


def missing(library: str) -> str | None:
    """Why models of this library cannot be tried here, or None."""
    return None if find_spec(library) else f"{PACKAGES[library]} is not installed (pip install {PACKAGES[library]})"


def build(entry: Model) -> nn.Module:
    """The model with random weights in which nothing is switched off, in eval mode. Nothing is downloaded."""
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())
    os.environ.setdefault("YOLO_OFFLINE", "true")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = entry.build(importlib.import_module(entry.library))
    awaken(model)
    settle_norms(model, lambda: call(model, entry, 0))
    return model


def call(model: nn.Module, entry: Model, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The floating-point outputs for the inputs of this seed."""
    return tensors(model(*arguments(entry, seed, dtype)))


def arguments(entry: Model, seed: int, dtype: torch.dtype = torch.float32) -> Arguments:
    """Arguments of a call, batch 2."""
    args = entry.arguments(torch.Generator().manual_seed(seed))
    return tuple(a.to(dtype) if a.is_floating_point() else a for a in args)


def check(entry: Model, kind: str) -> dict[str, Any]:
    """Convert to one type; facts and what is wrong ("failures")."""
    model = build(entry)
    start = time.perf_counter()
    converted, report = surgeon.convert(model, layers="all", type=kind, example_inputs=arguments(entry, 0))
    seconds = time.perf_counter() - start
    refused = {site.name: list(site.reasons) for site in report.skipped if site.selected}
    error, precision = difference(entry, model, converted, kind)
    failures = []
    if error > (FLOAT32_ERROR if precision == "float32" else FLOAT64_ERROR):
        failures.append(f"the outputs differ by {error:.1e} in {precision}")
    if not report.replaced:
        failures.append("nothing was replaced")
    named = {n for site in (*report.replaced, *report.skipped) for n in (site.name, *site.aliases)}
    failures += [f"{name} is not in the report" for name in spatial_convolutions(model) if name not in named]
    failures += training_step(entry, converted)
    return {
        "found": len(spatial_convolutions(model)),
        "replaced": len(report.replaced),
        "refused": refused,
        "error": error,
        "precision": precision,
        "seconds": round(seconds, 1),
        "failures": failures,
    }


def difference(entry: Model, model: nn.Module, converted: nn.Module, kind: str) -> tuple[float, str]:
    """Largest relative difference of the outputs; in float64 where depth amplifies the rounding of float32."""
    error = _compare(entry, model, converted, torch.float32)
    if error <= FLOAT32_ERROR:
        return error, "float32"
    exact = copy.deepcopy(model).double()
    example = arguments(entry, 0, torch.float64)
    again, _ = surgeon.convert(exact, layers="all", type=kind, example_inputs=example)
    return _compare(entry, exact, again, torch.float64), "float64"


def _compare(entry: Model, model: nn.Module, converted: nn.Module, dtype: torch.dtype) -> float:
    outputs = []
    with torch.no_grad():
        for net in (model, converted):
            torch.manual_seed(0)  # an encoder may draw
            outputs.append(call(net.eval(), entry, 7, dtype))
    if not outputs[0]:
        raise AssertionError(f"{entry.key} gives no tensor to compare")
    return max(relative_change(a, b) for a, b in zip(*outputs, strict=True))


def training_step(entry: Model, converted: nn.Module) -> list[str]:
    """What is wrong with the gradients of a pass in train mode."""
    loss = sum((x.square().mean() for x in call(converted.train(), entry, 1)), torch.zeros(()))
    loss.backward()
    grads = [p.grad for p in converted.parameters() if p.grad is not None]
    finite = bool(loss.isfinite()) and all(bool(g.isfinite().all()) for g in grads)
    return [] if grads and finite else ["training: no gradients, or infinite ones"]


# --- all of them -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="GLOB", default=["*"], help="models by library/name")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an interrupted or finished run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "coverage.md", help="default: %(default)s")
    args = parser.parse_args(argv)
    rows = Rows(args.results / "third_party.jsonl", fresh=args.fresh)
    for entry in (e for e in MODELS if any(fnmatch.fnmatch(e.key, glob) for glob in args.only)):
        if why := missing(entry.library):
            print(f"{entry.key}: {why}")
            continue
        for kind in (kind for kind in TYPES if f"{entry.key}/{kind}" not in rows):
            try:
                facts = check(entry, kind)
            except Exception as error:  # a row of the table, whatever a library does
                facts = {"failures": [f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"]}
            identity = {"library": entry.library, "version": version(PACKAGES[entry.library]), "model": entry.name}
            rows.add(f"{entry.key}/{kind}", identity | {"type": kind} | facts)
            print(f"{entry.key} {kind}: {'; '.join(facts['failures']) or 'ok'}", flush=True)
    known = {entry.key for entry in MODELS}
    content = {"rows": [row for row in rows.values() if f"{row['library']}/{row['model']}" in known]}
    write_json(args.results / "third_party.json", content)
    before = args.docs.read_text().partition(TITLE)[0].rstrip("\n") if args.docs.is_file() else "# Coverage"
    args.docs.write_text(f"{before}\n\n{section(content)}")
    return int(any(row["failures"] for row in content["rows"]))


def section(content: dict[str, Any]) -> str:
    """The last section of docs/coverage.md."""
    versions = ", ".join(sorted({f"{row['library']} {row['version']}" for row in content["rows"]}))
    models: dict[str, dict[str, dict[str, Any]]] = {}
    for row in content["rows"]:
        models.setdefault(f"{row['library']}/{row['model']}", {})[row["type"]] = row
    lines = [
        [name, max(r.get("found", 0) for r in by.values()), *(_cell(by.get(kind)) for kind in TYPES)]
        for name, by in models.items()
    ]
    return "\n".join(
        [
            TITLE,
            "",
            "Written by `python -m benchmarks.third_party`: small configurations, random weights, every spatial convolution.",
            "A cell: replaced (refused), relative error of the output on inputs that the conversion did not have (in float64,",
            "marked ᵈ, where depth amplifies the rounding of float32); a training step follows.",
            f"Made with {versions}.",
            "",
            markdown(("model", "found", *TYPES), lines),
        ]
    )


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["failures"]:
        return f"**failed**: {'; '.join(row['failures'])[:160]}"
    refused = f" ({len(row['refused'])})" if row["refused"] else ""
    return f"{row['replaced']}{refused}, {row['error']:.0e}{'ᵈ' if row['precision'] == 'float64' else ''}"


if __name__ == "__main__":
    sys.exit(main())
