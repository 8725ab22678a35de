"""American spelling everywhere: names, docstrings, messages, docs."""

import re
from pathlib import Path

SUFFIXES = (".py", ".md", ".toml", ".c", ".h")
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


def test_american_spelling(root: Path) -> None:
    named = ("README.md", "CHANGELOG.md", "pyproject.toml", "cli.py")
    folders = ("surgeon", "layers", "search", "zoo", "tests", "benchmarks", "examples", "docs")
    files = [root / name for name in named]
    files += [file for folder in folders for file in (root / folder).rglob("*") if file.suffix in SUFFIXES]
    found = {
        f"{file.relative_to(root)}:{number}: {word}"
        for file in files
        if file != Path(__file__) and file.is_file()
        for number, line in enumerate(file.read_text().splitlines(), 1)
        for word in british(line)
    }
    assert len(files) > 400
    assert not found, "\n".join(sorted(found))
