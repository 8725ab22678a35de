"""Tracing for `surgeon.export`: the example images, the dynamic dimensions, and why the others are fixed."""

import os
import re
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.errors import ExportError, InputError, SurgeonError
from surgeon.exporting.exported import PLACES, quiet
from surgeon.sites.inputs import Inputs, candidate_inputs, given_inputs
from surgeon.surgery.rewrite import dynamic_layers, static
from surgeon.surgery.running import run as run_model
from surgeon.util.copying import evaluating

NAMES = tuple(PLACES)
BY_TRIAL = "by trial"  # in place of the values of a size whose bounds torch.export does not derive

# The second image size is larger by one of these in height and by twice that in width: the usual divisors, and patches
# of 14. Twice the size would suit more networks, but HaloNet's windows kept torch.export busy for ten minutes.
_STEPS = (32, 28)
# A third size is larger by one of these in height and by three times that in width: off every grid of a larger power of two.
_OFF_STEPS = (1, 2, 4, 8, 16)
_REPAIRS = 4  # how often torch.export may request other bounds of a dimension
# where the code that traces is
_TRACING = tuple(str(Path(torch.__path__[0]).with_name(name)) + os.sep for name in ("torch", "sympy"))
_NODE = re.compile(r"while running (\w+) node\. Name:'([^']+)'")  # in onnxruntime's message of a node that failed
_VIOLATED = "Constraints violated"  # its message for a dimension that cannot be as dynamic as requested


@dataclass
class Shapes:
    """The example, other image sizes that the model accepts, and why dimensions are fixed.

    `one` is a batch of one image, the example where the batch is not dynamic; None if the batch is the caller's or the model's own.
    `odd` is a size that shares as small a divisor with the example's as the model accepts, `refused` why it accepts none smaller,
    and `on_grid` why the file keeps to sizes that torch.export derived ("multiples of 32") though the model accepts others.
    `turned`: the example is of that odd size, and `odd` the size that was the example's.
    """

    example: Tensor
    other: tuple[int, int] | None
    fixed: dict[str, str]
    one: Tensor | None = None
    odd: tuple[int, int] | None = None
    refused: str = ""
    on_grid: str = ""
    turned: bool = False

    @classmethod
    def of(cls, model: nn.Module, input_size: Any, example_inputs: Any, free: str) -> "Shapes":
        example = _example(model, input_size, example_inputs)
        shapes = cls(example, None, {}, None if example_inputs is not None else _one_image(model, example))
        if free in ("batch", "none"):
            shapes.fixed |= dict.fromkeys(NAMES[1:], "asked for")
        else:
            try:
                shapes.other = _other_size(model, example)
                shapes.odd, shapes.refused = _odd_size(model, example)
            except InputError as error:
                if free == "size":
                    raise ExportError(f"the model itself does not run {error}") from error
                shapes.fixed |= dict.fromkeys(
                    NAMES[1:], f"the model takes no other size: {first_line(error.__cause__)}"
                )
        if free == "none":
            shapes.fixed["batch"] = "asked for"
        return shapes

    def tries(self) -> Iterator[tuple[str, ...]]:
        """Names of the dimensions to leave dynamic, most first, none last; without those fixed by then."""
        tried: set[tuple[str, ...]] = set()
        for names in (NAMES, NAMES[1:], NAMES[:1]):
            left = tuple(name for name in names if name not in self.fixed)
            if left and left not in tried:
                tried.add(left)
                yield left
        yield ()

    def for_dims(self, names: Sequence[str]) -> "Shapes":
        """These with the example to trace with where the dimensions of these names are dynamic; `fixed` is shared."""
        return self if "batch" in names or self.one is None else replace(self, example=self.one)

    def turn(self) -> "Shapes":
        """These with the example at the odd size."""
        assert self.odd is not None
        example = random_images(self.example, self.example.shape[0], self.odd)
        height, width = self.example.shape[2:]
        return replace(self, example=example, odd=(height, width), fixed=dict(self.fixed), turned=True)

    def to_check(self, dims: Sequence[str]) -> list[tuple[int, ...]]:
        """Two batch sizes and three image sizes, as far as they are dynamic."""
        n, c, h, w = self.example.shape
        batches = [n, n + 1] if "batch" in dims else [n]
        shapes: list[tuple[int, ...]] = [(batch, c, h, w) for batch in batches]
        if self.other is not None and ("height" in dims or "width" in dims):
            shapes += [(batch, c, *self.where_free(self.other, dims)) for batch in batches]
        if odd := self.odd_in(dims):
            shapes.append((n, c, *odd))
        return shapes

    def odd_in(self, dims: Sequence[str]) -> tuple[int, int] | None:
        """`odd` as far as these dimensions are dynamic, if the file is to run at it."""
        if self.odd is None or self.on_grid or not ("height" in dims or "width" in dims):
            return None
        return self.where_free(self.odd, dims)

    def where_free(self, size: tuple[int, int], dims: Sequence[str]) -> tuple[int, int]:
        height, width = self.example.shape[2:]
        return size[0] if "height" in dims else height, size[1] if "width" in dims else width


def _one_image(model: nn.Module, example: Tensor) -> Tensor | None:
    """The first image of the example as a batch; None if the model takes none, as a program that was traced for another."""
    graph: Any = getattr(model, "graph", None)
    nodes = [node for node in graph.nodes if node.op == "placeholder"] if isinstance(graph, fx.Graph) else []
    values = [node.meta.get("val") for node in nodes]
    if any(isinstance(value, Tensor) and type(value.shape[0]) is int for value in values):
        return None
    try:
        run_model(model, Inputs(args=(example[:1].clone(),)))
    except InputError:
        return None
    return example[:1].clone()


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
    """Another image size that the model accepts. Raises `InputError` if none was found."""
    height, width = example.shape[-2:]
    sizes = [(height + step, width + 2 * step) for step in _STEPS]
    refused: BaseException | None = None
    for size in sizes:
        try:
            run_model(model, Inputs(args=(random_images(example, 2, size),)))
        except InputError as error:
            refused = refused or error.__cause__ or error
        else:
            return size
    tried = " or ".join(f"{h}x{w}" for h, w in sizes)
    raise InputError(f"at {tried}, only at {height}x{width}: {first_line(refused)}") from refused


def _odd_size(model: nn.Module, example: Tensor) -> tuple[tuple[int, int] | None, str]:
    """An image size off every grid that the model accepts, and its error at the one before; None if it accepts none."""
    height, width = example.shape[-2:]
    refused = ""
    for step in _OFF_STEPS:
        size = (height + step, width + 3 * step)
        try:
            run_model(model, Inputs(args=(random_images(example, 2, size),)))
        except InputError as error:
            refused = f"the model takes no {size[0]}x{size[1]}: {first_line(error.__cause__ or error)}"
        else:
            return size, refused
    return None, refused


def random_images(like: Tensor, batch: int, size: Sequence[int], draw: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(6 + draw)
    return torch.randn((batch, like.shape[1], *size), generator=generator).to(like)


# --- tracing ------------------------------------------------------------------------------------------------------


def traced(
    model: nn.Module, shapes: Shapes, names: tuple[str, ...]
) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """The model's program with these dimensions dynamic, and which of them are, with their values in words."""
    minima = [1, *_minima(shapes.example)] if "height" in names else [1]
    for least in minima:
        dims = {PLACES[name]: torch.export.Dim(name, min=1 if name == "batch" else least) for name in names}
        try:
            program, by_trial = _trace(model, shapes.example, dims, explore=least != minima[-1]), False
        except Exception as error:  # torch.export passes on any error that the model's code raises on symbols
            if least != minima[-1] and _asks_for_more(error):
                continue
            program, by_trial = _unsolved(model, shapes.example, names, (minima[0], least), error), True
        break
    # Its solver keeps the remainder of a division as it is in the example (`ceil_mode`: only multiples of 32), whether
    # or not the model needs that. Where the model accepts other sizes, its hints are taken, and tried below.
    if not by_trial and (odd := shapes.odd_in(names)) and _off_grid(odd, program):
        try:
            freer = _unsolved(model, shapes.example, names, (minima[0], least), None)
        except ExportError as error:
            shapes.on_grid = str(error)
        else:
            program, by_trial = freer, True
    reason = shapes.on_grid or shapes.refused
    free = {}
    for name in names:
        size = _sizes(program)[PLACES[name]]
        if isinstance(size, int):
            shapes.fixed[name] = f"the model's code fixes it{'' if name == 'batch' else f' at {size}'}"
        elif name == "batch":
            free[name] = _bounds(size, program)
        elif (by_trial or reason) and size.node.expr.is_symbol:
            free[name] = f"not every size; {reason}" if reason else BY_TRIAL
        else:
            free[name] = _bounds(size, program, reason)
    return program, free


def _sizes(program: torch.export.ExportedProgram) -> Sequence[int | torch.SymInt]:
    """(N, C, H, W) of the program's input."""
    (given,) = program.graph_signature.user_inputs
    sizes: Sequence[int | torch.SymInt] = next(n for n in program.graph.nodes if n.name == given).meta["val"].shape
    return sizes


def _off_grid(image: tuple[int, int], program: torch.export.ExportedProgram) -> bool:
    """Whether the program's dynamic image sizes are limited to multiples that do not contain these."""
    for size, side in zip(_sizes(program)[2:], image, strict=True):
        if not isinstance(size, int):
            offset, factor, _ = _affine(size)
            if (side - offset) % factor:
                return True
    return False


def _affine(size: torch.SymInt) -> tuple[int, int, Any]:
    """`(16, 32, s)` of a dynamic size 32*s + 16."""
    offset, rest = size.node.expr.as_coeff_Add()
    factor, symbol = rest.as_coeff_Mul()
    return int(offset), int(factor), symbol


def _trace(model: nn.Module, example: Tensor, dims: Any, *, explore: bool) -> torch.export.ExportedProgram:
    """`explore`: plain convolutions first. They have the same sizes with far fewer operations, and rule out bounds sooner."""
    given: Any = (dims,)
    if explore and dynamic_layers(model):
        with static(model):
            _, given = _program(model, example, given)
    return _program(model, example, given)[0]


def _asks_for_more(error: Exception) -> bool:
    return isinstance(error, torch._dynamo.exc.UserError) and _VIOLATED in str(error)


def _unsolved(
    model: nn.Module, example: Tensor, names: tuple[str, ...], minima: tuple[int, ...], why: Exception | None
) -> torch.export.ExportedProgram:
    """Trace without deriving bounds of sizes, because torch.export cannot solve some conditions: pooling with `ceil_mode`,
    interpolation by a factor. `why` is its error with them."""
    hint = torch.export.Dim.AUTO
    for least in dict.fromkeys(minima if names else ()):
        dims = {PLACES[name]: hint if name == "batch" else hint(min=least) for name in names}
        try:
            return _trace(model, example, dims, explore=True)
        except Exception as error:
            why = why or error  # report the first
    told = "" if why is None else f"{first_line(why)}{_place(why)}"
    raise ExportError(f"torch.export refuses {type(model).__name__}: {told}; nothing was written") from why


def _place(error: Exception) -> str:
    """The line of the model's code at which tracing failed, if it failed in one."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_TRACING)]
    if not frames or frames[-1].filename in (__file__, "<string>"):
        return ""
    return f" at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"


def _minima(example: Tensor) -> list[int]:
    """Minimum image sizes to try. Strides reduce a small image to one pixel, a special case for torch.export: 33 if they are 32."""
    shorter = min(example.shape[2:])
    return [least for least in (5, 9, 17, 33, 65, 129) if shorter / 8 <= least <= shorter]


def _program(model: nn.Module, example: Tensor, dims: Any) -> tuple[torch.export.ExportedProgram, Any]:
    """Trace with these dynamic dimensions, or with torch.export's suggested ones instead (multiples of 8, a constant)."""
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


def _bounds(size: torch.SymInt, program: torch.export.ExportedProgram, reason: str = "") -> str:
    """Description of a dynamic dimension's values. That a symbol is at least 2 is torch's convention, not a bound.

    `reason` tells why the values are multiples, where they are.
    """
    offset, factor, symbol = _affine(size)
    lower = int(program.range_constraints[symbol].lower) if symbol in program.range_constraints else 1
    least = lower if lower > 2 else 1
    first = factor * least + offset
    if factor == 1 and not offset:
        return f"at least {least}" if least > 1 else "any"
    if offset % factor == 0:
        told = f"multiples of {factor}" + (f", at least {first}" if first > factor else "")
    else:
        told = f"{first}, {first + factor}, {first + 2 * factor}, … (in steps of {factor})"
    return f"{told}; {reason}" if reason else told


def first_line(error: BaseException | None) -> str:
    """An error as one line: those of torch.export span pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[0] if lines else ""
    if failed := _NODE.search(told):
        return f"onnxruntime fails at {failed[2]} ({failed[1]})"
    if told.startswith(_VIOLATED) and len(lines) > 1:  # this line only says where to look
        told = lines[1].removeprefix("- ")
    return f"{type(error).__name__}: {told[:300]}" if told else type(error).__name__
