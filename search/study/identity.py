"""The JSON identity that a study is bound to, and differences between identities."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

VERSION = 2  # 1: trials without parameters


def as_stored(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity after a round trip through a study."""
    found: dict[str, Any] = json.loads(json.dumps({"version": VERSION, **identity}))
    return found


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Differences between two JSON values, in words. What a user wrote ("text") stands for what was read from it."""
    if isinstance(old, dict) and isinstance(new, dict):
        if "text" in old and "text" in new and old["text"] != new["text"]:
            old, new = old["text"], new["text"]
            yield f"{where} is {_short(old)} in the study and {_short(new)} here"
            return
        for key in [*old, *(key for key in new if key not in old)]:
            inner = f"{where}.{key}" if where else str(key)
            if key not in old or key not in new:
                yield f"{inner} ({_short(new.get(key, old.get(key)))}) is only in {'this search' if key in new else 'the study'}"
            else:
                yield from differences(old[key], new[key], inner)
    elif isinstance(old, list) and isinstance(new, list) and all(isinstance(x, str) for x in [*old, *new]):
        gone, come = [x for x in old if x not in new], [x for x in new if x not in old]
        if gone or come or old != new:
            parts = [f"without {', '.join(gone)}"] if gone else []
            parts += [f"with {', '.join(come)}"] if come else []
            yield f"{where} {' and '.join(parts) or 'in another order'}"
    elif old != new:
        yield f"{where} is {_short(old)} in the study and {_short(new)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
