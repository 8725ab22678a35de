"""Files of pictures: found below a folder, and opened only as what they are."""

import logging
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from surgeon.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
# Pictures that are not taken: what they hold is not one picture of 8 bits, or Pillow alone does not read it.
_OTHERS = frozenset(
    {".gif", ".heic", ".heif", ".avif", ".jp2", ".jpe", ".jxl", ".tga", ".psd", ".exr", ".hdr", ".dng", ".cr2", ".nef"}
)
_LEFT = frozenset({"__MACOSX", "@eaDir"})  # what macOS and Synology leave behind
PIXELS = "SURGEON_MAX_PIXELS"
_MOST = 178_956_970  # pixels: where Pillow, too, takes a picture for a bomb
_NAMED = 5
_DEEP = re.compile(r";(12|16|32)[BLNS]")  # Pillow's names of raw formats with more than 8 bits a channel


def files_below(folder: Path, suffixes: Collection[str] = SUFFIXES) -> list[Path]:
    """The files below a folder that end so, by name; links are followed, hidden things and leftovers left out.

    Pictures of other kinds are left out with a warning. Raises `DataError` for links that lead nowhere, and for folders that
    cannot be read.
    """
    broken: list[str] = []
    everything = sorted(_walk(folder, (), broken))
    if broken:
        shown = "\n".join(f"  {text}" for text in [*broken[:_NAMED], *(["..."] if len(broken) > _NAMED else [])])
        raise DataError(f"{folder}: links that lead nowhere ({len(broken)}):\n{shown}")
    others = sorted({path.suffix.lower() for path in everything} & _OTHERS)
    if others:
        count = sum(path.suffix.lower() in others for path in everything)
        _warn(f"{folder}: {count} pictures are left out, for {', '.join(others)} is not read: save them as .png")
    return [path for path in everything if path.suffix.lower() in suffixes]


def is_left_out(name: str) -> bool:
    """Whether something of this name is hidden, or a leftover of a system."""
    return name.startswith(".") or name in _LEFT


def _walk(folder: Path, above: tuple[tuple[int, int], ...], broken: list[str]) -> Iterator[Path]:
    """All files; a folder that is linked into itself is entered once."""
    try:
        stat = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror or error}") from error
    here = (stat.st_dev, stat.st_ino)
    if here in above:
        return
    for entry in entries:
        path = Path(entry.path)
        if is_left_out(entry.name):
            continue
        if entry.is_dir():
            yield from _walk(path, (*above, here), broken)
        elif entry.is_file():
            yield path
        elif entry.is_symlink():
            broken.append(f"{path} -> {path.readlink()}")


@cache
def _warn(text: str) -> None:
    logger.warning("%s", text)


# --- opening --------------------------------------------------------------------------------------------------------


@contextmanager
def opened(path: Path) -> "Iterator[Image.Image]":
    """An image whose header was read. Raises `DataError` for what is none, is cut to 8 bits, or is larger than allowed.

    Pillow reads colors of 16 bits as their upper 8 bits, which makes dark pictures black: so they are refused.
    """
    from PIL import Image

    before, most = Image.MAX_IMAGE_PIXELS, most_pixels()
    try:
        Image.MAX_IMAGE_PIXELS = None  # the limit below is the one that can be moved
        image = Image.open(path)
    except Exception as error:  # on broken files Pillow's decoders raise whatever comes up
        raise DataError(f"cannot read the image {path}: {error}") from error
    finally:
        Image.MAX_IMAGE_PIXELS = before if most == _MOST else most  # Pillow asks again when a picture is cut
    with image:
        pixels = image.width * image.height
        if pixels > most:
            raise DataError(
                f"{path} has {image.width}x{image.height} pixels, more than {most:,}, the limit against files that fill the "
                f"memory; {PIXELS}={pixels} lets it in"
            )
        if _is_deep(image):
            raise DataError(f"{path} has 16 bits a channel, which would be cut to 8: save it with 8 bits a channel")
        yield image


def most_pixels() -> int:
    """Pixels that a picture may have: those of `SURGEON_MAX_PIXELS`. Raises `ConfigError`."""
    text = os.environ.get(PIXELS, "")
    if not text:
        return _MOST
    if not text.isdecimal() or not 0 < int(text) < 2**63:
        raise ConfigError(f"{PIXELS} must be a positive number of pixels, got {text!r}")
    return int(text)


def _is_deep(image: "Image.Image") -> bool:
    """Whether the file has more bits a channel than Pillow's image of it."""
    for tile in getattr(image, "tile", ()):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if image.format == "PPM":  # (mode, largest value)
            return len(arguments) > 1 and isinstance(arguments[1], int) and arguments[1] > 255
        if any(isinstance(value, str) and _DEEP.search(value) for value in arguments):
            return True
    return False
