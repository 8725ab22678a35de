"""A model as one file that runs where surgeon is not installed: `torch.export` (.pt2) or ONNX, checked before it gets its name.

The model is traced in eval mode; its dynamic layers become ordinary operations (`surgeon.layers.kernels.portable`). Batch and
image size stay free as far as the model and the file allow; what does not is said, with the reason. The file is written beside its
place, read back, run at two batch sizes and two image sizes, compared with the model, and only then renamed. Where any of that
fails, it is tried again with fewer free dimensions.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from surgeon.compare import Difference, compare
from surgeon.copying import copy_model, evaluating, strict_float32
from surgeon.errors import ConfigError, ExportError, InputError, SurgeonError
from surgeon.exported import Runner, data_of, foreign_operators, missing_packages, quiet, read, write
from surgeon.inputs import Inputs, candidate_inputs, given_inputs
from surgeon.layers.pafu import PAFUConv2d
from surgeon.rewrite import dynamic_layers, static
from surgeon.unfinished import unfinished
from surgeon.verify import run as run_model

Format = Literal["onnx", "torch"]
FORMATS = ("onnx", "torch")
FREE = ("auto", "size", "batch", "none")
_PLACES = {"batch": 0, "height": 2, "width": 3}
NAMES = tuple(_PLACES)

TOLERANCE = 1e-4  # of the relative error of the outputs
_ROUNDING = 10.0  # times what float32 does to the model itself, that a file may differ where that is more
_DRAWS = 5  # of images for a network whose kernels are selected
# The second image size is larger by one of these in height and by twice that in width: what most networks divide by, and patches
# of 14. Twice the size would suit more of them, but HaloNet's windows kept torch.export at free sizes for ten minutes.
_STEPS = (32, 28)
_REPAIRS = 4  # how often torch.export may ask for other bounds of a dimension
_VIOLATED = "Constraints violated"  # how it says that a dimension cannot be as free as it was asked to be

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One run of the file beside the model; `own` is how far float32 moves the model itself, where that was asked.

    `draws` is how many images it took: where PAFU's selection is tied, rounding decides, and single pixels get another kernel. What
    is wrong beyond that shows on every image.
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
    """What was written: which dimensions are free and within what, why the others are not, and what the checks gave.

    `operators` counts operations, `size` is in bytes, `foreign` names operators beyond torch's own or standard ONNX. `data` is the
    second file of an ONNX model whose weights one file cannot hold: it must stay beside the first under its name.
    """

    path: str
    format: str
    input_shape: tuple[int, ...]
    dtype: str
    free: dict[str, str]
    fixed: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    operators: int = 0
    foreign: list[str] = field(default_factory=list)
    size: int = 0
    data: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        checks = [
            {"shape": list(c.shape), "rel_error": c.max_rel, "abs_error": c.max_abs, "draws": c.draws}
            for c in self.checks
        ]
        return vars(self) | {"input_shape": list(self.input_shape), "checks": checks}


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: Format = "onnx",
    input_size: Sequence[int] | int | None = None,
    example_inputs: Any = None,
    free: str = "auto",
    opset: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write the model, in eval mode, to one file (ONNX above 1.5 GiB of weights: two), and check what it computes.

    `format` is "onnx" or "torch" (a `torch.export` archive). `free` says which dimensions of the input (N, C, H, W) may change:
    "size" batch and image size, "batch", "none", or "auto": as much of that as the model and the file allow. `input_size` and
    `example_inputs` are as for `convert`. Raises `ExportError` where `torch.export` or the conversion to ONNX refuses the model
    or the file computes something else (nothing is written then), `ConfigError` for a missing package or a file that exists.
    """
    tell = progress or (lambda stage, done, total: None)
    path = Path(path).absolute()
    if free not in FREE:
        raise ConfigError(f"free must be one of {', '.join(FREE)}, got {free!r}")
    check_target(path, format, force=force)
    tell("trace", 0, 1)
    shapes = _Shapes.of(model, input_size, example_inputs, free)
    # Attention by its formula: fused kernels lay out their result so that a reshape behind them is traced as a view, which
    # what stands for them in ONNX does not allow.
    with _beside(path) as partial, sdpa_kernel(SDPBackend.MATH):
        reasons: dict[str, str] = {}
        for names in shapes.tries():
            try:
                result = _attempt(model, partial, format, opset, shapes, names, tell)
                break
            except ExportError as error:
                if free == "size" or not names:
                    raise
                reasons |= dict.fromkeys(names, _reason(error))
        result.fixed = {name: why for name, why in (reasons | shapes.fixed).items() if name not in result.free}
        result.size = sum(file.stat().st_size for file in partial.parent.iterdir())
        data = _put(partial, path, format)
        result.path, result.data = str(path), None if data is None else str(data)
    return result


def _attempt(
    model: nn.Module,
    partial: Path,
    format: str,
    opset: int | None,
    shapes: "_Shapes",
    names: tuple[str, ...],
    tell: Progress,
) -> Exported:
    """Trace with these dimensions free, write the file, and check what it computes.

    `shapes.fixed` learns what the next attempt need not try.
    """
    tell("trace", 0, 1)
    program, bounds = _traced(model, shapes, names)
    tell("convert", 0, 1)
    with quiet():
        operators = write(program, partial, format, opset)
    result = Exported(
        path=str(partial),
        format=format,
        input_shape=tuple(shapes.example.shape),
        dtype=str(shapes.example.dtype).removeprefix("torch."),
        free=bounds,
        operators=operators,
        foreign=foreign_operators(program, partial, format),
    )
    runner = read(partial, format)
    wanted = shapes.to_check(tuple(bounds))
    for done, shape in enumerate(wanted):
        tell("check", done, len(wanted))
        try:
            result.checks.append(_check(model, runner, shape))
        except ExportError as error:
            if shape[2:] != shapes.example.shape[2:]:
                shapes.fixed |= dict.fromkeys(NAMES[1:], _reason(error))
            raise
    return result


def _reason(error: ExportError) -> str:
    return str(error).removesuffix("; nothing was written")


def check_target(path: Path, format: str, *, force: bool = False) -> None:
    """Raise `ConfigError` before work starts: unknown format, missing package, file that exists, folder that does not."""
    if format not in FORMATS:
        raise ConfigError(f"the format must be one of {', '.join(FORMATS)}, got {format!r}")
    missing = missing_packages(format)
    if missing:
        raise ConfigError(
            f"export to {format} needs {', '.join(missing)}, not installed here: pip install {' '.join(missing)}, "
            f"or pip install 'surgeon[export]'"
        )
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file")
    for there in [path, data_of(path)] if format == "onnx" else [path]:
        if there.exists() and not force:
            raise ConfigError(f"{there} exists; choose another with -o, or replace it with --force")
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent} to write {path.name} to")


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A place of that name in an unfinished folder beside it."""
    try:
        with unfinished(path) as folder:
            yield folder / path.name
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error


def _put(partial: Path, path: Path, format: str) -> Path | None:
    """Move the file to its place. Weights of their own, whose place is returned, go first: it names them."""
    data, place = data_of(partial), data_of(path)
    apart = data.exists()
    if apart:
        path.unlink(missing_ok=True)  # the one that is replaced would be read with weights that are not its own
        data.replace(place)
    partial.replace(path)
    if format == "onnx" and not apart:
        place.unlink(missing_ok=True)  # those of the one that was replaced
    return place if apart else None


# --- what may change ----------------------------------------------------------------------------------------------


@dataclass
class _Shapes:
    """The example, another image size that the model takes too, and why dimensions are fixed."""

    example: Tensor
    other: tuple[int, int] | None
    fixed: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module, input_size: Any, example_inputs: Any, free: str) -> "_Shapes":
        example = _example(model, input_size, example_inputs)
        shapes = cls(example, None, {})
        if free in ("batch", "none"):
            shapes.fixed |= dict.fromkeys(NAMES[1:], "asked for")
        else:
            try:
                shapes.other = _other_size(model, example)
            except InputError as error:
                if free == "size":
                    raise ExportError(f"the model itself does not run {error}") from error
                shapes.fixed |= dict.fromkeys(
                    NAMES[1:], f"the model takes no other size: {_first_line(error.__cause__)}"
                )
        if free == "none":
            shapes.fixed["batch"] = "asked for"
        return shapes

    def tries(self) -> Iterator[tuple[str, ...]]:
        """Names of the dimensions to leave free, the most first, none last; without those that are fixed by then."""
        tried: set[tuple[str, ...]] = set()
        for names in (NAMES, NAMES[1:], NAMES[:1]):
            left = tuple(name for name in names if name not in self.fixed)
            if left and left not in tried:
                tried.add(left)
                yield left
        yield ()

    def to_check(self, dims: Sequence[str]) -> list[tuple[int, ...]]:
        """Two batch sizes and two image sizes, as far as they are free."""
        n, c, h, w = self.example.shape
        batches = [n, n + 1] if "batch" in dims else [n]
        sizes = [(h, w)]
        if self.other is not None and ("height" in dims or "width" in dims):
            sizes.append((self.other[0] if "height" in dims else h, self.other[1] if "width" in dims else w))
        return [(batch, c, *size) for size in sizes for batch in batches]


def _example(model: nn.Module, input_size: Any, example_inputs: Any) -> Tensor:
    """One batch of images (N, C, H, W) that the model runs on."""
    candidates: list[Inputs] | Iterator[Inputs]
    candidates = candidate_inputs(model, input_size) if example_inputs is None else iter([given_inputs(example_inputs)])
    failure: SurgeonError | None = None
    for inputs in candidates:
        if (
            inputs.kwargs
            or len(inputs.args) != 1
            or not isinstance(inputs.args[0], Tensor)
            or inputs.args[0].dim() != 4
        ):
            raise ExportError(
                f"only models of one batch of images (N, C, H, W) can be exported; {type(model).__name__} takes "
                f"{inputs.shapes()}"
            )
        try:
            run_model(model, inputs)
        except InputError as error:
            failure = failure or error
            continue
        return inputs.args[0]
    assert failure is not None
    raise failure


def _other_size(model: nn.Module, example: Tensor) -> tuple[int, int]:
    """Another image size that the model takes. Raises `InputError` where none was found."""
    height, width = example.shape[-2:]
    sizes = [(height + step, width + 2 * step) for step in _STEPS]
    refused: BaseException | None = None
    for size in sizes:
        try:
            run_model(model, Inputs(args=(_images(example, 2, size),)))
        except InputError as error:
            refused = refused or error.__cause__ or error
        else:
            return size
    tried = " or ".join(f"{h}x{w}" for h, w in sizes)
    raise InputError(f"at {tried}, only at {height}x{width}: {_first_line(refused)}") from refused


def _images(like: Tensor, batch: int, size: Sequence[int], draw: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(6 + draw)
    return torch.randn((batch, like.shape[1], *size), generator=generator).to(like)


# --- tracing ------------------------------------------------------------------------------------------------------


def _traced(
    model: nn.Module, shapes: _Shapes, names: tuple[str, ...]
) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    minima = [1, *_minima(shapes.example)] if "height" in names else [1]
    for least in minima:
        dims = {_PLACES[name]: torch.export.Dim(name, min=1 if name == "batch" else least) for name in names}
        try:
            program, solved = _trace(model, shapes.example, dims, explore=least != minima[-1]), True
        except Exception as error:  # torch.export raises whatever the model's code raises under its symbols
            if least != minima[-1] and _asks_for_more(error):
                continue
            program, solved = _unsolved(model, shapes.example, names, least, error), False
        break
    (given,) = program.graph_signature.user_inputs
    sizes = next(node for node in program.graph.nodes if node.name == given).meta["val"].shape
    free = {}
    for name in names:
        size = sizes[_PLACES[name]]
        if isinstance(size, int):
            shapes.fixed[name] = f"the model's code fixes it at {size}"
        else:
            free[name] = _bounds(size, program, solved or name == "batch")
    return program, free


def _trace(model: nn.Module, example: Tensor, dims: Any, *, explore: bool) -> torch.export.ExportedProgram:
    """`explore`: plain convolutions first. They have the same sizes in a fraction of the operations, and rule out bounds sooner."""
    given: Any = (dims,)
    if explore and dynamic_layers(model):
        with static(model):
            _, given = _program(model, example, given)
    return _program(model, example, given)[0]


def _asks_for_more(error: Exception) -> bool:
    return isinstance(error, torch._dynamo.exc.UserError) and _VIOLATED in str(error)


def _unsolved(
    model: nn.Module, example: Tensor, names: tuple[str, ...], least: int, why: Exception
) -> torch.export.ExportedProgram:
    """Traced with sizes that torch.export need not put into bounds; some conditions it cannot (pooling with `ceil_mode`)."""
    hint = torch.export.Dim.AUTO
    dims = {_PLACES[name]: hint if name == "batch" else hint(min=least) for name in names}
    if dims and not _asks_for_more(why):
        with suppress(Exception):  # what it said first is what can be told
            return _trace(model, example, dims, explore=True)
    raise ExportError(f"torch.export refuses {type(model).__name__}: {_first_line(why)}; nothing was written") from why


def _minima(example: Tensor) -> list[int]:
    """Least image sizes to try. Strides make one pixel of a small image, which torch.export sets apart: 33 where they are 32."""
    shorter = min(example.shape[2:])
    return [least for least in (5, 9, 17, 33, 65, 129) if shorter / 8 <= least <= shorter]


def _program(model: nn.Module, example: Tensor, dims: Any) -> tuple[torch.export.ExportedProgram, Any]:
    """Traced with these free dimensions, or with what torch.export suggests in place of them (multiples of 8, a constant)."""
    from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes

    repairs = 0
    while True:
        try:
            with quiet(), evaluating(model):
                return torch.export.export(model, (example,), dynamic_shapes=dims, strict=False), dims
        except torch._dynamo.exc.UserError as error:
            fixes = str(error).partition("Suggested fixes:")[2].strip().partition("\n\n")[0]
            if repairs == _REPAIRS or not fixes:
                raise
            dims, repairs = refine_dynamic_shapes_from_suggested_fixes(f"Suggested fixes:\n{fixes}", dims), repairs + 1


def _bounds(size: torch.SymInt, program: torch.export.ExportedProgram, solved: bool) -> str:
    """Which values a free dimension takes, for people. That a symbol is at least 2 is torch's habit, not a bound."""
    factor, symbol = size.node.expr.as_coeff_Mul()
    least = int(program.range_constraints[symbol].lower) if symbol in program.range_constraints else 1
    told = [f"multiples of {factor}"] if factor != 1 else []
    told += [f"at least {factor * least}"] if least > 2 else []
    if not solved:
        told.append("not all for certain: torch.export could not solve its conditions")
    return ", ".join(told) or "any"


# --- checking -----------------------------------------------------------------------------------------------------


def _check(model: nn.Module, runner: Runner, shape: tuple[int, ...]) -> Check:
    selects = any(isinstance(layer, PAFUConv2d) for layer in dynamic_layers(model).values())
    for draw in range(1, (_DRAWS if selects else 1) + 1):
        check = replace(_compared(model, runner, shape, draw), draws=draw)
        if check.good:
            return check
    allowed = f"at most {TOLERANCE:g}"
    if check.own and _ROUNDING * check.own > TOLERANCE:
        allowed += f", or {_ROUNDING:g} times the {check.own:.1e} by which float32 moves the model itself"
    raise ExportError(
        f"the exported file does not compute what the model computes: relative error {check.max_rel:.1e} at "
        f"{'x'.join(map(str, shape))} ({allowed}); nothing was written"
    )


def _compared(model: nn.Module, runner: Runner, shape: tuple[int, ...], draw: int) -> Check:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    images = _images(like.new_empty(1, shape[1], 1, 1), shape[0], shape[2:], draw)
    expected = _leaves(run_model(model, Inputs(args=(images,))))
    try:
        with strict_float32():
            found = runner(images)
    except Exception as error:
        raise ExportError(
            f"the exported file does not run at {'x'.join(map(str, shape))}: {_first_line(error)}; nothing was written"
        ) from error
    difference = compare(expected, found)
    check = Check(shape=shape, max_rel=difference.max_rel, max_abs=difference.max_abs)
    if not check.good and math.isfinite(check.max_rel):
        check = replace(check, own=_own_rounding(model, images, expected).max_rel)
    return check


def _own_rounding(model: nn.Module, images: Tensor, expected: list[Tensor]) -> Difference:
    """How far the model in float32 is from itself in float64."""
    try:
        double = copy_model(model).double()
        exact = _leaves(run_model(double, Inputs(args=(images.double(),))))
    except SurgeonError:  # it does not run in float64: nothing is excused
        return Difference()
    return compare([t.to(e.dtype) for t, e in zip(exact, expected, strict=True)], expected)


def _leaves(output: Any) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _first_line(error: BaseException | None) -> str:
    """What an error says, in a line: those of torch.export go on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[0] if lines else ""
    if told.startswith(_VIOLATED) and len(lines) > 1:  # this says only where to look
        told = lines[1].removeprefix("- ")
    return f"{type(error).__name__}: {told[:300]}" if told else type(error).__name__
