"""The two file formats: requirements, writing a traced program, reading it back, running it."""

import importlib.util
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.export._trace as torch_trace
from torch import Tensor
from torch.utils._pytree import tree_leaves

from surgeon.errors import ExportError

Runner = Callable[[Tensor], list[Tensor]]

PLACES = {"batch": 0, "height": 2, "width": 3}  # sizes that may be free, and their axes
NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}
LARGE = 3 * 2**29  # bytes; larger weights go to a separate ONNX file, because protobuf messages are limited to 2 GiB
_TORCH_OWN = ("aten", "prims", "prim", "higher_order", "_operator", "math", "torch")


def missing_packages(format: str) -> list[str]:
    """Packages that the format needs and this environment lacks."""
    return [name for name in NEEDED[format] if importlib.util.find_spec(name) is None]


@contextmanager
def quiet() -> Iterator[None]:
    """Silences exporter output; failures still raise."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        # torch.export prints the graph of a refused model on stderr, which other threads write to and must not lose
        with (
            warnings.catch_warnings(),
            redirect_stdout(StringIO()),
            patch.object(torch_trace, "print", lambda *args, **kwargs: None, create=True),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@dataclass(frozen=True, kw_only=True)
class Written:
    """A written file: its number of operations and, for ONNX, its opset and output names."""

    operators: int
    opset: int | None = None
    outputs: list[str] = field(default_factory=list)


def write(
    program: torch.export.ExportedProgram,
    path: Path,
    format: str,
    opset: int | None,
    given: str = "images",
    outputs: list[str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Written:
    """Write the program, using these names of its input and outputs, and this metadata, in ONNX.

    Raises `ExportError` if the format cannot express it, or if the file has another opset than requested.
    """
    if format == "torch":
        return _write_archive(program, path)
    import onnx

    try:
        with _slices_left_alone():
            made = torch.onnx.export(
                _attention_in_four(program),
                dynamo=True,
                opset_version=opset,
                verbose=False,
                input_names=[given],
                output_names=outputs,
                optimize=True,
            )
        assert made is not None
        made.save(path, external_data=_weights(program) >= LARGE)
        model = onnx.load(path, load_external_data=False)
        if metadata:
            onnx.helper.set_model_props(model, dict(metadata))
        if _name_sizes(model.graph) or metadata:
            onnx.save(model, path)
        onnx.checker.check_model(path, full_check=True)
    except OSError:  # a full disk says nothing about the model
        raise
    except Exception as error:
        raise ExportError(f"the conversion to ONNX refuses the model: {_cause(error)}; nothing was written") from error
    found = next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
    if opset is not None and found != opset:
        raise ExportError(f"torch.onnx wrote opset {found}, not {opset}, for this model; nothing was written")
    return Written(operators=len(model.graph.node), opset=found, outputs=[one.name for one in model.graph.output])


def _name_sizes(graph: Any) -> bool:
    """Give the free sizes of an ONNX graph their names, in place of torch's symbols (s77); False if there are none."""
    axes = graph.input[0].type.tensor_type.shape.dim
    names = {axes[axis].dim_param: name for name, axis in PLACES.items() if axis < len(axes) and axes[axis].dim_param}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(r"\w+", lambda m: names.get(m[0], m[0]), size.dim_param)
    return bool(names)


def _write_archive(program: torch.export.ExportedProgram, path: Path) -> Written:
    archive = BytesIO()  # written in one piece: with torch's own writer, a full disk kills the process
    try:
        torch.export.save(program, archive)
    except Exception as error:  # it raises arbitrary errors for what it cannot serialize
        raise ExportError(f"torch.export cannot save the model: {_cause(error)}; nothing was written") from error
    path.write_bytes(archive.getbuffer())
    return Written(operators=sum(node.op == "call_function" for node in program.graph.nodes))


def data_of(path: Path) -> Path:
    """Path of a large ONNX model's weights: next to it, as torch.onnx names them."""
    return path.with_name(f"{path.name}.data")


def _weights(program: torch.export.ExportedProgram) -> int:
    """Total bytes of the program's tensors."""
    held = [*program.state_dict.values(), *program.constants.values()]
    return sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor))


def _attention_in_four(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with attention as a formula for queries other than (N, heads, L, E), as Hiera's: ONNX needs 4 dimensions."""
    attention = torch.ops.aten.scaled_dot_product_attention.default
    queries = [node.args[0].meta["val"] for node in program.graph.nodes if node.target is attention]
    if all(query.dim() == 4 for query in queries):
        return program
    made: torch.export.ExportedProgram = program.run_decompositions(
        {attention: torch.export.default_decompositions()[attention]}
    )
    return made


@contextmanager
def _slices_left_alone() -> Iterator[None]:
    """Disable the one rule of onnxscript's optimizer that scans the whole graph for every node.

    It merges the two halves of a tensor into one Split. A DConv slices once per tap of its kernel, never into halves.
    """
    from onnxscript.rewriter.rules import common

    rule = getattr(common, "slice_split_rule", None)
    if rule is None:
        yield
        return
    rule.try_rewrite = lambda *arguments, **options: None
    try:
        yield
    finally:
        del rule.try_rewrite


def _cause(error: BaseException) -> str:
    """The line of the innermost error: the outer ones only explain how to file a report."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def read(path: Path, format: str) -> Runner:
    """The file as a function of a batch of images, its outputs in order."""
    if format == "torch":
        try:
            with quiet():
                module = torch.export.load(path).module()
        except Exception as error:
            raise ExportError(
                f"torch.export cannot load the file again: {_cause(error)}; nothing was written"
            ) from error

        def run_torch(images: Tensor) -> list[Tensor]:
            with torch.no_grad():
                return [leaf for leaf in tree_leaves(module(images)) if isinstance(leaf, Tensor)]

        return run_torch
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what fails is raised, too
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"onnxruntime cannot load the exported file: {_cause(error)}; nothing was written") from error
    name = session.get_inputs()[0].name

    def run_onnx(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {name: images.cpu().numpy()})]

    return run_onnx


def foreign_operators(program: torch.export.ExportedProgram, path: Path, format: str) -> list[str]:
    """Operators beyond torch's own or standard ONNX, which need their library wherever the file runs."""
    if format == "torch":
        functions = (node.target for node in program.graph.nodes if node.op == "call_function")
        return sorted(
            {name for function in functions if (name := _torch_name(function)).split("::")[0] not in _TORCH_OWN}
        )
    import onnx

    model = onnx.load(path, load_external_data=False)
    local = {(function.domain, function.name) for function in model.functions}
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    return sorted(
        {
            f"{node.domain}::{node.op_type}"
            for node in nodes
            if node.domain not in ("", "ai.onnx") and (node.domain, node.op_type) not in local
        }
    )


def _torch_name(function: Any) -> str:
    """`namespace::name` of the function called by a node."""
    if isinstance(function, torch._ops.OpOverload):
        return function._schema.name
    if isinstance(function, torch._ops.HigherOrderOperator):
        return f"higher_order::{function.name()}"
    return f"{getattr(function, '__module__', '')}::{getattr(function, '__name__', function)}"
