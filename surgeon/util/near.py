"""Hints for misspelled names."""

import difflib
import inspect
import re
import traceback
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known name most similar to the word; empty if there is none."""
    folded = {name.casefold(): name for name in reversed(list(known))}
    near = difflib.get_close_matches(str(word).casefold(), list(folded), n=1)
    return f" Did you mean {folded[near[0]]!r}?" if near else ""


def no_folder(path: str | Path) -> str:
    """`there is no folder photo`, and the most similar name of a folder that exists."""
    path, beside = Path(path), []
    with suppress(OSError):
        beside = [str(path.parent / one.name) for one in path.parent.iterdir() if one.is_dir()]
    near = did_you_mean(path, beside)
    return f"there is no folder {path}{'.' if near else ''}{near}"


def refused_argument(error: BaseException) -> str | None:
    """A message about a keyword that a function or class refused, with those that it takes; None for other errors.

    Such a `TypeError` is raised where the call is, so that what was called is a variable there.
    """
    found = re.match(r"([\w.<>]+)\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not isinstance(error, TypeError) or found is None or error.__traceback__ is None:
        return None
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    name = found[1].removesuffix(".__init__")
    variables = [
        one.func if isinstance(one, partial) else one for one in (*frame.f_locals.values(), *frame.f_globals.values())
    ]
    called = [one for one in variables if inspect.isfunction(one) or inspect.ismethod(one) or isinstance(one, type)]
    refused = next((one for one in called if getattr(one, "__qualname__", None) == name), None)
    if refused is None:
        return None
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = [key for key, one in inspect.signature(refused).parameters.items() if one.kind in by_name]
    return f"{found[0]}.{did_you_mean(found[2], taken)} It takes {', '.join(taken) or 'no arguments'}"
