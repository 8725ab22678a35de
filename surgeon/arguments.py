"""Values on the command line that several commands take. Nothing heavy is imported."""

import argparse
import json
from typing import Any


def assignment(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value as JSON where it is that, otherwise as text; an argparse type."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def positive(text: str) -> int:
    """An integer of at least 1; an argparse type."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value
