"""Real denoising: photographs with the camera's own noise, paired with clean ones of the same scene."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from surgeon.errors import ConfigError, DataError, InputError
from surgeon.zoo.networks.vdn import NoisePosterior, variational_loss
from surgeon.zoo.tasks.base import Batch, Sample, TaskConfig
from surgeon.zoo.tasks.data.draws import turned
from surgeon.zoo.tasks.data.files import check_images, image_size, list_images, look_through, named
from surgeon.zoo.tasks.data.images import cut, luma, random_box, to_tensor
from surgeon.zoo.tasks.registry import register
from surgeon.zoo.tasks.support.metrics import eight_bit
from surgeon.zoo.tasks.support.probe import takes
from surgeon.zoo.tasks.support.restoration import RestorationConfig, RestorationTask, check_splits, size_check

Pair = tuple[Path, Path]  # noisy, clean


@dataclass(frozen=True, kw_only=True)
class RealDenoisingConfig(RestorationConfig):
    """`noisy` and `clean` define the pairs: the names of two folders (noisy/a.png, clean/a.png), or, if a pattern
    contains a `*`, the name endings of files in one folder: noisy="*_real" clean="*_mean" for a_real.JPG and a_mean.JPG.

    `loss` may also be "variational", that of Yue et al. (2019), for networks whose forward gives a `NoisePosterior` when called
    with `posterior=True`. `luma`: compute PSNR and SSIM on Y (BT.601) of 8-bit images.
    """

    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"loss": ("l1", "mse", "charbonnier", "variational")}

    noisy: str = "noisy"
    clean: str = "clean"
    luma: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        stars = {"*" in self.noisy, "*" in self.clean}
        if len(stars) != 1 or self.noisy == self.clean or max(self.noisy.count("*"), self.clean.count("*")) > 1:
            raise ConfigError(
                f"noisy and clean must be two folder names or two patterns with one * each, got {self.noisy!r}, {self.clean!r}"
            )


@register
class RealDenoising(RestorationTask):
    """Pairs of a noisy and a clean image (PolyU, SIDD, RENOIR): trained on patches, evaluated on whole images by PSNR and SSIM."""

    name: ClassVar[str] = "real-denoising"
    config_class: ClassVar[type[TaskConfig]] = RealDenoisingConfig
    config: RealDenoisingConfig

    def list_items(self, folder: Path) -> Sequence[Pair]:
        noisy, clean = self._keyed(folder, self.config.noisy), self._keyed(folder, self.config.clean)
        alone = [f"{noisy[key]} has no clean partner" for key in sorted(noisy.keys() - clean.keys())]
        alone += [f"{clean[key]} has no noisy partner" for key in sorted(clean.keys() - noisy.keys())]
        if alone:
            raise DataError(named(f"task {self.name}: images without a partner", alone))
        return [(noisy[key], clean[key]) for key in sorted(noisy)]

    def _keyed(self, folder: Path, pattern: str) -> dict[str, Path]:
        """Files of one kind, keyed by what they share with their partner."""
        if "*" not in pattern:
            if not (folder / pattern).is_dir():
                raise DataError(
                    f"task {self.name}: {folder} has no folder {pattern}/; describe other layouts with noisy= and clean="
                )
            inside = list_images(folder / pattern)
            found = [(str(path.relative_to(folder / pattern).with_suffix("")), path) for path in inside]
        else:
            start, end = pattern.split("*")
            found = [
                (str(path.relative_to(folder).with_name(path.stem[len(start) : len(path.stem) - len(end)])), path)
                for path in list_images(folder)
                if path.stem.startswith(start) and path.stem.endswith(end) and len(path.stem) > len(start) + len(end)
            ]
            if not found:
                raise DataError(f"task {self.name}: {folder} has no image named {pattern}")
        keyed: dict[str, Path] = {}
        for key, path in found:
            if key in keyed:
                raise DataError(f"task {self.name}: {keyed[key]} and {path} would both be {pattern} of one pair")
            keyed[key] = path
        return keyed

    def check(self) -> None:
        def check(pairs: Sequence[Pair], least: int) -> None:
            check_images(self.name, [path for pair in pairs for path in pair], size_check(least))
            look_through(f"task {self.name}: pairs of different size", pairs, _size_mismatch)

        check_splits(self, check, self.patch_side())

    def train_sample(self, item: Pair, generator: torch.Generator) -> Sample:
        noisy, clean = self.read(item[0]), self.read(item[1])
        box = random_box(clean.height, clean.width, self.patch_side(), generator)
        turn = self.turn(generator)
        x, y = (turned(to_tensor(cut(image, box)), turn).contiguous() for image in (noisy, clean))
        return {"input": x, "target": y}

    def val_sample(self, item: Pair, generator: torch.Generator) -> Sample:
        return {"input": to_tensor(self.read(item[0])), "target": to_tensor(self.read(item[1]))}

    # --- the variational loss -------------------------------------------------------------------------------------

    def bind(self, model: nn.Module) -> nn.Module:
        if self.config.loss == "variational" and not takes(model, "posterior"):
            raise InputError(
                f"task {self.name}: loss=variational is for networks that return a posterior (zoo/acda_vdn, zoo/vdn_conv), and "
                f"the forward of {type(model).__name__} has no argument posterior"
            )
        return super().bind(model)

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        if self.config.loss == "variational" and "target" in batch:
            return model(batch["input"], posterior=True)
        return super().forward(model, batch)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        if isinstance(output, NoisePosterior):
            return variational_loss(NoisePosterior(*(part.float() for part in output)), batch["input"], batch["target"])
        return super().loss(output, batch)

    def distillation_loss(self, output: Any, teacher: Any) -> Tensor:
        """Between the means, if there is a posterior."""
        parts = [part.mean if isinstance(part, NoisePosterior) else part for part in (output, teacher)]
        return super().distillation_loss(*parts)

    def measured(self, image: Tensor) -> Tensor:
        if not self.config.luma:
            return image
        image = eight_bit(image)
        return luma(image) if self.color else image


def _size_mismatch(pair: Pair) -> str | None:
    (h, w), (clean_h, clean_w) = image_size(pair[0]), image_size(pair[1])
    return None if (h, w) == (clean_h, clean_w) else f"{pair[0]} is {w}x{h}, {pair[1]} is {clean_w}x{clean_h}"
