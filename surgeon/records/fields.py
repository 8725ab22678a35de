"""Reading reports back with type checks, since a folder may be untrusted."""

import types
from typing import Any, Union, get_args, get_origin, get_type_hints

from surgeon.errors import CheckpointError
from surgeon.util.files import check_fields, told

_GEOMETRY = {
    "in_channels": int,
    "out_channels": int,
    "groups": int,
    "kernel_size": [int],
    "stride": [int],
    "dilation": [int],
}


def read_fields(kind: type, values: Any) -> dict[str, Any]:
    """The fields of a report's dataclass from JSON values; NaN and infinity become None, which displays as unknown.

    Raises `CheckpointError` for any other type mismatch.
    """
    where = f"{kind.__name__} of a report"
    check_fields(values, dict, where)
    hints = get_type_hints(kind)
    found = {}
    for name, value in values.items():
        if name not in hints:
            raise CheckpointError(f"{where} has no {told(name)}")
        kinds = _kinds(hints[name])
        if tuple in kinds and isinstance(value, list):
            value = tuple(value)
        if name == "geometry":
            value = _geometry(value)
        elif int in kinds or float in kinds:
            value = _number(value)
        elif not isinstance(value, kinds) or not all(isinstance(item, str | int) for item in _listed(value)):
            raise CheckpointError(f"{where}: {name} must be of type {kinds[0].__name__}, got {told(value)}")
        found[name] = value
    return found


def _kinds(hint: Any) -> tuple[type, ...]:
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(kind for part in get_args(hint) for kind in _kinds(part))
    return (get_origin(hint) or hint,)


def _number(value: Any) -> int | float | None:
    """Numbers that JSON lacks are stored as strings: nan, inf, -inf."""
    if value in ("nan", "inf", "-inf"):
        return float(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else ()


def _geometry(value: Any) -> Any:
    try:
        check_fields(value, _GEOMETRY, "geometry")
    except CheckpointError:
        return None
    pairs = all(len(value[key]) == 2 for key in ("kernel_size", "stride", "dilation"))
    return value if pairs else None
