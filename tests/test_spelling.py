"""American spelling everywhere: names, docstrings, messages, docs."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BRITISH = re.compile(
    r"\w*(?:olour|ehaviour|[cC]entred?\b|[cC]entre[s_]|[gG]rey|eighbour|[lL]abell(?:ed|ing|er)|earnt\b|udgement|[fF]avour|[lL]icence"
    r"|(?:ormal|nitial|ptim|inim|axim|egular|ecogn|tandard|uant|arametr|erial|isual|ummar|rgan|eneral|ynchron|ustom)is(?:e|i|ation))\w*"
)


def british(text: str) -> list[str]:
    return [match.group() for match in BRITISH.finditer(text)]


def test_the_pattern() -> None:
    assert british("colour centred initialise labelled learnt normalisation") == [
        *("colour", "centred", "initialise", "labelled", "learnt", "normalisation")
    ]
    assert british("color center optimistic formalism gray neighbor learned this entered generalist") == []


def test_american_spelling() -> None:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "*.py", "*.md", "*.toml", "*.c", "*.h"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout: nothing says which files are the project's")
    found = {
        f"{name}:{number}: {word}"
        for name in listed
        if name != "tests/test_spelling.py" and (ROOT / name).is_file()
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1)
        for word in british(line)
    }
    assert not found, "\n".join(sorted(found))
