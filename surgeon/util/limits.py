"""Limits of options, as classes declare them: of numbers, where `least` and `most` are allowed themselves, `above` and `below` not,
the words that an option may be, and options that are a number or a range of numbers such as "0-55".

least: ClassVar[Mapping[str, float]] = {"patch": 1}
above: ClassVar[Mapping[str, float]] = {"val_fraction": 0}
choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"predicts": ("image", "noise")}
ranges: ClassVar[tuple[str, ...]] = ("sigma",)
"""

import operator
from collections.abc import Mapping
from typing import Any

from surgeon.errors import ConfigError
from surgeon.util.near import did_you_mean
from surgeon.util.parse import number_range

CHOICES = "choices"
RANGES = "ranges"
Limits = dict[str, dict[str, float]]  # by option, then by word

WORDS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def merged(limits: Limits, word: str, more: Mapping[str, float]) -> Limits:
    """The limits with those declared under one word."""
    return limits | {name: limits.get(name, {}) | {word: limit} for name, limit in more.items()}


def limits_of(kind: type) -> Limits:
    """The limits declared by a class and its bases; a subclass overrides."""
    found: Limits = {}
    for base in reversed(kind.__mro__):
        for word in WORDS:
            found = merged(found, word, vars(base).get(word, {}))
    return found


def check_limits(shown: str, value: Any, limits: Mapping[str, float]) -> None:
    """Raise `ConfigError` for a number beyond a limit of its option (by word); `shown` is the option's name in the message."""
    if not isinstance(value, int | float) or all(WORDS[word][1](value, limit) for word, limit in limits.items()):
        return
    told = " and ".join(f"{told} {limits[word]}" for word, (told, _) in WORDS.items() if word in limits)
    raise ConfigError(f"{shown} must be {told}, got {value!r}")


def choices_of(kind: type) -> dict[str, tuple[Any, ...]]:
    """The words that options may be, declared by a class and its bases; a subclass overrides."""
    found: dict[str, tuple[Any, ...]] = {}
    for base in reversed(kind.__mro__):
        found |= vars(base).get(CHOICES, {})
    return found


def check_choice(shown: str, value: Any, known: tuple[Any, ...]) -> None:
    """Raise `ConfigError` for a value that is none of the known ones; `shown` is the option's name in the message."""
    if value not in known:
        near = did_you_mean(value, map(str, known))
        raise ConfigError(f"{shown} must be one of {', '.join(map(str, known))}, got {value!r}{'.' * bool(near)}{near}")


def ranges_of(kind: type) -> tuple[str, ...]:
    """The options that are a number or a range, declared by a class and its bases."""
    return tuple(name for base in reversed(kind.__mro__) for name in vars(base).get(RANGES, ()))


def check_range(shown: str, value: Any) -> None:
    """Raise `ConfigError` for what is no number or range of numbers; None, an option that is not given, is neither."""
    if value is not None:
        number_range(shown, value)
