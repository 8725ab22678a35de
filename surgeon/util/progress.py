"""How long work tells how far it is."""

from collections.abc import Callable

OnProgress = Callable[[str, int, int], None]
"""Called with the name of a stage, what is done of it, and the total."""


def silent(stage: str, done: int, total: int) -> None:
    """Tell nobody."""
