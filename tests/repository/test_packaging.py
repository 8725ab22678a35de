"""What installs: one top-level name, the mapped folders below it, and no import of them under their own names."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import surgeon
from tests.support.places import ROOT

MAPPED = ("layers", "search", "zoo")


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_folder_of_code_is_packaged() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["poetry"]["packages"]
    placed = {entry["include"]: entry.get("to") for entry in packages}
    assert placed == {"surgeon": None, "cli.py": "surgeon"} | dict.fromkeys(MAPPED, "surgeon")


def test_versions_agree() -> None:
    assert project()["version"] == surgeon.__version__
    assert re.search(rf"^## {re.escape(surgeon.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_license_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert project()["license"] == "Apache-2.0"
    assert "Apache License" in text.splitlines()[0] + text.splitlines()[1]
    assert "END OF TERMS AND CONDITIONS" in text


def test_every_import_is_a_declared_dependency() -> None:
    """What the product imports it depends on itself, not through what it depends on (sqlalchemy came by way of optuna)."""
    declared = [*project()["dependencies"], *project()["optional-dependencies"]["export"]]
    names = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in declared}
    brought = {"triton"}  # torch's own dependency where there are GPUs; guarded where it is imported
    files = [file for name in ("surgeon", *MAPPED) for file in (ROOT / name).rglob("*.py")] + [ROOT / "cli.py"]
    imported = {name for file in files for name in top_levels(ast.parse(file.read_text()))}
    assert {"torch", "sqlalchemy", "yaml", "huggingface_hub"} <= imported
    foreign = imported - sys.stdlib_module_names - {"surgeon", "_typeshed"} - brought
    sources = packages_distributions()
    unknown = {name for name in foreign if not names & {d.lower().replace("_", "-") for d in sources.get(name, [name])}}
    assert unknown == set()


def top_levels(tree: ast.Module) -> set[str]:
    """The first parts of all absolute imports, also those within functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_supported_pythons_are_named() -> None:
    """`requires-python` has both ends, and the classifiers list what lies between; this one is among them."""
    low, high = map(int, re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project()["requires-python"]).groups())
    classified = [re.search(r":: 3\.(\d+)$", line) for line in project()["classifiers"]]
    assert [int(match[1]) for match in classified if match] == list(range(low, high))
    assert low <= sys.version_info.minor < high


@pytest.mark.parametrize("name", MAPPED)
def test_generic_names_cannot_be_imported(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert f"import surgeon.{name}, not {name}" in done.stderr


def test_nothing_else_of_a_checkout_is_a_part_of_surgeon() -> None:
    """Tests, benchmarks and a second `surgeon` lie next to the mapped folders; they must not become importable with these."""
    code = """
from importlib.util import find_spec

names = ("layers", "search", "zoo", "cli", "costs", "tests", "benchmarks", "examples", "surgeon")
print([name for name in names if find_spec(f"surgeon.{name}")])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "['layers', 'search', 'zoo', 'cli', 'costs']\n", done.stderr


def test_no_file_imports_the_generic_names() -> None:
    pattern = re.compile(rf"^\s*(from|import) ({'|'.join(MAPPED)}|cli)\b", re.MULTILINE)
    folders = [ROOT / name for name in ("surgeon", *MAPPED, "tests", "benchmarks", "examples")]
    files = [file for folder in folders if folder.is_dir() for file in folder.rglob("*.py")] + [ROOT / "cli.py"]
    assert files
    wrong = [str(file) for file in files if pattern.search(file.read_text())]
    assert wrong == []


def test_the_lint_tree_holds_the_whole_package(tmp_path: Path) -> None:
    """mypy sees the package as it installs: every Python file of it, under its own name."""
    clone = tmp_path / "clone"
    clone.mkdir()
    for part in (".ci", "surgeon", *MAPPED, "cli.py"):
        (clone / part).symlink_to(ROOT / part)
    (clone / ".ci").unlink()
    (clone / ".ci").mkdir()
    (clone / ".ci" / "lint-tree").write_text((ROOT / ".ci" / "lint-tree").read_text())
    subprocess.run(["bash", str(clone / ".ci" / "lint-tree")], check=True)
    tree = clone / ".lint" / "surgeon"
    own = {path.name for path in (ROOT / "surgeon").iterdir() if path.name != "__pycache__"}
    assert {path.name for path in tree.iterdir()} == own | {"cli.py", *MAPPED}
    assert (tree / "passes" / "convert.py").is_file()
    assert (tree / "layers" / "base.py").is_file()


def test_the_wheel_holds_the_training_recipes(tmp_path: Path) -> None:
    """Data files install with the code: built by the project's own backend, in a copy."""
    pytest.importorskip("poetry.core.masonry.api", reason="poetry-core is not installed here")
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "zoo", copy / "zoo", ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("surgeon", "layers", "search"):
        (copy / part).mkdir()
        shutil.copy(ROOT / part / "__init__.py", copy / part)
    for file in ("pyproject.toml", "README.md", "LICENSE", "cli.py"):
        shutil.copy(ROOT / file, copy)
    code = f"from poetry.core.masonry import api; print(api.build_wheel({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    inside = set(zipfile.ZipFile(tmp_path / done.stdout.strip().splitlines()[-1]).namelist())
    recipes = {f"surgeon/zoo/recipes/{path.name}" for path in (ROOT / "zoo" / "recipes").iterdir() if path.is_file()}
    assert len(recipes) > 10
    assert recipes <= inside


@pytest.mark.parametrize("script", [".ci/run", ".ci/lint-tree"])
def test_scripts_are_sound_shell(script: str) -> None:
    text = (ROOT / script).read_text()
    assert text.splitlines()[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in text
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_ci_stops_at_the_first_failure(tmp_path: Path) -> None:
    """A shell overlooks what fails in the middle of `a && b && c`; the CI run must not."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text())
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "python3").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(tmp_path / ".ci" / "run")], env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 3
    assert "== style" not in done.stdout
