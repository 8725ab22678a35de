"""Image files: found below a folder, and opened only in supported formats."""

import logging
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from surgeon.errors import ConfigError, DataError
from surgeon.util.tables import counted

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
# Unsupported image files: not a single 8-bit image, or not readable by Pillow alone.
_OTHERS = frozenset(
    {".gif", ".heic", ".heif", ".avif", ".jp2", ".jpe", ".jxl", ".tga", ".psd", ".exr", ".hdr", ".dng", ".cr2", ".nef"}
)
_LEFT = frozenset({"__MACOSX", "@eaDir"})  # created by macOS and Synology
PIXELS = "SURGEON_MAX_PIXELS"
_MOST = 178_956_970  # pixels: Pillow's own limit against decompression bombs
_NAMED = 5
_DEEP = re.compile(r";(12|16|32)[BLNS]")  # Pillow's names of raw formats with more than 8 bits per channel


def files_below(folder: Path, suffixes: Collection[str] = SUFFIXES) -> list[Path]:
    """The files below a folder with these suffixes, by name; follows links, skips hidden and system files.

    Images of other kinds are skipped with a warning. Raises `DataError` for broken links and unreadable
    folders.
    """
    broken: list[str] = []
    everything = sorted(_walk(folder, (), broken))
    if broken:
        shown = "\n".join(f"  {text}" for text in [*broken[:_NAMED], *(["..."] if len(broken) > _NAMED else [])])
        raise DataError(f"{folder}: broken links ({len(broken)}):\n{shown}")
    others = [path for path in everything if path.suffix.lower() in _OTHERS]
    if others:
        kinds = sorted({path.suffix.lower() for path in others})
        names = [*(str(path.relative_to(folder)) for path in others[:_NAMED]), *(["..."] if others[_NAMED:] else [])]
        why = f"{', '.join(kinds)} {'is' if len(kinds) == 1 else 'are'} not supported: save as .png"
        _warn(f"{folder}: skipped {counted(len(others), 'picture')}, because {why} ({', '.join(names)})")
    return [path for path in everything if path.suffix.lower() in suffixes]


def holds_pictures(folder: Path) -> bool:
    """Whether there is an image file below a folder."""
    return any(Path(name).suffix.lower() in SUFFIXES for _, _, names in os.walk(folder) for name in names)


def check_supported(path: Path) -> None:
    """Raise `DataError` unless the file's suffix is one of the supported ones: the rest is skipped below a folder."""
    if path.suffix.lower() not in SUFFIXES:
        what = path.suffix or "a name without a suffix"
        raise DataError(f"cannot read the image {path}: {what} is not supported ({', '.join(sorted(SUFFIXES))})")


def is_left_out(name: str) -> bool:
    """Whether a name is hidden or created by the system."""
    return name.startswith(".") or name in _LEFT


def _walk(folder: Path, above: tuple[tuple[int, int], ...], broken: list[str]) -> Iterator[Path]:
    """All files; a folder linked into itself is entered once."""
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
    """An image with its header read. Raises `DataError` if it is not a supported image, would be cut to 8 bits, or is too large.

    Pillow reads 16-bit colors as their upper 8 bits, which turns dark images black, so they are refused.
    """
    from PIL import Image, UnidentifiedImageError

    check_supported(path)
    before, most = Image.MAX_IMAGE_PIXELS, most_pixels()
    try:
        Image.MAX_IMAGE_PIXELS = None  # the limit below is the configurable one
        image = Image.open(path)
    except UnidentifiedImageError as error:  # its text is the path again
        raise DataError(f"cannot read the image {path}: it is damaged, or its content is not an image") from error
    except Exception as error:  # Pillow's decoders raise arbitrary errors on broken files
        raise DataError(f"cannot read the image {path}: {error}") from error
    finally:
        Image.MAX_IMAGE_PIXELS = before if most == _MOST else most  # Pillow checks again when an image is cropped
    with image:
        pixels = image.width * image.height
        if pixels > most:
            raise DataError(
                f"{path} has {image.width}x{image.height} pixels, more than {most:,}, the limit against files that exhaust the "
                f"memory; set {PIXELS}={pixels} to allow it"
            )
        if _is_deep(image):
            raise DataError(f"{path} has 16 bits per channel, which would be cut to 8: save it with 8 bits per channel")
        yield image


def most_pixels() -> int:
    """Maximum number of pixels of an image: `SURGEON_MAX_PIXELS`. Raises `ConfigError`."""
    text = os.environ.get(PIXELS, "")
    if not text:
        return _MOST
    if not text.isdecimal() or not 0 < int(text) < 2**63:
        raise ConfigError(f"{PIXELS} must be a positive number of pixels, got {text!r}")
    return int(text)


def _is_deep(image: "Image.Image") -> bool:
    """Whether the file has more bits per channel than Pillow's image of it."""
    for tile in getattr(image, "tile", ()):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if image.format == "PPM":  # (mode, largest value)
            return len(arguments) > 1 and isinstance(arguments[1], int) and arguments[1] > 255
        if any(isinstance(value, str) and _DEEP.search(value) for value in arguments):
            return True
    return False
