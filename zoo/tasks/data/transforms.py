"""Images of any size as classifier inputs: timm's transforms, and a simpler one for small images such as CIFAR's."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from surgeon.errors import ConfigError
from surgeon.models.names import chosen_size
from surgeon.sites.inputs import exported_size

SMALL = 64  # pixels up to which images are padded and cropped instead of randomly resized
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet


@dataclass(frozen=True, kw_only=True)
class ImageFormat:
    """A classifier's input format: size (C, H, W), normalization, and how images are resized to it; `own`: if the model says so."""

    size: tuple[int, int, int]
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    interpolation: str = "bilinear"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    own: bool = False

    @classmethod
    def of(cls, model: nn.Module | None, side: int) -> Self:
        """The format of a timm model; otherwise ImageNet's normalization and the size of an exported program or `side` pixels.

        A model that was converted or trained at another size than its own keeps that one.
        """
        chosen = None if model is None else chosen_size(model)
        if not isinstance(getattr(model, "pretrained_cfg", None), dict):
            return cls(size=chosen or exported_size(model) or (3, side, side))
        from timm.data import resolve_model_data_config

        found = resolve_model_data_config(model)
        return cls(
            size=chosen or tuple(found["input_size"]),
            mean=tuple(found["mean"]),
            std=tuple(found["std"]),
            interpolation=found["interpolation"],
            crop_pct=found["crop_pct"],
            crop_mode=found["crop_mode"],
            own=True,
        )

    def with_channels(self, channels: int) -> Self:
        """The format for another number of channels; gray images use the means over the colors."""
        if channels == self.size[0]:
            return self

        def fitted(values: tuple[float, ...]) -> tuple[float, ...]:
            return values if len(values) == channels else (sum(values) / len(values),) * channels

        return replace(self, size=(channels, *self.size[1:]), mean=fitted(self.mean), std=fitted(self.std))

    def checked(self, task: str) -> Self:
        """Itself; raises `ConfigError` if it is invalid."""
        channels = self.size[0]
        if channels not in (1, 3):
            raise ConfigError(f"task {task}: pictures have 1 or 3 channels, not {channels} (input_size={self.size})")
        if len(self.mean) != channels or len(self.std) != channels:
            raise ConfigError(f"task {task}: mean={self.mean} and std={self.std} must have {channels} values each")
        if min(self.std) <= 0:
            raise ConfigError(f"task {task}: std must be positive, got {self.std}")
        return self

    @property
    def small(self) -> bool:
        return max(self.size[1:]) <= SMALL

    def without_crop(self) -> Self:
        """The format that makes the whole image small, in timm's terms."""
        return replace(self, interpolation="bicubic", crop_pct=1.0, crop_mode="squash")

    def values(self) -> dict[str, Any]:
        """By timm's names."""
        names = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
        return {"input_size": self.size} | {name: getattr(self, name) for name in names}

    def shown(self, x: Tensor) -> Tensor:
        """A normalized image (C, H, W) as values in [0, 1]."""
        mean, std = (torch.tensor(v, device=x.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return x.detach().float() * std + mean


def make_transform(
    form: ImageFormat,
    *,
    train: bool,
    crop_scale: tuple[float, float],
    color_jitter: float,
    auto_augment: str | None,
    erase: float,
) -> Callable[[Image.Image], Tensor]:
    """Image -> normalized tensor. Random transforms draw from the global state of `random`, numpy and torch."""
    if form.small and train:
        return _small(form, color_jitter, auto_augment, erase)
    from timm.data import create_transform

    made: Callable[[Image.Image], Tensor] = create_transform(
        input_size=form.size,
        is_training=train,
        scale=crop_scale,
        color_jitter=color_jitter,
        auto_augment=auto_augment,
        interpolation=form.interpolation,
        mean=form.mean,
        std=form.std,
        re_prob=erase,
        crop_pct=form.crop_pct,
        crop_mode=form.crop_mode,
    )
    return made


def _small(
    form: ImageFormat, color_jitter: float, auto_augment: str | None, erase: float
) -> Callable[[Image.Image], Tensor]:
    """Pad by an eighth, crop, mirror (He et al. 2016, section 4.2), then timm's additional augmentation if requested."""
    from timm.data import transforms_factory
    from torchvision import transforms

    size = form.size[1:]
    steps = [
        transforms.Resize(size, transforms_factory.str_to_interp_mode(form.interpolation)),
        transforms.RandomCrop(size, padding=(size[1] // 8, size[0] // 8)),
        transforms.RandomHorizontalFlip(),
    ]
    _, further, final = transforms_factory.transforms_imagenet_train(
        size,
        color_jitter=color_jitter,
        auto_augment=auto_augment,
        mean=form.mean,
        std=form.std,
        re_prob=erase,
        separate=True,
    )
    made: Callable[[Image.Image], Tensor] = transforms.Compose([*steps, further, final])
    return made
