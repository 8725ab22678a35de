"""Outputs of an exported model: their names, and checks for values that no file can store."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import GetAttrKey, MappingKey, SequenceKey, tree_flatten_with_path

from surgeon.errors import ExportError
from surgeon.util.files import told


def prepared(model: nn.Module, output: Any, format: str) -> nn.Module:
    """The model in exportable form: named tuples, whose class is unknown to the file's reader, become dictionaries.

    Raises `ExportError` for an output without tensors, and for values that the format cannot store.
    """
    leaves = tree_flatten_with_path(output)[0]
    kinds = (Tensor, type(None)) if format == "onnx" else (Tensor, int, float, type(None))
    for path, leaf in leaves:
        if not isinstance(leaf, kinds):
            where = f" at {_name(path)}" if path else ""
            raise ExportError(
                f"{type(model).__name__} returns {told(leaf)} ({type(leaf).__name__}){where}: "
                f"a file of format {format} can store only tensors{'' if format == 'onnx' else ' and numbers'}"
            )
    if not any(isinstance(leaf, Tensor) for _, leaf in leaves):
        raise ExportError(f"{type(model).__name__} returns no tensor but {told(output)}: there is nothing to export")
    return _AsDictionaries(model) if format == "torch" and _has_named_tuple(output) else model


def output_names(model: nn.Module, output: Any, alone: str | None = None) -> list[str] | None:
    """Names of the tensors in order, from keys, fields and positions (`aux.0`), or `alone` for one without any.

    None if there are no keys or fields. An underscore is appended to a name that a parameter or a buffer already has.
    """
    paths = [path for path, leaf in tree_flatten_with_path(output)[0] if isinstance(leaf, Tensor)]
    named = any(isinstance(key, MappingKey | GetAttrKey) for path in paths for key in path)
    if not named and (alone is None or len(paths) > 1):
        return None
    names: list[str] = []
    for path in paths:
        name = _name(path) if named else str(alone)
        while name in names or name in _held(model):
            name += "_"
        names.append(name)
    return names


def input_name(model: nn.Module, outputs: Iterable[str]) -> str:
    """ "images", or another name if a parameter, a buffer or an output already has that one."""
    taken = _held(model) | set(outputs)
    candidates = ["images", "input", *(f"images_{number}" for number in range(len(taken) + 1))]
    return next(name for name in candidates if name not in taken)


def _held(model: nn.Module) -> set[str]:
    return {name for name, _ in (*model.named_parameters(), *model.named_buffers())}


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(
        str(key.idx if isinstance(key, SequenceKey) else key.key if isinstance(key, MappingKey) else key.name)
        for key in path
    )


def _is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def _has_named_tuple(value: Any) -> bool:
    if _is_named_tuple(value):
        return True
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(map(_has_named_tuple, items))


def _as_dictionaries(value: Any) -> Any:
    if _is_named_tuple(value):
        return {name: _as_dictionaries(getattr(value, name)) for name in value._fields}
    if isinstance(value, Mapping):
        return {key: _as_dictionaries(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_as_dictionaries, value))
    return value


class _AsDictionaries(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, images: Tensor) -> Any:
        return _as_dictionaries(self.model(images))
