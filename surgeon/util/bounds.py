"""Budgets as they are written, absolute or relative to the original. Nothing heavy is imported."""

import re
from dataclasses import dataclass

from surgeon.errors import ConfigError
from surgeon.util.parse import parse_bytes, parse_count

FLAGS = {"flops": "--max-flops", "params": "--max-params", "memory": "--max-memory", "latency": "--max-latency"}
_EXAMPLES = {"flops": "4.5G or +10%", "params": "30M or +10%", "memory": "8GiB or +10%"}
_RELATIVE = re.compile(r"\s*([+-])\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*%\s*")
_TIME = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(us|ms|s)\s*", re.IGNORECASE)
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Bound:
    """One budget: `value` in units (FLOPs per image, parameters, bytes, seconds), or as a factor of the original's."""

    text: str
    value: float
    relative: bool

    def of(self, original: float) -> float:
        """The limit, given the unmodified model's cost."""
        return original * self.value if self.relative else self.value


def parse_bound(text: str, resource: str) -> Bound:
    """A budget: `4.5G`, `8GiB`, `20ms`, or relative to the original, `+10%`, `-5%`. Raises `ConfigError`."""
    flag = FLAGS[resource]
    match = _RELATIVE.fullmatch(text)
    if match is not None:
        share = float(match[2]) / 100
        if match[1] == "-" and share >= 1:
            raise ConfigError(f"{flag}: {text!r} leaves nothing of the original; expected less than -100%")
        return Bound(text.strip(), 1 + share if match[1] == "+" else 1 - share, True)
    if "%" in text:
        raise ConfigError(f"{flag}: a budget relative to the original has a sign: +10% or -5%, got {text!r}")
    if resource == "latency":
        match = _TIME.fullmatch(text)
        if match is None or float(match[1]) <= 0:
            raise ConfigError(f"{flag}: expected a time such as 20ms, 1.5s or +10%, got {text!r}")
        return Bound(text.strip(), float(match[1]) * _UNITS[match[2].lower()], False)
    parse = parse_bytes if resource == "memory" else parse_count
    return Bound(text.strip(), float(parse(text, flag, _EXAMPLES[resource])), False)
