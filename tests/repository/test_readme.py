"""What the documents show is true: code runs, commands parse, links lead somewhere, and CI runs the README's own command."""

import re
import runpy
import shlex
from pathlib import Path
from textwrap import dedent
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage

import surgeon.cli
from surgeon.records.recipe import Recipe
from surgeon.search.study.journal import StudyJournal
from tests.support.places import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAIN_JOB = (
    "python3 -m venv .venv && .venv/bin/pip install -e . && "
    ".venv/bin/surgeon convert resnet50 --layers stage3,stage4 --type acda"
)
TESTS = 'python3 -m venv .venv && .venv/bin/pip install -e ".[dev]" && .venv/bin/python -m pytest'


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)


def test_two_commands_do_all_the_set_up() -> None:
    assert [block.strip() for block in blocks(ROOT / "README.md", "sh")] == [MAIN_JOB, TESTS]


def test_ci_runs_the_very_test_command_of_the_readme() -> None:
    assert TESTS in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_python_of_the_readme_is_short() -> None:
    (block,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in block.splitlines() if line]) <= 8


def test_the_figure_of_the_readme_is_one_of_the_measured_ones() -> None:
    figures = re.findall(r"[+−-]\d+\.\d+ ± \d+\.\d+", (ROOT / "README.md").read_text())
    assert len(figures) == 1
    assert figures[0] in (ROOT / "docs" / "gains.md").read_text()


def commands() -> list[str]:
    found = set()
    for document in DOCUMENTS:
        text = document.read_text()
        found |= set(re.findall(r"`(surgeon [a-z]+ [^`\n]+)`", text))
        found |= {
            line[line.index("surgeon") :] for line in text.splitlines() if re.match(r"(\S*/)?surgeon [a-z]+ ", line)
        }
    return sorted(command for command in found if "MODEL" not in command and "surgeon gives" not in command)


@pytest.mark.parametrize("command", commands())
def test_every_command_in_the_documents_parses(command: str) -> None:
    args = surgeon.cli._parser().parse_args(shlex.split(command)[1:])
    assert args.command == shlex.split(command)[1]


def test_the_documents_show_commands() -> None:
    assert len(commands()) >= 5


@pytest.mark.parametrize("document", ["README.md", "docs/converting.md"])
def test_the_python_of_the_readme_runs(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(ROOT / document, "python")
    scope: dict[str, Any] = {}
    exec(compile(block, document, "exec"), scope)
    assert scope["report"].max_rel_error <= 1e-5
    assert (tmp_path / "runs" / "mine" / "recipe.json").is_file()


def test_the_recipe_of_the_documents_is_valid() -> None:
    (block,) = blocks(ROOT / "docs" / "recipes.md", "json")
    assert len(Recipe.from_json(block).rules) == 3


def test_the_options_of_the_documents_are_the_layers_options() -> None:
    from dataclasses import fields

    from surgeon.layers.registry import layer_class, layer_types

    table: dict[str, set[str]] = {}
    kind = ""
    for line in (ROOT / "docs" / "recipes.md").read_text().splitlines():
        found = re.match(r"\| (?:`(\w+)`)? ?\| `(\w+)` \|", line)
        if found:
            kind = found[1] or kind
            table.setdefault(kind, set()).add(found[2])
    assert table == {name: {field.name for field in fields(layer_class(name).Config)} for name in layer_types()}


def test_the_selections_of_the_documents_are_understood() -> None:
    from surgeon.sites.select import parse_item, split_items

    (block,) = [b for b in blocks(ROOT / "docs" / "selecting.md", "text") if "stage3" in b]
    for line in block.splitlines():
        for item in split_items(line.split("  ")[0]):
            parse_item(item)


def test_the_python_of_the_search_docs_runs() -> None:
    _, block = blocks(ROOT / "docs" / "search.md", "python")
    assert len(block.strip().split("\n")) - block.count("\n\n") <= 13
    space: dict[str, object] = {}
    exec(compile(block, "docs/search.md", "exec"), space)
    study = space["study"]
    assert len(study.trials) == 12
    assert study.best_value == max(sum(kind in ("acda", "pafu") for kind in t.params.values()) for t in study.trials)


def test_the_study_of_a_folder_opens_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "runs" / "search" / "study.jsonl"
    path.parent.mkdir(parents=True)
    optuna.create_study(storage=JournalStorage(StudyJournal(path)), direction="maximize").optimize(
        lambda trial: trial.suggest_float("x", 0, 1), n_trials=2
    )
    block, _ = blocks(ROOT / "docs" / "search.md", "python")
    space: dict[str, Any] = {}
    exec(compile(block, "docs/search.md", "exec"), space)
    assert len(space["study"].trials) == 2


def test_the_optimizer_of_the_fine_tuning_page_runs() -> None:
    text = (ROOT / "docs" / "finetuning.md").read_text()
    (block,) = re.findall(r"^  ```python\n(.*?)^  ```$", text, re.MULTILINE | re.DOTALL)
    space: dict[str, Any] = {}
    exec(compile(dedent(block), "docs/finetuning.md", "exec"), space)
    assert {group["role"] for group in space["optimizer"].param_groups} == {"new", "other"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target


def anchors(document: Path) -> set[str]:
    """What GitHub makes of a document's headings."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_headings(document: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", document.read_text()):
        assert anchor in anchors((document.parent / target) if target else document), f"{target}#{anchor}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = re.findall(r"\]\((docs/[^)#]+\.md)", (ROOT / "README.md").read_text())
    assert {f"docs/{path.name}" for path in DOCUMENTS[1:]} == set(linked)


@pytest.mark.parametrize("name", ["convert_timm", "mixed_recipe", "own_objective"])
def test_examples_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]("test_resnet")
    out = capsys.readouterr().out
    assert "layer4.0.conv2" in out


@pytest.mark.slow
def test_the_output_in_the_readme_is_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the errors' digits and the time, which depend on the machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    assert (
        surgeon.cli.main(["convert", "resnet50", "--layers", "stage3,stage4", "--type", "acda", "--weights", "random"])
        == 0
    )
    (shown,) = blocks(ROOT / "README.md", "text")
    unstable = re.compile(r"\d\.\de-\d\d|^time .*$", re.MULTILINE)
    assert unstable.sub("~", capsys.readouterr().out) == unstable.sub("~", shown)
