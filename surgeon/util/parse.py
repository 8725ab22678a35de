"""Parsing and formatting human-readable quantities: `4.5G`, `8GiB`, `224x320`, `1.5h`, `5%`."""

import re
from typing import Any

from surgeon.errors import ConfigError

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_MOST = 1e24
_LEAST_BYTES = 2**20  # of memory without a unit
_LEAST_COUNT = 1000  # of FLOPs and parameters without a unit
_SPAN = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(|ep|%)")
_TIME = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([smhd]?)")
_NUMBER = r"(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)"
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_QUANTITY = re.compile(
    r"\s*([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?|\.[0-9]+)\s*([kmgt]?i?)(b|flops?|macs?)?\s*", re.IGNORECASE
)


def parse_quantity(value: str | int | float, what: str = "quantity", such: str = "4.5G or 8GiB") -> int:
    """A count or a number of bytes: `4.5G` is 4.5e9, `8GiB` 8·2³⁰, `512MB` 512e6; plain numbers are unchanged.

    A letter alone and `…B` count in powers of ten, `…i` and `…iB` in powers of two. Raises `ConfigError` for anything else,
    for negative numbers and for zero, with `such` as an example of what is expected.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"{what}: expected a number such as {such}, got {value!r}")
    match = _QUANTITY.fullmatch(str(value))
    if match is None:
        raise ConfigError(f"{what}: cannot read {value!r} as a number; expected e.g. {such}{_hint(str(value))}")
    number, prefix = float(match[1]), match[2].lower()
    if prefix == "i":
        raise ConfigError(f"{what}: cannot read {value!r} as a number; expected e.g. {such}")
    if number > _MOST:
        raise ConfigError(f"{what}: {value!r} is more than any machine has")
    result = round(number * (_BINARY | _DECIMAL)[prefix])
    if result < 1:
        raise ConfigError(f"{what}: must be positive, got {value!r}")
    return result


def parse_bytes(value: str | int | float, what: str = "quantity", such: str = "8GiB") -> int:
    """A number of bytes as of `parse_quantity`.

    Raises `ConfigError` also for a small number without a unit: `8` is meant as 8GiB.
    """
    result = parse_quantity(value, what, such)
    if result < _LEAST_BYTES and not str(value).strip()[-1].isalpha():
        unit = "GiB" if result < 256 else "MiB"
        raise ConfigError(
            f"{what}: {value!r} would be {result} byte{'s' * (result != 1)}; for {result}{unit}, write the unit"
        )
    return result


def parse_count(value: str | int | float, what: str = "quantity", such: str = "4.5G") -> int:
    """A count as of `parse_quantity`.

    Raises `ConfigError` also for units of bytes, `200MB`, and for a small number without a unit: `50` is meant as 50M.
    """
    if str(value).strip().lower().endswith(("b", "i")):
        raise ConfigError(f"{what}: {value!r} is a number of bytes; expected e.g. {such}")
    result = parse_quantity(value, what, such)
    if result < _LEAST_COUNT and not str(value).strip()[-1].isalpha():
        raise ConfigError(f"{what}: {value!r} would be only {result}; for {result}M, write the unit")
    return result


def _hint(text: str) -> str:
    if "," in text and _QUANTITY.fullmatch(text.replace(",", ".", 1)):
        return f" (write a decimal point: {text.replace(',', '.', 1)})"
    return ""


def parse_input_size(value: Any) -> tuple[int, ...]:
    """Size of one image: `224`, `224x320`, `3x224x320` or a sequence of one to three integers; returned as given, 1 to 3 long.

    Raises `ConfigError` for anything else.
    """
    parts: list[Any]
    if isinstance(value, str):
        parts = re.split(r"[x×,\s]+", value.strip().lower())
    else:
        parts = list(value) if isinstance(value, list | tuple) else [value]
    sizes = [int(p) for p in parts if _is_size(p)]
    if len(sizes) != len(parts) or not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        raise ConfigError(f"input size: expected e.g. 224, 224x320 or 3x224x320 (positive integers), got {value!r}")
    return tuple(sizes)


def _is_size(part: Any) -> bool:
    if isinstance(part, str):
        return part.isdecimal()
    return isinstance(part, int) and not isinstance(part, bool)


def parse_span(text: str, what: str = "span") -> tuple[float, str]:
    """(number, unit): the unit is "" for optimizer steps, "ep" for epochs, "%" of the run. Raises `ConfigError`."""
    match = _SPAN.fullmatch(str(text).strip())
    if match is None or (not match[2] and not float(match[1]).is_integer()):
        raise ConfigError(f"{what}: expected steps (200), epochs (1.5ep) or a percentage of the run (5%), got {text!r}")
    if match[2] == "%" and float(match[1]) > 100:
        raise ConfigError(f"{what}: at most 100% of the run, got {text!r}")
    return float(match[1]), match[2]


def parse_time(text: str | float, what: str = "time") -> float:
    """Seconds of "45s", "30m", "1.5h", "2d", or of a number; text has a unit. Raises `ConfigError`."""
    match = _TIME.fullmatch(str(text).strip())
    if match is not None and isinstance(text, str) and not match[2]:
        raise ConfigError(f"{what}: {text!r} has no unit: write {match[1]}s or {match[1]}m")
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"{what}: expected a time such as 90s, 30m or 1.5h, got {text!r}")
    return float(match[1]) * _SECONDS[match[2]]


def number_range(name: str, value: float | str) -> tuple[float, float]:
    """(low, high) of a number or of a string such as "0-55"; raises `ConfigError`."""
    match = re.fullmatch(rf"{_NUMBER}(?:\s*-\s*{_NUMBER})?", str(value).strip())
    low, high = (float(match[1]), float(match[2] or match[1])) if match else (1.0, 0.0)
    if low > high:
        raise ConfigError(f"{name} must be a number of at least 0, or a range such as 0-55, got {value!r}")
    return low, high


def mebibytes(count: float) -> str:
    """Bytes in MiB with one decimal."""
    return f"{count / 2**20:,.1f} MiB"
