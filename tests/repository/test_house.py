"""The rooms of the house: which folder may use which, how many files one holds, no loops of files, one name for one class."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.support.places import ROOT

FOLDERS = ("surgeon", "layers", "search", "zoo")
MOST_FILES = 20
TYPES = {"acda", "pafu", "sekg"}
CLASSES = {f"{kind.upper()}{what}" for kind in TYPES for what in ("Conv2d", "Config")}

CORE = "errors util"
ARROWS = {
    # What each room may import, besides itself. A room is a folder, or a file that lies beside folders.
    "surgeon": "*",  # the public names, under TYPE_CHECKING
    "surgeon.__main__": "cli",
    "surgeon.errors": "",
    "surgeon.util": "errors",
    "surgeon.records": f"{CORE} layers surgeon",
    "surgeon.sites": f"{CORE} layers records",
    "surgeon.surgery": f"{CORE} layers records sites",
    "surgeon.passes": f"{CORE} layers records surgery",
    "surgeon.costs": f"{CORE} layers records sites surgery surgeon",
    "surgeon.collapsing": f"{CORE} layers records sites surgery costs",
    "surgeon.exporting": f"{CORE} layers records sites surgery",
    "surgeon.visualize": f"{CORE} layers layers.acda sites surgery collapsing",
    "surgeon.models": f"{CORE} layers records sites surgery surgeon",
    "surgeon.doctor": f"{CORE} layers layers.ops layers.ops.native surgery surgeon",
    "surgeon.commands": "*",
    "surgeon.commands.search": "*",
    "surgeon.cli": "*",
    "surgeon.layers": f"{CORE} layers.acda layers.ops layers.pafu layers.sekg",
    "surgeon.layers.acda": f"{CORE} layers layers.ops layers.ops.native layers.ops.triton",
    "surgeon.layers.pafu": f"{CORE} layers layers.ops layers.ops.native layers.ops.triton",
    "surgeon.layers.sekg": f"{CORE} layers layers.ops layers.ops.native layers.ops.triton",
    "surgeon.layers.ops": f"{CORE} layers",  # layers: the geometry
    "surgeon.layers.ops.native": f"{CORE} layers.ops",
    "surgeon.layers.ops.triton": f"{CORE} layers.ops",
    "surgeon.search": "search.budget search.gate search.sampling search.space",
    "surgeon.search.placement": CORE,
    "surgeon.search.space": f"{CORE} layers records sites surgery costs search.placement",
    "surgeon.search.budget": f"{CORE} costs search.placement",
    "surgeon.search.gate": f"{CORE} layers sites surgery costs search.placement search.space search.budget",
    "surgeon.search.study": f"{CORE} costs search.budget search.gate search.space",
    "surgeon.search.evaluate": f"{CORE} records models surgery zoo.finetune zoo.tasks zoo.tasks.data "
    "search.gate search.placement search.space search.study",
    "surgeon.search.gains": f"{CORE} layers surgery zoo zoo.finetune zoo.tasks search.evaluate search.placement search.space",
    "surgeon.search.sampling": f"{CORE} costs search.gains search.gate search.placement search.space",
    "surgeon.search.run": f"{CORE} search.evaluate search.gains search.gate search.placement search.sampling search.space "
    "search.study",
    "surgeon.search.results": f"{CORE} zoo.trial search.evaluate search.gains search.study",
    "surgeon.zoo": f"{CORE} layers layers.sekg records models surgery costs visualize zoo.networks zoo.recipes "
    "zoo.tasks zoo.tasks.data",
    "surgeon.zoo.networks": f"{CORE} layers.sekg records zoo",
    "surgeon.zoo.recipes": f"{CORE} layers records models zoo zoo.finetune zoo.tasks",
    "surgeon.zoo.tasks": f"{CORE} layers records zoo zoo.networks zoo.tasks.data zoo.tasks.support",
    "surgeon.zoo.tasks.data": f"{CORE} models sites zoo.tasks",
    "surgeon.zoo.tasks.support": f"{CORE} layers zoo.tasks zoo.tasks.data",
    "surgeon.zoo.finetune": f"{CORE} layers records models surgery costs visualize zoo zoo.tasks zoo.tasks.data",
    "surgeon.zoo.trial": f"{CORE} layers records models surgery costs visualize zoo zoo.finetune zoo.tasks zoo.tasks.data",
}

LAZY_LIBRARIES = {
    # Libraries that are imported where they are needed, each with its reason. Commands import everything there: help loads nothing.
    "PIL": "`surgeon doctor` and costs run without pictures",
    "accelerate": "takes a second to import",
    "fcntl": "not on Windows",
    "huggingface_hub": "takes a second to import",
    "matplotlib": "takes a second to import",
    "onnx": "an extra",
    "onnxruntime": "an extra",
    "onnxscript": "an extra",
    "scipy": "only some tasks need it",
    "timm": "takes seconds to import",
    "torch": "what reads recipes and files runs without it",
    "torchmetrics": "takes seconds to import",
    "torchvision": "takes seconds to import",
    "tqdm": "only a long wait shows it",
    "yaml": "only descriptions in files need it",
}
BACK = {
    # Imports within functions that close a loop of files, each with its reason. Without them there is no loop.
    ("surgeon.layers.registry", "surgeon.layers"): "at the first question it imports the whole folder",
    ("surgeon.zoo.tasks.registry", "surgeon.zoo.tasks"): "at the first question it imports the whole folder",
    ("surgeon.models.names", "surgeon.models.checkpoint"): "a folder names a model, and has a base with a name",
    ("surgeon.models.names", "surgeon.models.hub"): "a folder of the Hub names a model",
    ("surgeon.commands.search.jobs", "surgeon.commands.search.search"): "a worker runs the command that started it",
}


def name_of(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "surgeon" else ["surgeon", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def files() -> dict[str, Path]:
    """Module name -> file, of the whole product."""
    found = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")] + [ROOT / "cli.py"]
    return {name_of(file): file for file in found}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(files()[module].read_text(encoding="utf-8"))


@cache
def imports(module: str) -> dict[str, bool]:
    """Modules of the product that this one imports, wherever -> whether only for annotations."""
    found: dict[str, bool] = {}
    guards = [node for node in tree(module).body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    annotations = {id(node) for guard in guards for node in ast.walk(guard)}
    for node in ast.walk(tree(module)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in files() else str(node.module) for name in whole]
        for name in set(names) & files().keys() - {module}:
            found[name] = found.get(name, True) and id(node) in annotations
    return found


def room_of(module: str) -> str:
    """The longest name in the table that this module is or lies in."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next(name for name in names if name in ARROWS)


def test_every_file_has_a_room() -> None:
    """What lies in surgeon/ or search/ itself is named in the table; the other folders are rooms with all that is in them."""
    beside = [name for name in files() if name.rpartition(".")[0] in ("surgeon", "surgeon.search")]
    assert [name for name in beside if name not in ARROWS] == []


@pytest.mark.parametrize("room", ARROWS)
def test_a_room_uses_only_what_the_table_allows(room: str) -> None:
    assert any(room_of(module) == room for module in files()), "the table names a room that is not there"
    allowed = {room} | {name if name == "surgeon" else f"surgeon.{name}" for name in ARROWS[room].split()}
    used = {
        f"{module} -> {target}"
        for module in files()
        if room_of(module) == room and ARROWS[room] != "*"
        for target in imports(module)
        if room_of(target) not in allowed
    }
    assert used == set()


def test_nothing_uses_the_commands() -> None:
    """Commands are the top floor: only the command line, and other commands, import them."""
    above = {"surgeon.cli", "surgeon.commands", "surgeon.commands.search"}
    floor = above - {"surgeon.cli"}
    users = {m for m in files() for target in imports(m) if room_of(target) in floor}
    assert {m for m in users if room_of(m) not in above} == set()


def constants(module: str) -> set[str]:
    """Strings of a module, docstrings aside."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree(module)) if isinstance(node, owners)]
    docstrings = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
    strings = (
        node for node in ast.walk(tree(module)) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return {node.value for node in strings if id(node) not in docstrings}


def names(module: str) -> set[str]:
    """Names and attributes that the code of a module reads or imports."""
    nodes = list(ast.walk(tree(module)))
    found = {node.id for node in nodes if isinstance(node, ast.Name)}
    found |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return found | {node.name for node in nodes if isinstance(node, ast.alias)}


def test_only_their_own_rooms_name_the_layer_types() -> None:
    """What the others need to know of a type is an attribute or a method of its class or config."""
    rooms = ("surgeon.layers", "surgeon.visualize", "surgeon.zoo.networks")
    others = [module for module in files() if not f"{module}.".startswith(tuple(f"{room}." for room in rooms))]
    assert {module: named for module in others if (named := constants(module) & TYPES)} == {}
    assert {module: named for module in others if (named := names(module) & CLASSES)} == {}


def test_no_loop_of_files() -> None:
    graph = {
        module: {t for t, typing in imports(module).items() if not typing and (module, t) not in BACK}
        for module in files()
    }
    while ends := [module for module, targets in graph.items() if not targets]:  # what imports nothing is in no loop
        for module in ends:
            del graph[module]
        graph = {module: targets & graph.keys() for module, targets in graph.items()}
    assert graph == {}, "these files import each other, or files that do"


def test_a_lazy_import_states_its_reason() -> None:
    """Within functions, outside commands: by the tables above, or by a comment on its line."""
    unexplained, used = [], set()
    for module, file in files().items():
        if module.startswith(("surgeon.commands", "surgeon.cli")):
            continue
        lines = file.read_text(encoding="utf-8").splitlines()
        functions = [node for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef)]
        for node in (node for function in functions for node in ast.walk(function)):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            name = node.names[0].name if isinstance(node, ast.Import) else str(node.module)
            library = name.partition(".")[0]
            used.add(library)
            if library not in LAZY_LIBRARIES and (module, name) not in BACK and "  # " not in lines[node.lineno - 1]:
                unexplained.append(f"{module}:{node.lineno} {name}")
    assert unexplained == []
    assert LAZY_LIBRARIES.keys() - used == set()


def test_the_exceptions_are_needed() -> None:
    assert {pair for pair in BACK if pair[1] not in imports(pair[0])} == set()


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_a_folder_can_be_seen_at_once(folder: str) -> None:
    paths = (ROOT / folder, *(ROOT / folder).rglob("*"))
    folders = [path for path in paths if path.is_dir() and path.name != "__pycache__"]
    sizes = {str(path.relative_to(ROOT)): sum(f.is_file() for f in path.iterdir()) for path in folders}
    assert {path: size for path, size in sizes.items() if size > MOST_FILES} == {}


def test_what_tests_share_is_in_support() -> None:
    """No test module is a library: none is imported, nor named for an import."""
    named = re.compile(r"tests\.(\w+\.)*test_\w+(:\w+)?")
    found = {}
    for file in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names = [node.value]
            found |= {(file.name, name): node.lineno for name in names if named.fullmatch(name)}
    assert found == {}


def test_tests_lie_in_folders() -> None:
    """What lies in tests/ itself is for all tests."""
    assert [file.name for file in (ROOT / "tests").glob("*.py")] == ["conftest.py"]


def test_public_classes_have_names_of_their_own() -> None:
    classes = [
        node.name
        for module in files()
        for node in tree(module).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert {name for name, count in Counter(classes).items() if count > 1} == set()
