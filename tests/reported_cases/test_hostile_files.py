"""Searches, recipes and journals of strangers: nothing outside them is read or written, and what is wrong is one error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surgeon.cli import main
from surgeon.search.study.folder import SearchFolder, space_values
from surgeon.search.study.journal import StudyError, is_alive
from tests.support.json_files import change_json, write_json
from tests.support.search.toys import toy_search, toy_space

Capture = pytest.CaptureFixture[str]
SECRET = "-----BEGIN PRIVATE KEY-----"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished toy search, with a best model and finals that are folders with a recipe alone."""
    path = tmp_path_factory.mktemp("finished")
    search = toy_search(path / "study.jsonl", trials=3)
    search.open()
    search.run()
    best = max((one for one in search.file.records() if one.placement and one.values), key=lambda one: one.values or ())
    about = {
        "format": "surgeon-search",
        "version": 1,
        "model": {"name": "toy"},
        "task": {"name": "toy", "primary": "value", "higher_is_better": True},
        "budgets": "none",
        "limits": {"flops": None},
        "original": {"flops": 10**7, "params": 10**7, "memory": 1},
        "space": space_values(toy_space()),
        "sampler": "posterior",
        "seed": 0,
        "steps": 1,
        "trials": 3,
        "gains": "toy",
    }
    placement = dict(best.placement)
    arm = {"role": "found", "hash": best.hash, "placement": placement, "values": [9.0], "trial": 1, "why_not": None}
    kept = {"hash": best.hash, "value": 9.0, "placement": placement}
    write_json(path / "search.json", about)
    write_json(path / "best" / "best.json", kept)
    write_json(path / "finals" / "finals.json", {"steps": 1, "seeds": 1, "arms": [arm]})
    for folder in (path / "best" / str(best.hash), path / "finals" / f"{best.hash}-rung2-seed0"):
        write_json(folder / "recipe.json", {"of": folder.parent.name})
    return path


@pytest.fixture
def folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it in the current folder, and beside that a secret."""
    import shutil

    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "id_rsa").write_text(SECRET)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "s")
    return tmp_path / "s"


def _fails(argv: list[str], words: str, capsys: Capture, code: int = 2) -> None:
    assert main([argv[0], "--quiet", *argv[1:]]) == code
    out, error = capsys.readouterr()
    assert out == ""
    assert len(error.splitlines()) == 1, error
    assert words in error


def test_an_export_takes_the_final_run_of_the_most_steps(folder: Path, capsys: Capture) -> None:
    """R1: the names that a search itself writes still lead to its folders, rung 10 after rung 2."""
    key = json.loads((folder / "finals" / "finals.json").read_text())["arms"][0]["hash"]
    write_json(folder / "finals" / f"{key}-rung10-seed0" / "recipe.json", {"of": "rung 10"})
    assert main(["study", "export", "s", "-o", "out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stage"] == "finals"
    assert json.loads(Path("out/recipe.json").read_text()) == {"of": "rung 10"}


NAMES = ["../../secret", "/etc", "..", ".", "", "a/b", "a\0b", 3, None, ["x"]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", ["best", "finals"])
def test_paths_in_a_search_lead_nowhere(which: str, name: Any, folder: Path, capsys: Capture) -> None:
    """R1: the best run, and that of the finals, are named by a path out of the folder."""
    if which == "best":
        (folder / "finals" / "finals.json").unlink()
        change_json(folder / "best" / "best.json", lambda kept: kept | {"hash": name})
    else:
        change_json(folder / "finals" / "finals.json", lambda found: found["arms"][0].update(hash=name))
    _fails(["study", "export", "s", "-o", "out"], "", capsys)
    assert not Path("out").exists()


@pytest.mark.parametrize("place", ["best", "best/KEY", "best/KEY/recipe.json", "best/KEY/deep/link"])
def test_links_in_a_search_are_not_followed(place: str, folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """R1: the folder of the best run, or something in it, is a link to somewhere else."""
    (folder / "finals" / "finals.json").unlink()
    key = json.loads((folder / "best" / "best.json").read_text())["hash"]
    path = folder / place.replace("KEY", key)
    if path.exists():
        path.rename(tmp_path / "moved")
    target = tmp_path / "moved" if (tmp_path / "moved").is_dir() else tmp_path / "secret" / "id_rsa"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    _fails(["study", "export", "s", "-o", "out"], "link", capsys)
    assert not Path("out").exists()


def test_a_device_in_a_search_is_not_copied(folder: Path, capsys: Capture) -> None:
    """R1: a named pipe in the best run would be read for ever."""
    import os

    (folder / "finals" / "finals.json").unlink()
    key = json.loads((folder / "best" / "best.json").read_text())["hash"]
    os.mkfifo(folder / "best" / key / "pipe")
    _fails(["study", "export", "s", "-o", "out"], "link or a device", capsys)


@pytest.mark.parametrize("worker", ["../../secret/id_rsa", "/etc/passwd", "a/b"])
def test_the_name_of_a_worker_is_no_path(worker: str, folder: Path) -> None:
    """R1: a study's worker names the file of its lease."""
    with pytest.raises(StudyError, match="is not the name of an entry of this folder"):
        is_alive(folder, worker)
    (folder / "w.lease").symlink_to(folder.parent / "secret" / "id_rsa")
    with pytest.raises(StudyError, match="links are not followed"):
        is_alive(folder, "w")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://host/db", "give it with --storage if you trust it"),
        ("mysql+pymysql://host/db?local_infile=1", "give it with --storage if you trust it"),
        ("sqlite:///secret/id_rsa", "file is not a database"),
        ("sqlite:///absent.db", "unable to open"),
        ("sqlite:///empty.db", "contains no studies"),
        ("nonsense", "not a URL"),
    ],
)
def test_a_database_that_a_folder_names(url: str, words: str, folder: Path, capsys: Capture) -> None:
    """R1: search.json names a database: no server is told a password, and no file becomes a database."""
    Path("empty.db").touch()
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    change_json(folder / "search.json", lambda about: about | {"storage": {"url": url, "name": "x"}})
    _fails(["study", "status", "s"], words, capsys)
    after = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} == {Path("s/search.json")}


def test_weights_of_a_recipe_need_their_hash(tmp_path: Path) -> None:
    """R1: a recipe that names a file of weights is only believed where it knows what is in it."""
    import torch

    from surgeon.errors import ModelError
    from surgeon.models.names import build_model, restore
    from surgeon.records.recipe import BaseModel, Weights

    model, _ = build_model("test_resnet", weights="random")
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    base = BaseModel(source="timm", name="test_resnet", weights=Weights(kind="file", path=str(tmp_path / "mine.pth")))
    with pytest.raises(ModelError, match="without their SHA-256"):
        restore(base)
    restore(base, weights=str(tmp_path / "mine.pth"))


def test_a_name_is_a_name(tmp_path: Path) -> None:
    """R1: the one function behind all of these."""
    from surgeon.errors import CheckpointError
    from surgeon.util.files import inside

    assert inside(tmp_path, "a-b.c") == tmp_path / "a-b.c"
    for name in NAMES:
        with pytest.raises(CheckpointError):
            inside(tmp_path, name)


def _search_fields() -> list[tuple[str, list[Any]]]:
    about = [
        ["model"],
        ["task"],
        ["task", "primary"],
        ["task", "higher_is_better"],
        ["original"],
        ["original", "flops"],
    ]
    about += [
        ["space"],
        ["space", "layers"],
        ["space", "options"],
        ["space", "allowed"],
        ["space", "allowed", 0],
        ["sampler"],
    ]
    finals = [["arms"], ["arms", 0], ["arms", 0, "values"], ["arms", 0, "placement"], ["arms", 0, "role"], ["steps"]]
    kept = [["hash"], ["value"], ["placement"]]
    files = {"search.json": about, "finals/finals.json": finals, "best/best.json": kept}
    return [(file, path) for file, paths in files.items() for path in paths]


@pytest.mark.parametrize(("file", "path"), _search_fields())
@pytest.mark.parametrize("value", [None, -1e99, [[]], {"x": []}])
def test_fields_of_a_search_have_their_types(
    file: str, path: list[Any], value: Any, folder: Path, capsys: Capture
) -> None:
    """R3, T25: another type in a file of a search is one error that names file and field."""

    def change(values: Any) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    accepted = isinstance(value, float) and path[-1] in ("value", "flops")
    change_json(folder / file, change)
    if file.startswith("best"):
        (folder / "finals" / "finals.json").unlink()
    for action in ("status", "export"):
        if main(["study", action, "s", "--force"]) != 0:
            error = capsys.readouterr().err
            assert Path(file).name in error
            assert str(path[0]) in error
            return
    assert accepted or path[-1] == "original"


TEXTS = {
    "digits": "1" * 5000,
    "float": "1e400",
    "nan": "NaN",
    "deep": "[" * 3000 + "]" * 3000,
    "deep within limits of the parser": "[" * 300 + "]" * 300,
    "bytes": b"\xff\xfe",
    "empty": "",
    "list": "[]",
    "number": "3",
    "cut": '{"format"',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_what_is_no_json_of_ours(text: str | bytes, folder: Path, capsys: Capture) -> None:
    """R3: numbers of thousands of digits, numbers that are not finite, deep nesting, in every file that is read."""
    from surgeon.errors import ConfigError, SurgeonError
    from surgeon.records.recipe import Recipe
    from surgeon.search.gains.gain import GainTable
    from surgeon.search.space import SpaceConfig

    content = text if isinstance(text, bytes) else text.encode()
    file = folder / "x.json"
    for around in (b"%s", b'{"a": %s}', b'{"format": "surgeon-recipe", "version": 1, "base": %s, "rules": []}'):
        file.write_bytes(around % content)
        readers: list[tuple[Callable[[Path], Any], type[SurgeonError]]]
        readers = [(Recipe.read, SurgeonError), (GainTable.read, ConfigError), (SpaceConfig.read, ConfigError)]
        for reader, error in readers:
            with pytest.raises(error):
                reader(file)
    for name, words in (("finals/finals.json", "finals.json"), ("search.json", "search.json")):
        (folder / name).write_bytes(content)
        _fails(["study", "status", "s"], words, capsys)


@pytest.mark.parametrize(
    "line", ["[]", "3", "null", '"x"', "{}", '{"op_code": 0}', '{"op_code": 99}', "[" * 3000, "\xff"]
)
def test_lines_that_no_journal_has(line: str, folder: Path, capsys: Capture) -> None:
    """T25: a journal line `[]`."""
    with (folder / "study.jsonl").open("a", encoding="latin-1") as file:
        file.write(line + "\n")
    _fails(["study", "status", "s"], "study.jsonl", capsys)


@pytest.mark.parametrize(
    ("name", "value"),
    [("placement", []), ("worker", {}), ("traced", 3), ("gain", "x"), ("hash", 3), ("duplicate_of", "x")],
)
def test_attributes_of_a_trial_have_their_types(name: str, value: Any, folder: Path, capsys: Capture) -> None:
    """R3: a trial of a stranger's study with attributes of other types."""
    lines = [json.loads(line) for line in (folder / "study.jsonl").read_text().splitlines()]
    change = next(i for i, one in enumerate(lines) if one.get("trial_id") == 1 and "user_attr" in one)
    lines.insert(change, lines[change] | {"user_attr": {name: value}})
    lines[change + 1 :] = [one for one in lines[change + 1 :] if name not in one.get("user_attr", {})]
    (folder / "study.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _fails(["study", "status", "s"], f"trial 1: {name}", capsys)


def test_a_journal_of_a_stranger_is_read_by_its_folder(folder: Path) -> None:
    """R1: the paths of a search are those of its folder."""
    assert SearchFolder(folder).final_of("0" * 16) is None
