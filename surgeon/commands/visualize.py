"""`surgeon visualize`: pictures and measurements of what varies in a model. Imports torch when it runs."""

import argparse
import json
import re
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.commands.common import checks
from surgeon.commands.common.arguments import add_trust, print_json, size, tell
from surgeon.commands.common.originals import named_original
from surgeon.errors import ConfigError, DataError, InputError
from surgeon.util.picture_files import SUFFIXES, check_supported
from surgeon.util.waiting import waiting

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from surgeon.layers import DynamicConv2d
    from surgeon.records.recipe import BaseModel

DESCRIPTION = "draw what varies in a model: masks, coefficients, kernels, features"
EXAMPLES = """  surgeon visualize runs/resnet50-acda photo.jpg -o pictures
  surgeon visualize runs/resnet50-pafu photos/*.jpg --layers layer4 -o pictures --input-size 480x640
  surgeon visualize runs/dncnn-sekg photo.png -o pictures --against auto --tensorboard runs/board

Writes OUT/IMAGE/LAYER-WHAT.png, the bases of acda layers, and OUT/numbers.json. IMAGE is the
picture's name, after that of its folder if several pictures have the same.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `surgeon visualize`; --json, --quiet and --debug are common to all commands."""
    parser.add_argument("run", metavar="RUN", help="a folder written by surgeon")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="pictures")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder to write")
    parser.add_argument(
        "--force",
        action="store_true",
        help="write into OUT even if it is not empty",
    )
    parser.add_argument("--layers", metavar="NAMES", help="which dynamic layers (default: all)")
    parser.add_argument(
        "--input-size",
        type=size,
        metavar="SIZE",
        help="224, 320x240 (HxW) or 3x224x224 (default: the model's; networks that return images get a crop of up to 256x256)",
    )
    parser.add_argument(
        "--bayer",
        metavar="PATTERN",
        help="feed the model the mosaic of an RGGB (BGGR, …) sensor; also show selections by color",
    )
    parser.add_argument("--tensorboard", metavar="DIR", help="also write pictures and numbers there")
    parser.add_argument(
        "--against", metavar="auto|MODEL", help="also draw the original's features; auto is the run's base model"
    )
    parser.add_argument("--against-weights", metavar="FILE", help="its weights, if they cannot be found")
    add_trust(parser)


def check(args: argparse.Namespace) -> None:
    """Refuse invalid arguments before torch is loaded."""
    _check_output(Path(args.output), args)
    checks.run_folder(args.run)
    checks.converted(args.run, "draw")
    for picture in args.images:
        if Path(picture).is_dir():
            some = (one for one in islice(Path(picture).rglob("*"), 1000) if one.suffix.lower() in SUFFIXES)
            such = next((one.with_name(f"*{one.suffix}") for one in some), Path(picture, "*.png"))
            raise InputError(f"IMAGE: {picture} is a folder; name its pictures, such as {such}")
        if not Path(picture).is_file():
            raise InputError(f"IMAGE: there is no picture {picture}")
        try:
            check_supported(Path(picture))
        except DataError as error:
            raise InputError(f"IMAGE: {error}") from error
    named = args.against not in (None, "auto")
    if named:
        checks.model(args.against)
    checks.other_weights(args.against_weights, "--against-weights", named=named)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code. Everything is read before anything is written."""
    from surgeon.commands.common.console import Progress, width
    from surgeon.models.checkpoint import load
    from surgeon.models.hub import folder
    from surgeon.records.recipe import get_recipe
    from surgeon.records.report import jsonable
    from surgeon.surgery.rewrite import dynamic_layers
    from surgeon.util.files import filling

    output = Path(args.output)
    with waiting(f"loading {args.run}", quiet=args.quiet):
        model = load(folder(args.run), trust_factory=args.trust_factory)
    layers = dynamic_layers(model, args.layers)
    if not layers:
        raise InputError(f"{args.run} has no dynamic layer: there is nothing to draw")
    recipe = get_recipe(model)
    base = recipe.base if recipe is not None else None
    if base is None:
        raise ConfigError(f"{args.run} does not name its base model, whose transform the pictures need")
    images = _read(args, model, base)
    if args.bayer is not None:
        images = _sensed(model, images, args.bayer)
    if recipe is not None and recipe.task is not None and (note := _as_is(recipe.task.name, args.bayer)):
        tell(args, note)
    original = _original(args, base)
    before = _written(output)
    with (
        Progress(enabled=not args.quiet) as progress,
        filling(output, ConfigError) as fresh,
        _Writer(fresh, args.tensorboard) as writer,
    ):
        found = _draw(model, layers, images, original, writer, progress, args.bayer)
        for entry, file in zip(found, args.images, strict=True):
            entry["file"] = file
        document = jsonable({"run": args.run, "output": str(output), "images": found, "bases": writer.bases})
        writer.numbers(document)
    _clear(output, before - _named(document))
    if args.json:
        print_json(document)
    else:
        print(text(document, writer.count, width()))
    return 0


def _check_output(output: Path, args: argparse.Namespace) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigError(f"the output {output} exists and is not a folder")
    if output.is_dir() and any(output.iterdir()) and not args.force:
        raise ConfigError(f"the output {output} is not empty; choose another with -o, or write into it with --force")


def _named(document: Any) -> set[Path]:
    """The pictures that a numbers.json lists, relative to its folder; none if it is not one of surgeon visualize."""
    try:
        named = [name for image in document["images"] for layer in image["layers"] for name in layer["pictures"]]
        paths = {Path(name) for name in [*named, *document["bases"]]}
    except (KeyError, TypeError):
        return set()
    return {path for path in paths if path.suffix == ".png" and not path.is_absolute() and ".." not in path.parts}


def _written(output: Path) -> set[Path]:
    """The pictures of an earlier call in this folder."""
    try:
        return _named(json.loads((output / "numbers.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return set()


def _clear(output: Path, pictures: set[Path]) -> None:
    """Remove these pictures, and the folders that are empty without them."""
    for path in pictures:
        (output / path).unlink(missing_ok=True)
    for parent in {path.parent for path in pictures} - {Path()}:
        with suppress(OSError):  # not empty, or gone
            (output / parent).rmdir()


def _as_is(task: str, bayer: str | None) -> str | None:
    """A note where a network of this task is shown other pictures than those it works on."""
    if task in ("denoising", "real-denoising"):
        return (
            f"the model is for {task}, and no noise is added to the pictures: give noisy ones to see what varies in use"
        )
    if task == "demosaicking" and bayer is None:
        return (
            "the model is for demosaicking, and sees the pictures as they are: --bayer RGGB shows it a sensor's mosaic"
        )
    if task == "super-resolution":
        return (
            "the model is for super-resolution, and sees the pictures as they are: give low-resolution ones (enlarged ones if "
            "it was trained with input=bicubic) to see what varies in use"
        )
    return None


def _read(args: argparse.Namespace, model: "nn.Module", base: "BaseModel") -> "dict[str, tuple[Tensor, Any]]":
    """By a name for each: the image as the model's input (C, H, W), and as displayed (H, W, 3) in [0, 1]."""
    from surgeon.models.images import cropped, evaluation_transform, read_image, transform_for

    if args.input_size:
        given = args.input_size
        channels = base.input_size[0] if base.input_size else 3
        base = replace(base, input_size=given if len(given) == 3 else (channels, *given))
        transform, hint = evaluation_transform(model, base), ""
    else:
        transform = transform_for(model, base, Path(args.images[0]), option="IMAGE")
        hint = ", the model's own size; --input-size sets another"
    done = "resized and center-cropped"
    if transform is cropped:
        done, hint = "center-cropped", "; --input-size sets a size that they are resized to"
    found: dict[str, tuple[Tensor, Any]] = {}
    files = [Path(file) for file in args.images]
    for name, file in zip(_names(files), files, strict=True):
        picture = read_image(file, transform, base, option="IMAGE")
        found[name] = (picture, _photo(picture, transform))
    sizes = sorted({"x".join(map(str, picture.shape[-2:])) for picture, _ in found.values()})
    tell(args, f"pictures are {done} to {', '.join(sizes)} (HxW){hint}")
    return found


def _names(files: "list[Path]") -> list[str]:
    """A name for each picture: its own, after that of its folder if several have the same, and a number if that does not do."""
    stems = Counter(file.stem for file in files)
    names: list[str] = []
    for file in files:
        name = plain = file.stem if stems[file.stem] == 1 else f"{file.absolute().parent.name}-{file.stem}".lstrip("-")
        for number in range(2, len(files) + 2):
            if name not in names:
                break
            name = f"{plain}-{number}"
        names.append(name)
    return names


def _sensed(
    model: "nn.Module", images: "dict[str, tuple[Tensor, Any]]", pattern: str
) -> "dict[str, tuple[Tensor, Any]]":
    """The same for a demosaicking model: zero where a sensor with this pattern measures nothing."""
    from surgeon.zoo.bayer import PATTERNS, bayer_mask, tell_pattern

    if pattern not in PATTERNS:
        raise ConfigError(f"--bayer must be one of {', '.join(PATTERNS)}, got {pattern!r}")
    tell_pattern(model, pattern)
    found = {}
    for name, (picture, photo) in images.items():
        if picture.shape[0] != 3:
            raise InputError(f"--bayer is for models of color images; this one gets {picture.shape[0]} channels")
        found[name] = (picture * bayer_mask(pattern, *picture.shape[1:]), photo)
    return found


def _photo(picture: "Tensor", transform: Any) -> Any:
    """The image before normalization."""
    import torch

    for step in getattr(transform, "transforms", ()):
        if hasattr(step, "mean") and hasattr(step, "std"):
            mean, std = (torch.as_tensor(values).view(-1, 1, 1) for values in (step.mean, step.std))
            picture = picture * std + mean
    return picture.expand(3, -1, -1).movedim(0, -1).numpy()


def _original(args: argparse.Namespace, base: "BaseModel") -> "nn.Module | None":
    if args.against is None:
        return None
    from surgeon.models.names import restore

    weights, flag, trusted = args.against_weights, "--against-weights", args.trust_factory
    if args.against == "auto":
        return restore(base, weights=weights, trust_factory=trusted, head="weights", flag=flag)
    named, told = named_original(args.against, weights, base, flag=flag, trust_factory=trusted)
    if told is not None:
        tell(args, told)
    return named


def _draw(
    model: "nn.Module",
    layers: "dict[str, DynamicConv2d]",
    images: "dict[str, tuple[Tensor, Any]]",
    original: "nn.Module | None",
    writer: "_Writer",
    progress: Any,
    bayer: str | None = None,
) -> list[dict[str, Any]]:
    from surgeon.visualize.capture import capture
    from surgeon.visualize.measures import numbers
    from surgeon.visualize.pictures import bases, basis_name, pictures

    found = []
    for step, (image, (picture, photo)) in enumerate(images.items()):
        seen = capture(model, layers, picture, original)
        entries = []
        for done, (name, layer) in enumerate(seen.items()):
            progress("draw", step * len(seen) + done, len(images) * len(seen))
            values = numbers(layer)
            values["pictures"] = [
                writer.picture(f"{image}/{safe(name)}-{what}", figure, step)
                for what, figure in pictures(layer, photo, bayer).items()
            ]
            writer.scalars(name, values, step)
            entries.append(values)
        unseen = [name for name in layers if name not in seen]
        found.append({"image": image, "layers": entries, "not_reached": unseen})
    with_basis = {basis: layer for layer in layers.values() if (basis := basis_name(layer))}
    writer.bases += [writer.picture(name, bases(layer), 0) for name, layer in with_basis.items()]
    return found


def safe(name: str) -> str:
    """A layer's name as part of a file name."""
    return re.sub(r"[^\w.\-]", "_", name) or "model"


class _Writer:
    """Writes pictures as PNG files, and with their numbers to TensorBoard if requested."""

    def __init__(self, output: Path, board: str | None) -> None:
        self.output = output
        self.count = 0
        self.bases: list[str] = []
        self.board: Any = None
        self.folder = board

    def __enter__(self) -> "_Writer":
        if self.folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.folder)
        return self

    def __exit__(self, *failure: object) -> None:
        if self.board is not None:
            self.board.close()

    def picture(self, name: str, figure: "Figure", step: int) -> str:
        """Returns the path of the file, relative to the output."""
        from PIL import Image

        from surgeon.visualize.sheet import pixels

        file = self.output / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        values = pixels(figure)
        Image.fromarray(values).save(file, optimize=True)
        if self.board is not None:
            self.board.add_image(name, values, step, dataformats="HWC")
        self.count += 1
        return str(file.relative_to(self.output))

    def scalars(self, layer: str, values: dict[str, Any], step: int) -> None:
        if self.board is not None:
            for key, value in values.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{layer}/{key}", value, step)

    def numbers(self, document: Any) -> None:
        (self.output / "numbers.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def text(document: dict[str, Any], count: int, width: int) -> str:
    """The result as text: a row per layer and image."""
    from surgeon.util.tables import counted, paragraph, table
    from surgeon.visualize.measures import told

    rows = [
        (layer["name"], image["image"], layer["type"], _varies(layer["variation"]), told(layer))
        for image in document["images"]
        for layer in image["layers"]
    ]
    lines = [table(("layer", "image", "type", "varies", "measured"), rows, width=width, left=3), ""]
    for image in document["images"]:
        if image["not_reached"]:
            lines.append(paragraph(f"{image['image']} does not reach: {', '.join(image['not_reached'])}", width=width))
    lines.append(f"{counted(count, 'picture')} and numbers.json in  {document['output']}")
    return "\n".join(lines)


def _varies(variation: Any) -> str:
    return f"{variation:.2g}" if isinstance(variation, float) else "-"
