"""`surgeon visualize` as people call it."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

import surgeon
from surgeon.cli import main
from surgeon.commands.visualize import _as_is, safe
from surgeon.surgery.rewrite import dynamic_layers
from tests.support.layers.contract import awaken
from tests.support.tiny_models import random_model
from tests.support.tiny_runs import with_dynamic


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)


def saved(kind: str) -> None:
    """The folder "run", whose layers vary, and two pictures."""
    model, base = random_model("test_resnet", input_size=(64, 64))
    model = with_dynamic(model, "layer4.0.conv1", "layer4.0.conv2", kind=kind)
    for layer in dynamic_layers(model).values():
        awaken(layer)
    surgeon.save(model, "run", base=base)
    for name, shape in (("a.png", (70, 90, 3)), ("b.jpg", (80, 60))):
        values = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
        Image.fromarray(values).save(name)


@pytest.mark.long
def test_pictures_numbers_and_tensorboard(capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    saved("acda")
    capsys.readouterr()
    given = ["visualize", "run", "a.png", "b.jpg", "-o", "out", "--tensorboard", "board", "--against", "auto"]
    assert main([*given, "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads(Path("out/numbers.json").read_text()) == found
    assert [image["image"] for image in found["images"]] == ["a", "b"]
    layers = found["images"][0]["layers"]
    assert [layer["name"] for layer in layers] == ["layer4.0.conv1", "layer4.0.conv2"]
    assert all(layer["variation"] > 0 and 0 < layer["cosine_distance"] < 2 for layer in layers)
    files = sorted(str(path.relative_to("out")) for path in Path("out").rglob("*.png"))
    told = [name for image in found["images"] for layer in image["layers"] for name in layer["pictures"]]
    assert files == sorted(told + found["bases"])
    assert len(files) == 2 * 2 * 3 + 1
    for name in files:
        with Image.open(Path("out", name)) as image:
            image.load()
            assert min(image.size) > 100
    board = EventAccumulator("board")
    board.Reload()
    assert sorted(board.Tags()["images"]) == sorted(name.removesuffix(".png") for name in files)
    [event, *_] = board.Scalars("layer4.0.conv1/cosine_distance")
    assert event.value == pytest.approx(layers[0]["cosine_distance"], rel=1e-5)


@pytest.mark.parametrize("kind", ["pafu", "sekg"])
def test_text_and_input_size(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    saved(kind)
    capsys.readouterr()
    given = ["visualize", "run", "a.png", "-o", "out", "--layers", "layer4.0.conv2", "--input-size", "48x96", "--quiet"]
    assert main(given) == 0
    out = capsys.readouterr().out
    assert "2 pictures and numbers.json in  out" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "layer4.0.conv1" not in out
    assert main(given) == 2
    assert "out is not empty" in capsys.readouterr().err
    assert main([*given, "--force"]) == 0


def test_pictures_of_an_earlier_call_are_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    """Those that its numbers.json lists, and nothing else."""
    saved("sekg")
    assert main(["visualize", "run", "a.png", "b.jpg", "-o", "out", "--quiet"]) == 0
    document = json.loads(Path("out/numbers.json").read_text())
    document["bases"] = ["../a.png", "a/notes.txt"]
    Path("out/numbers.json").write_text(json.dumps(document))
    for mine in ("out/b/mine.png", "out/a/notes.txt"):
        Path(mine).write_text("mine")
    given = ["visualize", "run", "a.png", "-o", "out", "--layers", "layer4.0.conv2", "--force", "--quiet", "--json"]
    capsys.readouterr()
    assert main(given) == 0
    [image] = json.loads(capsys.readouterr().out)["images"]
    pictures = [name for layer in image["layers"] for name in layer["pictures"]]
    files = sorted(str(path.relative_to("out")) for path in Path("out").rglob("*") if path.is_file())
    assert files == sorted([*pictures, "a/notes.txt", "b/mine.png", "numbers.json"])
    assert Path("a.png").is_file()
    Path("out/numbers.json").write_text("[1]")
    Path("out/b/mine.png").unlink()
    assert main(given) == 0
    assert Path("out/b").is_dir(), "whose pictures no record lists"


@pytest.mark.parametrize(
    ("task", "bayer", "told"),
    [
        ("denoising", None, "no noise is added to the pictures: give noisy ones"),
        ("super-resolution", None, "sees the pictures as they are: give low-resolution ones"),
        ("demosaicking", None, "--bayer RGGB shows it a sensor's mosaic"),
        ("demosaicking", "RGGB", None),
        ("classification", None, None),
    ],
)
def test_a_network_that_works_on_other_pictures_is_told(task: str, bayer: str | None, told: str | None) -> None:
    note = _as_is(task, bayer)
    assert note is None if told is None else told in (note or "")


def test_the_task_of_the_record_is_what_counts(capsys: pytest.CaptureFixture[str]) -> None:
    saved("sekg")
    given = ["visualize", "run", "a.png", "-o", "out", "--json"]
    assert main(given) == 0
    assert "no noise is added" not in capsys.readouterr().err
    recipe = json.loads(Path("run/recipe.json").read_text())
    Path("run/recipe.json").write_text(json.dumps(recipe | {"task": {"name": "denoising"}}))
    assert main([*given, "--force"]) == 0
    assert "the model is for denoising, and no noise is added to the pictures" in capsys.readouterr().err


def test_a_gray_model_gets_gray_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    saved("pafu")
    given = [
        "convert",
        "zoo/dncnn",
        "--weights",
        "random",
        "--layers",
        "body.2",
        "--type",
        "sekg",
        "--input-size",
        "32",
    ]
    assert main([*given, "-o", "gray", "--json", "--quiet"]) == 0
    capsys.readouterr()
    Image.new("L", (300, 41), 128).save("wide.png")
    assert main(["visualize", "gray", "a.png", "wide.png", "-o", "out", "--json"]) == 0
    printed = capsys.readouterr()
    assert [layer["type"] for layer in json.loads(printed.out)["images"][0]["layers"]] == ["sekg"]
    assert "center-cropped to 32x256, 64x80 (HxW); --input-size sets a size" in printed.err  # and not resized


def test_pictures_of_one_name_are_kept_apart(capsys: pytest.CaptureFixture[str]) -> None:
    saved("pafu")
    files = ["cat/001.png", "ship/001.png", "deep/ship/001.png", "a.png"]
    for file in files[:3]:
        Path(file).parent.mkdir(parents=True)
        Image.new("L", (64, 64), 128).save(file)
    assert main(["visualize", "run", *files, "-o", "out"]) == 0
    error = capsys.readouterr().err
    assert "pictures are resized and center-cropped to 64x64 (HxW), the model's own size; --input-size" in error
    found = {one["image"]: one["file"] for one in json.loads(Path("out/numbers.json").read_text())["images"]}
    assert found == dict(zip(["cat-001", "ship-001", "ship-001-2", "a"], files, strict=True))
    assert {path.name for path in Path("out").iterdir()} == {*found, "numbers.json"}


def test_file_names_are_safe() -> None:
    assert safe("layer1.0.conv1") == "layer1.0.conv1"
    assert safe("blocks/0 ../x") == "blocks_0_.._x"
    assert safe("") == "model"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.png", "-o", "out"], "IMAGE: there is no picture nowhere.png\n"),
        (
            ["run", "run/recipe.json", "-o", "out"],
            "IMAGE: cannot read the image run/recipe.json: .json is not supported",
        ),
        (["nowhere", "a.png", "-o", "out"], "there is no surgeon folder nowhere"),
        (["run", "a.png", "-o", "a.png"], "a.png exists and is not a folder"),
        (["run", "a.png", "-o", "run"], "the output run is not empty"),
        (["run", "a.png", "-o", "out", "--layers", "layer9"], "'layer9' is not a dynamic layer"),
        (["run", "a.png", "-o", "out", "--input-size", "big"], "expected SIZE, HxW or CxHxW"),
        (["run", "a.png", "-o", "out", "--against", "test_vit"], "it is not the original of this model"),
        (["plain", "a.png", "-o", "out"], "plain has no dynamic layer"),
    ],
)
def test_wrong_usage_is_one_clear_error(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    saved("pafu")
    surgeon.save(timm.create_model("test_resnet"), "plain")
    capsys.readouterr()
    assert main(["visualize", *arguments, "--quiet"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert [line for line in captured.err.splitlines() if "error" in line] == captured.err.splitlines()[-1:]
    assert not captured.out
    assert not Path("out").exists()


@pytest.mark.long
def test_the_example_draws_the_pictures_of_the_documents(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(root / "examples" / "draw_layers.py"))["main"]("test_resnet", ".")
    drawn = {path.name for path in Path().glob("*.png")}
    shown = set(re.findall(r"\(pictures/(.+?)\)", (root / "docs" / "pictures.md").read_text()))
    assert len(shown) > 1
    assert shown <= drawn
    assert "cosine distance" in capsys.readouterr().out
