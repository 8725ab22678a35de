"""Calibration images: a folder of images as a batch in the form that a model was trained on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import DataError, InputError
from surgeon.records.recipe import BaseModel
from surgeon.util.copying import evaluating
from surgeon.util.near import no_folder
from surgeon.util.picture_files import SUFFIXES, files_below, opened

IMAGES = 32
CROP = 256  # largest side of the crop that an image-to-image network gets
MULTIPLE = 16  # its sides are multiples of this


def read_images(
    folder: str | Path, model: nn.Module, base: BaseModel, *, limit: int = IMAGES, option: str = "--calibrate"
) -> Tensor:
    """Up to `limit` images below a folder as a batch (N, C, H, W), transformed as the model expects; for networks that return
    images, centers of one size.

    They are spread evenly over the sorted list of files, so that a folder with one subfolder per class covers many classes.
    `option` is their name in messages. Raises `InputError` if there are none, or if one cannot be read.
    """
    from torchvision.transforms.functional import center_crop

    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{option}: {no_folder(folder)}")
    try:
        files = files_below(folder)
    except DataError as error:
        raise InputError(f"{option}: {error}") from error
    if not files:
        raise InputError(f"{option}: {folder} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    step = max(len(files) / limit, 1.0)
    chosen = [files[int(i * step)] for i in range(min(limit, len(files)))]
    transform = transform_for(model, base, chosen[0], option=option)
    pictures = [read_image(file, transform, base, option=option) for file in chosen]
    height, width = (min(picture.shape[axis] for picture in pictures) for axis in (1, 2))
    return torch.stack([center_crop(picture, [height, width]) for picture in pictures])


def read_image(file: Path, transform: Callable[[Any], Tensor], base: BaseModel, *, option: str) -> Tensor:
    """One image (C, H, W) as the model's input, gray if the model takes one channel; raises `InputError`."""
    channels = base.input_size[0] if base.input_size else 3
    if not file.is_file():
        raise InputError(f"{option}: there is no picture {file}")
    try:
        with opened(file) as image:
            return transform(image.convert("L" if channels == 1 else "RGB"))
    except DataError as error:
        raise InputError(f"{option}: {error}") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{option}: cannot read the image {file}: {error}") from error


def evaluation_transform(model: nn.Module, base: BaseModel) -> Callable[[Any], Tensor]:
    """The model's own evaluation transform (timm), or ImageNet's, or for other networks plain values in [0, 1]."""
    from torchvision import transforms

    size = list(base.input_size[1:]) or [224, 224]
    if base.source == "timm":
        from timm.data import create_transform, resolve_data_config

        config = resolve_data_config({"input_size": tuple(base.input_size)} if base.input_size else {}, model=model)
        made: Callable[[Any], Tensor] = create_transform(**config, is_training=False)
        return made
    steps: list[Any] = [transforms.Resize(max(size)), transforms.CenterCrop(size), transforms.ToTensor()]
    if base.source == "torchvision" and ".detection." not in type(model).__module__:
        steps.append(transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    composed: Callable[[Any], Tensor] = transforms.Compose(steps)
    return composed


def transform_for(model: nn.Module, base: BaseModel, file: Path, *, option: str) -> Callable[[Any], Tensor]:
    """`evaluation_transform`, or `cropped` for a network that returns an image of this one."""
    transform = evaluation_transform(model, base)
    return cropped if returns_images(model, read_image(file, transform, base, option=option)) else transform


def returns_images(model: nn.Module, picture: Tensor) -> bool:
    """Whether the network makes an image of an image (C, H, W): a denoiser, not a classifier. False if it does not run on it."""
    try:
        with evaluating(model):
            out = model(picture[None])
    except Exception:  # networks raise anything; who calls it finds out
        return False
    sides = zip(out.shape[2:], picture.shape[1:], strict=True) if isinstance(out, Tensor) and out.dim() == 4 else None
    return sides is not None and out.shape[1] in (1, 3) and all(side % own == 0 for side, own in sides)


def cropped(image: Any) -> Tensor:
    """The center of a picture, (C, H, W) in [0, 1]. Resizing would change what a restoration network looks at, such as noise."""
    from torchvision.transforms import functional

    height, width = (min(side, CROP) // MULTIPLE * MULTIPLE or side for side in (image.height, image.width))
    picture: Tensor = functional.to_tensor(functional.center_crop(image, [height, width]))
    return picture
