"""A model as one file that runs without surgeon: `torch.export` (.pt2) or ONNX, verified before it gets its name.

The model is traced in eval mode; its dynamic layers become ordinary operations (`surgeon.layers.ops.portable`). Batch and
image size stay dynamic as far as the model and the format allow; fixed ones are reported with the reason. The file is written to a
temporary folder, read back, run at two batch sizes and three image sizes, compared with the model, and only then renamed. If any of
that fails, it is tried again with fewer dynamic dimensions.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from surgeon.errors import ConfigError, ExportError, SurgeonError
from surgeon.exporting.exported import Runner, data_of, foreign_operators, missing_packages, quiet, read, write
from surgeon.exporting.outputs import input_name, output_names, prepared
from surgeon.exporting.trace import BY_TRIAL, NAMES, Shapes, first_line, random_images, traced
from surgeon.records.preprocessing import metadata
from surgeon.records.recipe import get_recipe
from surgeon.sites.inputs import Inputs
from surgeon.surgery.compare import Difference, compare
from surgeon.surgery.rewrite import dynamic_layers, recorded_size
from surgeon.surgery.running import run as run_model
from surgeon.util.copying import check_module, copy_model, strict_float32
from surgeon.util.files import here
from surgeon.util.outputs import check_file_output, export_format
from surgeon.util.progress import OnProgress, silent
from surgeon.util.tables import count, counted, error, paragraph
from surgeon.util.unfinished import unfinished

Format = Literal["onnx", "torch"]
FORMATS = ("onnx", "torch")
FREE = ("auto", "size", "batch", "none")

TOLERANCE = 1e-4  # relative error of the outputs
_ROUNDING = 10.0  # allowed multiple of the model's own float32 error, if that is more
_DRAWS = 5  # image draws for a network that selects kernels


@dataclass(frozen=True, kw_only=True)
class Check:
    """One run of the file against the model; `own` is the model's own float32 error, if computed.

    `draws` is how many images it took: where a layer's selection is tied, rounding decides, and single pixels get another
    kernel. What is wrong beyond that shows on every image.
    """

    shape: tuple[int, ...]
    max_rel: float
    max_abs: float
    own: float | None = None
    draws: int = 1

    @property
    def good(self) -> bool:
        return self.max_rel <= max(TOLERANCE, _ROUNDING * (self.own or 0.0))


@dataclass(kw_only=True)
class Exported:
    """An export: the dynamic dimensions and their bounds, why the others are fixed, and the results of the checks.

    `operators` counts operations, `opset` is that of an ONNX file, `input` and `outputs` are names. `size` is in bytes,
    `foreign` names operators beyond torch's own or standard ONNX. `data` is the second file of an ONNX model whose weights do not
    fit in one file: it must stay next to the first under its name. `metadata` is that of an ONNX file: the names of the classes and
    how inputs are made of images, as far as the model's recipe knows them. `unseen` names weights that are all zero: the checks
    see nothing of what they multiply, such as dynamic parts that were never trained.
    """

    path: str
    format: str
    input_shape: tuple[int, ...]
    dtype: str
    free: dict[str, str]
    fixed: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    operators: int = 0
    opset: int | None = None
    input: str | None = None
    outputs: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    size: int = 0
    data: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        checks = [
            {"shape": list(c.shape), "rel_error": c.max_rel, "abs_error": c.max_abs, "draws": c.draws}
            for c in self.checks
        ]
        return vars(self) | {"input_shape": list(self.input_shape), "checks": checks}

    def to_text(self, width: int = 80) -> str:
        """The file, its inputs and outputs, which sizes are free and why others are not, and the checks."""

        def line(name: str, text: str) -> str:
            return paragraph(f"{name:<10}{text}", width=width, hang=" " * 10)

        names = ("batch", "channels", "height", "width")
        shape = [name if name in self.free else str(n) for name, n in zip(names, self.input_shape, strict=True)]
        opset = "" if self.opset is None else f" opset {self.opset}"
        lines = [
            f"{self.format}{opset}, {self.operators} operations, {count(self.size, 'B')}",
            "",
            line("input", f"{self.input or ''} ({', '.join(shape)}), {self.dtype}".strip()),
            *([line("output", ", ".join(self.outputs))] if self.outputs else []),
            *(line("free", f"{same}: {told}") for same, told in _grouped(self.free)),
            *(line("fixed", f"{same}: {why}") for same, why in _grouped(self.fixed)),
        ]
        for check in self.checks:
            excuse = "" if check.own is None else f" (float32 moves the model itself by {error(check.own)})"
            if check.draws > 1:
                excuse += f" (draw {check.draws} of images: those before differ, as where PAFU's kernels are tied)"
            lines.append(line("check", f"{'x'.join(map(str, check.shape))}: {error(check.max_rel)} relative{excuse}"))
        if self.unseen:
            some = ", ".join(self.unseen[:2]) + (", ..." if len(self.unseen) > 2 else "")
            what = "they multiply" if len(self.unseen) > 1 else "it multiplies"
            lines.append(
                line("unseen", f"{counted(len(self.unseen), 'weight')} all zero ({some}): no check sees what {what}")
            )
        if self.metadata:
            lines.append(line("metadata", ", ".join(self.metadata)))
        if self.foreign:
            lines.append(line("needs", f"operators that are not standard: {', '.join(self.foreign)}"))
        beside = "" if self.data is None else f", its weights next to it in {Path(self.data).name}"
        return "\n".join([*lines, f"written to  {here(self.path)}{beside}"]) + "\n"

    def __str__(self) -> str:
        return self.to_text()


def _grouped(told: dict[str, str]) -> list[tuple[str, str]]:
    """Texts with the names that share each."""
    return [(", ".join(name for name in told if told[name] == text), text) for text in dict.fromkeys(told.values())]


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: Format | None = None,
    input_size: Sequence[int] | int | None = None,
    example_inputs: Any = None,
    free: str = "auto",
    opset: int | None = None,
    force: bool = False,
    progress: OnProgress | None = None,
) -> Exported:
    """Write the model, in eval mode, to one file (two for ONNX with over 1.5 GiB of weights), and verify the file.

    `format` is "onnx" or "torch" (a `torch.export` archive), by default that of the path's suffix, .onnx or .pt2. `free` selects
    the dynamic dimensions of the input (N, C, H, W): "size" for batch and image size, "batch", "none", or "auto": as many as the
    model and the file allow. A batch that is not dynamic is that of `example_inputs`, else one image. `input_size` and
    `example_inputs` are as for `convert`; without them a size given there is used.
    Raises `ExportError` if `torch.export` or the conversion to ONNX refuses the model, or if the file computes something else
    (then nothing is written); `ConfigError` for a missing package, an unknown format, or an existing file.
    """
    tell = progress or silent
    check_module(model)
    path = Path(path).absolute()
    if free not in FREE:
        raise ConfigError(f"free must be one of {', '.join(FREE)}, got {free!r}")
    kind = export_format(format, path)
    check_target(path, kind, force=force)
    if input_size is None and example_inputs is None:
        input_size = recorded_size(model)
    tell("run the model at two sizes", 0, 1)
    shapes = Shapes.of(model, input_size, example_inputs, free)
    output = _settled_output(model, shapes.example)
    alone = "output" if kind == "onnx" else None  # archives have no names
    about = metadata(get_recipe(model)) if kind == "onnx" else {}
    model = prepared(model, output, kind)
    # Attention by its formula: fused kernels arrange their result so that a later reshape is traced as a view, which
    # their replacement in ONNX does not allow.
    with _beside(path) as partial, sdpa_kernel(SDPBackend.MATH):
        reasons: dict[str, str] = {}
        for names in shapes.tries():
            try:
                outputs = output_names(model, output, alone)
                result = _attempt(model, partial, kind, opset, shapes.for_dims(names), names, outputs, about, tell)
                if free == "size" and (why := [shapes.fixed[name] for name in NAMES[1:] if name in shapes.fixed]):
                    raise ExportError(f"the image size cannot be free: {why[0]}; nothing was written")
                if "batch" not in names or "batch" in result.free or shapes.one is None:
                    break  # otherwise the model's code fixes the batch: again, for one image
            except ExportError as error:
                if free == "size" or not names:
                    raise
                reasons |= dict.fromkeys(names, _reason(error))
        result.fixed = {name: why for name, why in (reasons | shapes.fixed).items() if name not in result.free}
        if "batch" in result.fixed:
            result.fixed["batch"] += f"; for {counted(result.input_shape[0], 'image')} at a time"
        result.size = sum(file.stat().st_size for file in partial.parent.iterdir())
        result.unseen = _all_zero(model)
        data = _put(partial, path, kind)
        result.path, result.data = str(path), None if data is None else str(data)
    return result


def _attempt(
    model: nn.Module,
    partial: Path,
    format: str,
    opset: int | None,
    shapes: Shapes,
    names: tuple[str, ...],
    outputs: list[str] | None,
    about: dict[str, str],
    tell: OnProgress,
) -> Exported:
    """Trace with these dimensions dynamic, write the file, and verify it.

    Records in `shapes.fixed` what the next attempt need not try.
    """
    tell(f"trace with free {', '.join(names)}" if names else "trace at one size", 0, 1)
    program, bounds = traced(model, shapes, names)
    if shapes.turned and set(bounds) != set(names):
        raise ExportError("the odd size fixes dimensions that are free at the example's; nothing was written")
    tell(f"write {format}", 0, 1)
    given = input_name(model, outputs or ())
    with quiet():
        written = write(program, partial, format, opset, given, outputs, about)
    result = Exported(
        path=str(partial),
        format=format,
        input_shape=tuple(shapes.example.shape),
        dtype=str(shapes.example.dtype).removeprefix("torch."),
        free=bounds,
        operators=written.operators,
        opset=written.opset,
        input=given if format == "onnx" else None,
        outputs=written.outputs if format == "onnx" else outputs or [],
        foreign=foreign_operators(program, partial, format),
        metadata=about,
    )
    tell("read back", 0, 1)
    runner = read(partial, format)
    wanted = shapes.to_check(tuple(bounds))
    for done, shape in enumerate(wanted):
        tell("check against the model", done, len(wanted))
        try:
            result.checks.append(_check(model, runner, shape))
        except ExportError as error:
            if shape[2:] == shapes.odd_in(tuple(bounds)) and not shapes.turned:
                # A network that pads where it must is traced with its padding at that size, and then fits the others, too.
                # Not in an archive, whose guards keep to the sizes that pad.
                if format == "onnx":
                    with suppress(ExportError):
                        turned = shapes.turn()
                        found = _attempt(model, partial, format, opset, turned, names, outputs, about, tell)
                        return replace(found, input_shape=tuple(shapes.example.shape))
                shapes.on_grid = _reason(error)
                return _attempt(model, partial, format, opset, shapes, names, outputs, about, tell)
            if shape[2:] != shapes.example.shape[2:]:
                shapes.fixed |= dict.fromkeys(NAMES[1:], _reason(error))
            raise
    if BY_TRIAL in bounds.values():
        tell("find the smallest image", 0, 1)
        least = _least(model, runner, shapes.example)
        limits = f"{f'at least {least}' if least > 1 else 'any'}, by trial"
        result.free = {name: limits if told == BY_TRIAL else told for name, told in bounds.items()}
    return result


def _all_zero(model: nn.Module) -> list[str]:
    """Names of weights, not biases, that are all zero."""
    return [
        name
        for name, weight in model.named_parameters()
        if (weight.dim() > 1 or name.endswith("weight")) and not weight.count_nonzero()
    ]


def _settled_output(model: nn.Module, example: Tensor) -> Any:
    """The model's output. Raises `ExportError` if it is random in eval mode: no file can be compared with it."""
    first, second = (run_model(model, Inputs(args=(example,)), seed) for seed in (0, 1))
    difference = compare(_leaves(first), _leaves(second))
    if not difference.max_rel <= TOLERANCE:
        raise ExportError(
            f"{type(model).__name__} is random in eval mode: two runs on the same images differ by "
            f"{difference.max_rel:.1e}; disable the source of randomness (manual dropout, noise) before exporting"
        )
    return first


def _reason(error: ExportError) -> str:
    return str(error).removesuffix("; nothing was written")


def check_target(path: Path, format: str, *, force: bool = False) -> None:
    """Raise `ConfigError` before any work: unknown format, missing package, existing file, missing folder."""
    if format not in FORMATS:
        raise ConfigError(f"the format must be one of {', '.join(FORMATS)}, got {format!r}")
    missing = missing_packages(format)
    if missing:
        raise ConfigError(
            f"export to {format} needs {', '.join(missing)}, which are not installed: pip install {' '.join(missing)}, "
            f"or pip install 'surgeon[export]'"
        )
    for there in [path, data_of(path)] if format == "onnx" else [path]:
        check_file_output(there, force=force)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A path of that name in a temporary folder next to it."""
    try:
        with unfinished(path) as folder:
            yield folder / path.name
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error


def _put(partial: Path, path: Path, format: str) -> Path | None:
    """Move the file to its path. A separate weights file, whose path is returned, goes first: the model refers to it."""
    data, place = data_of(partial), data_of(path)
    apart = data.exists()
    if apart:
        path.unlink(missing_ok=True)  # the old model would otherwise be read with the new weights
        data.replace(place)
    partial.replace(path)
    if format == "onnx" and not apart:
        place.unlink(missing_ok=True)  # weights of the replaced model
    return place if apart else None


# --- checking -----------------------------------------------------------------------------------------------------


def _check(model: nn.Module, runner: Runner, shape: tuple[int, ...]) -> Check:
    selects = any(layer.selects for layer in dynamic_layers(model).values())
    for draw in range(1, (_DRAWS if selects else 1) + 1):
        check = replace(_compared(model, runner, shape, draw), draws=draw)
        if check.good:
            return check
    allowed = f"at most {TOLERANCE:g}"
    if check.own and _ROUNDING * check.own > TOLERANCE:
        allowed += f", or {_ROUNDING:g} times the model's own float32 error of {check.own:.1e}"
    raise ExportError(
        f"the exported file is not equivalent to the model: relative error {check.max_rel:.1e} at "
        f"{'x'.join(map(str, shape))} ({allowed}); nothing was written"
    )


def _least(model: nn.Module, runner: Runner, example: Tensor) -> int:
    """Side of the smallest square images at which the file does what the model does, by bisection."""
    below, least = 0, min(example.shape[2:])
    while least - below > 1:
        side = (below + least) // 2
        try:
            _check(model, runner, (*example.shape[:2], side, side))
        except SurgeonError:
            below = side
        else:
            least = side
    return least


def _compared(model: nn.Module, runner: Runner, shape: tuple[int, ...], draw: int) -> Check:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    images = random_images(like.new_empty(1, shape[1], 1, 1), shape[0], shape[2:], draw)
    expected = _leaves(run_model(model, Inputs(args=(images,))))
    try:
        with strict_float32():
            found = runner(images)
    except Exception as error:
        raise ExportError(
            f"the exported file does not run at {'x'.join(map(str, shape))}: {first_line(error)}; nothing was written"
        ) from error
    difference = compare(expected, found)
    check = Check(shape=shape, max_rel=difference.max_rel, max_abs=difference.max_abs)
    if not check.good and math.isfinite(check.max_rel):
        check = replace(check, own=_own_rounding(model, images, expected).max_rel)
    return check


def _own_rounding(model: nn.Module, images: Tensor, expected: list[Tensor]) -> Difference:
    """Difference between the model in float32 and in float64."""
    try:
        double = copy_model(model).double()
        exact = _leaves(run_model(double, Inputs(args=(images.double(),))))
    except SurgeonError:  # it does not run in float64: no allowance
        return Difference()
    return compare([t.to(e.dtype) for t, e in zip(exact, expected, strict=True)], expected)


def _leaves(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
