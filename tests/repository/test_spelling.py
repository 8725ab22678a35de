"""American spelling everywhere: names, docstrings, messages, docs; no translated English in docstrings and `--help`."""

import ast
import re
from collections.abc import Iterator
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


# What a native engineer writes instead: a noun phrase; reports, prints; continues; if; this many, at most N; additional;
# regardless of; again; at initialization; counterpart; predicts; unavailable; instead of; session; percent; per step.
TRANSLATED = re.compile(
    r"\AWhat\b(?!.*\?)|\A(?:Of|That of|Those of|As of) |\b(?:is|are) (?:said|told)\b|\bto be (?:said|had)\b|\bcan(?:not)? be had\b"
    r"|\b(?:go|goes|gone|going) on with\b|\btak(?:e|es|en) up again\b|\bNone where\b|\bso many\b(?! that\b)|\bat most so\b"
    r"|\b(?:may|must) lie\b|\blies? (?:beside|elsewhere)\b|\bbeside (?:it\b|--|the (?:original|unmodified|model))"
    r"|\bfurther (?:options|layers|seeds|names|sizes|elements|ones)\b|\bwhatever (?:the|its)\b|, whatever\b|\banew\b|\bat birth\b"
    r"|\b(?:convolutional|plain) twins?\b|\bforetell|\bin the place of\b|\bsittings?\b|\bper cent\b|\b(?:that|which) are none\b"
    r"|\b(?:[Ff]or|to) people\b|\b(?:samples|images|steps|kernels|bits|seconds) an? (?:step|pixel|channel|trial|batch|image|run)\b"
)


def docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def test_the_word_list() -> None:
    bad = (
        "What a layer gives.",
        "Of the values.",
        "None where there is none.",
        "train for so many steps",
        "samples a step",
    )
    good = (
        "What can be replaced?",
        "so many that",
        "None if there is none.",
        "samples per step",
        "lies between",
        "further kernels",
    )
    assert all(TRANSLATED.search(text) for text in bad)
    assert not any(TRANSLATED.search(text) for text in good)


def test_native_english(root: Path) -> None:
    files = [
        root / "cli.py",
        *(f for room in ("surgeon", "layers", "search", "zoo") for f in (root / room).rglob("*.py")),
    ]
    texts = [(file, text) for file in files for text in docstrings(file.read_text())]
    texts.append((root / "docs" / "cli.md", (root / "docs" / "cli.md").read_text()))  # every --help
    found = [
        f"{file.relative_to(root)}: {m[0]!r} in {text[:60]!r}"
        for file, text in texts
        for m in TRANSLATED.finditer(text)
    ]
    assert len(texts) > 1500
    assert not found, "\n".join(found)
