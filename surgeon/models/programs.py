"""torch.export programs in `.pt2` files, read without running code from the file.

`torch.export.load` unpickles whatever a file contains and passes its sizes to sympy, which evaluates them. So the
file is checked first: pickles of plain tensors only, sizes of numbers, symbols and known functions only, and only PyTorch's
own arithmetic operators.
"""

import io
import json
import logging
import re
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx

from surgeon.errors import ModelError
from surgeon.util.files import MOST_BYTES, told

SUFFIX = ".pt2"
FILE = "program.pt2"  # name in a surgeon folder

_MEMBERS = re.compile(
    r"models/model\.json|data/(weights/(weight_\d+|model_weights_config\.json)|sample_inputs/model\.pt"
    r"|constants/(tensor_\d+|model_constants_config\.json))|extra/.*|archive_format|archive_version|byteorder|version|\.data/.*"
)
_TARGETS = re.compile(
    r"torch\.ops\.(aten\.(?!from_file)|prims\.|prim\.|higher_order\.)[\w.]+|torch\.sym_\w+|math\.\w+"
    r"|_operator\.(?!attrgetter|methodcaller|call)\w+"
)
_EXPRESSION = re.compile(r"(?:'\w+'|[A-Za-z_]\w*|\d+(?:\.\d+)?(?:e[+-]?\d+)?|[\s()=,+*/<>-])*")
_WORDS = frozenset(
    {"Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Abs", "Max", "Min", "Eq", "Ne", "Equality"}
    | {"Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "And", "Or", "Not"}
    | {"true", "false", "True", "False", "oo", "int_oo", "positive", "negative", "nonnegative", "nonpositive"}
    | {"integer", "real", "zero", "nonzero", "finite", "precision", "evaluate"}
)


def is_program(spec: str) -> bool:
    """Whether a model's name is that of a `.pt2` file."""
    return spec.endswith(SUFFIX) and Path(spec).is_file()


def read_program(path: str | Path) -> fx.GraphModule:
    """The program of a file as a graph; raises `ModelError` if it is damaged or would run code.

    `train` and `eval` affect only modules added to the graph; the program computes as it was exported.
    """
    path = Path(path)
    _check(path)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        program = torch.export.load(path)
        module: Any = program.module(check_guards=False)
    except Exception as error:
        raise ModelError(f"torch.export cannot load {path}: {type(error).__name__}: {error}") from error
    finally:
        logging.disable(before)
    for method in ("train", "eval"):  # torch's own raise an error
        vars(module).pop(method, None)
    if not isinstance(module, fx.GraphModule):
        raise ModelError(f"{path} contains no graph but a {type(module).__name__}")
    return module


def described(graph: fx.GraphModule) -> str:
    """One-line description of a program: its operators and inputs."""
    nodes = list(graph.graph.nodes)
    inputs = [f"{n.name} {_shape(n.meta.get('val'))}" for n in nodes if n.op == "placeholder"]
    count = sum(n.op == "call_function" for n in nodes)
    return f"a program of torch.export with {count} operators; inputs: {', '.join(inputs) or 'none'}"


def _shape(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return "of another kind"
    sizes = " x ".join(str(n) for n in value.shape)
    return f"{sizes} {str(value.dtype).removeprefix('torch.')}"


# --- checks before loading --------------------------------------------------------------------------------------------


def _check(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = _names(archive, path)
            program = _json(archive, names, "models/model.json", path)
            configs = [_json(archive, names, f"data/{part}/model_{part}_config.json", path) for part in _PARTS]
            sample = (
                archive.read(names["data/sample_inputs/model.pt"]) if "data/sample_inputs/model.pt" in names else b""
            )
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not a program written by this PyTorch's torch.export: {error}") from error
    pickled = [name for config in configs for name, one in config.get("config", {}).items() if one.get("use_pickle")]
    if pickled:
        raise _refused(path, f"it contains pickled objects ({', '.join(map(told, pickled[:3]))})")
    try:
        if sample:
            torch.load(io.BytesIO(sample), weights_only=True)
    except Exception as error:
        raise _refused(path, "its sample inputs are pickled objects") from error
    for key, value in _strings(program):
        if key == "expr_str" and not _is_plain(value):
            raise _refused(path, f"the size {told(value)} is more than arithmetic")
        if key == "target of a node" and not _TARGETS.fullmatch(value):
            raise _refused(path, f"it calls {told(value)}, which is not one of PyTorch's own operators")


_PARTS = ("weights", "constants")


def _names(archive: zipfile.ZipFile, path: Path) -> dict[str, str]:
    """Members without their common folder; raises `ModelError` for members that such a file cannot have."""
    names: dict[str, str] = {}
    for name in archive.namelist():
        short = name.partition("/")[2]
        if not _MEMBERS.fullmatch(short) or short in names:
            raise _refused(path, f"it contains {told(name)}, which is not part of a plain program")
        names[short] = name
    return names


def _json(archive: zipfile.ZipFile, names: dict[str, str], short: str, path: Path) -> Any:
    info = archive.getinfo(names[short])
    if info.file_size > 4 * MOST_BYTES:
        raise _refused(path, f"{short} is larger than {4 * MOST_BYTES >> 20} MiB")
    return json.loads(archive.read(info))


def _refused(path: Path, why: str) -> ModelError:
    return ModelError(
        f"{path} was not loaded because that could run code: {why}. If you trust it, load it with torch.export.load and give "
        f"its module() to surgeon.convert"
    )


def _strings(values: Any) -> Iterator[tuple[str, str]]:
    """Strings that are evaluated or looked up when a program is loaded, with their roles."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from (("expr_str", str(v)) for k, v in value.items() if k == "expr_str")
            if {"target", "inputs", "outputs"} <= value.keys():
                yield "target of a node", str(value["target"])
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _is_plain(expression: str) -> bool:
    words = re.findall(r"(?<!['\w])[A-Za-z_]\w*(?![\w'])", expression)
    return bool(_EXPRESSION.fullmatch(expression)) and all(word in _known() or _is_symbol(word) for word in words)


def _is_symbol(word: str) -> bool:
    return re.fullmatch(r"z?[suf]+\d+", word) is not None


@cache
def _known() -> frozenset[str]:
    from torch.utils._sympy import functions

    return _WORDS | frozenset(functions.__all__)
