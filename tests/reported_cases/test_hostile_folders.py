"""Surgeon folders of strangers: what is wrong in them is one error that names the file and the field."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surgeon.cli import main
from tests.support.json_files import change_json

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A surgeon folder."""
    import surgeon

    path = tmp_path_factory.mktemp("converted") / "run"
    argv = [
        "convert",
        "test_resnet",
        "--layers",
        "stage4",
        "--type",
        "pafu",
        "--weights",
        "random",
        "--input-size",
        "32",
    ]
    assert main([*argv, "-o", str(path), "--quiet"]) == 0
    surgeon.load(path)
    return path


@pytest.fixture
def run(converted: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    import shutil

    return Path(shutil.copytree(converted, tmp_path / "run"))


def _reseal(run: Path, change: Callable[[dict[str, Any]], Any], aliases: str | None = None) -> None:
    """Change the weights as somebody would who also knows how to write the hash."""
    import hashlib

    from safetensors.torch import load_file, save_file

    file = run / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt", "aliases": aliases or "{}"})
    content = file.read_bytes()
    seal = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    change_json(run / "recipe.json", lambda recipe: recipe["artefact"]["files"].update({file.name: seal}))


@pytest.mark.parametrize(
    ("static", "words"),
    [
        (3, "artefact: static"),
        (None, "artefact: static"),
        ([3], "artefact: static: item 0"),
        ("x", "artefact: static"),
        ([["a"]], "item 0"),
        (["stage1"], "has no layer 'stage1'"),
        (["conv1.0"], "not a dynamic layer"),
    ],
)
def test_which_layers_are_static(static: Any, words: str, run: Path) -> None:
    """R3: `static` that is a number or null."""
    import surgeon
    from surgeon.errors import SurgeonError

    change_json(run / "recipe.json", lambda recipe: recipe["artefact"].update(static=static))
    with pytest.raises(SurgeonError, match=words):
        surgeon.load(run)


@pytest.mark.parametrize(
    "aliases", ["[]", "3", "null", '{"a": 3}', '{"a": ["x"]}', '{"a": "nothing"}', "{", "1" * 5000, "[" * 3000, "1e400"]
)
def test_aliases_of_tensors(aliases: str, run: Path) -> None:
    """R3: aliases in the metadata that are no dictionary of texts, or name nothing."""
    import surgeon
    from surgeon.errors import CheckpointError

    _reseal(run, lambda state: None, aliases)
    with pytest.raises(CheckpointError, match="aliases"):
        surgeon.load(run)


@pytest.mark.parametrize("dtype", ["int8", "int64", "bool", "complex64"])
def test_weights_of_another_kind_of_dtype(dtype: str, run: Path) -> None:
    """R4: weights of a whole-number dtype are no weights."""
    import torch

    import surgeon
    from surgeon.errors import CheckpointError

    def change(state: dict[str, Any]) -> None:
        state["conv1.0.weight"] = state["conv1.0.weight"].to(getattr(torch, dtype))

    _reseal(run, change)
    with pytest.raises(CheckpointError, match=rf"conv1\.0\.weight is of dtype {dtype}, expected float32"):
        surgeon.load(run)


def test_weights_of_a_whole_number_dtype_in_any_file(tmp_path: Path) -> None:
    """R4: quantized weights, rounded to whole numbers, would be loaded as such: silently another model."""
    import torch

    from surgeon.errors import ModelError
    from surgeon.models.names import build_model

    state = build_model("test_resnet", weights="random")[0].state_dict()
    torch.save(state | {"conv1.0.weight": state["conv1.0.weight"].to(torch.int8)}, tmp_path / "int8.pth")
    with pytest.raises(ModelError, match=r"conv1\.0\.weight is of dtype int8, expected float32"):
        build_model("test_resnet", weights=str(tmp_path / "int8.pth"))


@pytest.mark.parametrize("value", ["many", None, [1], {}, True])
@pytest.mark.parametrize("field", ["params_before", "params_after", "macs_before", "max_rel_error", "seconds"])
def test_totals_of_a_report_that_are_no_numbers(field: str, value: Any, run: Path) -> None:
    """R11: a stranger's report whose totals are no numbers is shown, with what is unknown."""
    from surgeon.models.checkpoint import read_report

    def change(values: Any) -> None:
        values[field] = value
        for layer in values["replaced"]:
            layer[field if field in layer else "calls"] = value
            layer["geometry"] = value

    change_json(run / "report.json", change)
    report = read_report(run)
    assert report is not None
    text = report.to_text()
    assert "unknown" in text or field in ("macs_before", "max_rel_error")


@pytest.mark.parametrize("field", ["replaced", "notes", "model", "precision", "nothing", "skipped"])
@pytest.mark.parametrize("value", [3, [3.5], {"a": 1}])
def test_texts_and_lists_of_a_report_that_are_none(field: str, value: Any, run: Path) -> None:
    """R11: what is no report is said so."""
    from surgeon.errors import CheckpointError
    from surgeon.models.checkpoint import read_report

    change_json(run / "report.json", lambda values: values | {field: value})
    with pytest.raises(CheckpointError, match="report"):
        read_report(run)


def test_a_space_that_grows_while_it_is_read(tmp_path: Path) -> None:
    """R3: aliases of YAML stand for more than there is, and nesting takes for ever."""
    from surgeon.errors import ConfigError
    from surgeon.search.space import SpaceConfig

    file = tmp_path / "space.yaml"
    lines = ["a: &a [x, x]", *(f"{b}: &{b} [*{a}, *{a}, *{a}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True))]
    for text, words in (("\n".join(lines), "aliases"), ("layers: " + "[" * 20_000, "nested too deep")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=words):
            SpaceConfig.read(file)
    file.write_text("types: [pafu]\noptions:\n- {type: acda, options: {atoms: 4}}\n")
    assert SpaceConfig.read(file).types == ("pafu",)
