"""docs/cli.md says what the parsers take: never more, never less."""

import argparse
from pathlib import Path

import pytest

import surgeon.cli
from benchmarks import manual


def test_the_page_is_what_the_parsers_say() -> None:
    assert manual.PAGE.read_text() == manual.filled(manual.PAGE.read_text()), "python -m benchmarks.manual"


def test_every_option_of_every_command_is_on_the_page() -> None:
    sections = manual.PAGE.read_text().split("\n## ")
    (commands,) = [a for a in surgeon.cli._parser()._actions if isinstance(a, argparse._SubParsersAction)]
    assert len(commands.choices) >= 19
    for name, parser in commands.choices.items():
        (section,) = [text for text in sections if text.startswith(f"{name}\n")]
        for action in parser._actions:
            for option in set(action.option_strings) - manual.COMMON - {"-h", "--help"}:
                assert option in section, (name, option)


def test_a_new_option_makes_the_page_stale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parser = surgeon.cli._parser
    page = tmp_path / "cli.md"
    page.write_text(manual.PAGE.read_text())
    monkeypatch.setattr(manual, "PAGE", page)
    assert manual.main(["--check"]) == 0

    def changed() -> argparse.ArgumentParser:
        made = parser()
        made.add_argument("--loud", nargs="+", metavar="N", help="say 100%% more")
        return made

    monkeypatch.setattr(surgeon.cli, "_parser", changed)
    assert manual.main(["--check"]) == 1
    assert manual.main([]) == 0
    assert "| `--loud N [N ...]` | say 100% more |" in page.read_text()


def test_a_page_without_the_marker_is_refused() -> None:
    with pytest.raises(SystemExit, match="has no line"):
        manual.filled("# The command line\n")


def test_pages_that_commands_link_to_exist() -> None:
    assert [page for page in manual.PAGES.values() if not (manual.PAGE.parent / page).is_file()] == []
