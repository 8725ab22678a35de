"""`surgeon place`: a recipe that convert takes, numbers, and one clear error for bad input."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm

import surgeon
from surgeon.cli import _parser, main
from surgeon.commands.search import place
from surgeon.search.gains.gain import GainTable
from surgeon.zoo.finetune import FinetuneConfig

PLACE = ["place", "test_resnet", "--input-size", "64", "--batch-size", "4"]
PAFU = [*PLACE, "--types", "pafu", "--group-sizes", "2,4"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path / "cache"))


def test_the_recipe_goes_through_convert(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PAFU, "--max-params", "+30%", "--max-layers", "3", "--json", "-o", "recipe.json"]) == 0
    document = json.loads(capsys.readouterr().out)
    [best] = document["placements"]
    assert len(best["replaced"]) == 3
    assert best["traced"]["params"] <= 1.3 * document["original"]["params"]
    assert best["traced"]["params"] == best["predicted"]["params"]
    arguments = ["convert", "test_resnet", "--weights", "random", "--input-size", "64", "--recipe", "recipe.json"]
    assert main([*arguments, "--dry-run", "--json", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {entry["name"] for entry in report["replaced"]} == set(best["replaced"])
    assert report["params_after"] == best["traced"]["params"]


def test_a_folder_that_surgeon_wrote(capsys: pytest.CaptureFixture[str]) -> None:
    surgeon.save(timm.create_model("test_resnet"), "plain")
    assert main(["place", "plain", *PAFU[2:], "--max-layers", "2", "--json"]) == 0
    [best] = json.loads(capsys.readouterr().out)["placements"]
    assert len(best["replaced"]) == 2
    assert main(["place", "plain", *PAFU[4:], "--max-layers", "1"]) == 0
    out = capsys.readouterr().out
    assert "FLOPs (1 MAC = 2 FLOPs) at 3x160x160; " in out  # the model's own size
    assert main(["place", "plain", *PAFU[2:], "--weights", "random"]) == 2
    assert "has its own weights; --weights random cannot apply" in capsys.readouterr().err


def test_gains_decide_and_several_differ(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PAFU, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    layers, labels = list(document["placements"][0]["replaced"]), document["space"]["options"]
    assert len(layers) == document["space"]["layers"]  # nothing limits it
    gains = {layer: {label: [0.0, 0.1] for label in labels[1:]} for layer in layers}
    gains[layers[2]][labels[1]] = [2.0, 0.1]
    gains[layers[4]][labels[2]] = [1.0, 0.1]
    values = {"format": "surgeon-gains", "version": 1, "estimator": "mine", "options": labels[1:], "gains": gains}
    GainTable.from_dict(values).write("gains.json")
    assert main([*PAFU, "--gains", "gains.json", "--count", "3", "--json", "--max-flops", "+90%"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [one["gain"] for one in document["placements"]] == [3.0, 3.0, 3.0]
    assert document["placements"][0]["replaced"].items() >= {layers[2]: labels[1], layers[4]: labels[2]}.items()
    assert len({one["hash"] for one in document["placements"]}) == 3


def test_a_table_that_gains_nothing_or_is_of_another_network_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"format": "surgeon-gains", "version": 1, "estimator": "mine", "options": ["sekg"]}
    GainTable.from_dict(values | {"gains": {"body.0": {"sekg": [1.0, 0.1]}}}).write("other.json")
    with monkeypatch.context() as patch:
        patch.setattr("surgeon.search.gate.Gate.__init__", lambda *_, **__: pytest.fail("costs were counted"))
        assert main([*PLACE, "--quiet", "--types", "sekg", "--gains", "other.json"]) == 2
    assert "other.json is of another network: it has body.0, and none of these is here" in capsys.readouterr().err
    assert main([*PLACE, "--quiet", "--types", "sekg", "--layers", "stage4", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["placements"][0]["replaced"]
    GainTable.from_dict(values | {"gains": {layer: {"sekg": [-0.1, 0.1]} for layer in layers}}).write("g.json")
    assert main([*PLACE, "--quiet", "--types", "sekg", "--layers", "stage4", "--gains", "g.json"]) == 1
    assert "no replacement has a gain above 0 in g.json (mine)" in capsys.readouterr().err


def test_place_and_search_judge_memory_by_the_same_step() -> None:
    """Their defaults, and finetune's: one budget is kept or exceeded in all three."""
    words = {"place": ["resnet18"], "search": ["resnet18", "--task", "classification", "--data", "."]}
    found = [_parser().parse_args([name, *rest]) for name, rest in words.items()]
    steps = [(one.batch_size, one.optimizer, one.amp or None, one.memory_mode) for one in found]
    assert steps[0] == steps[1] == (FinetuneConfig().batch_size, FinetuneConfig().opt, None, "train")


def test_what_people_see(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr(place, "waiting", lambda what, *, quiet: (waited.append(what), nullcontext())[1])
    assert main([*PAFU, "--max-memory", "+50%", "--layers", "stage4"]) == 0
    captured = capsys.readouterr()
    assert waited == ["building test_resnet", "counting the costs of every replacement", "placing"]
    assert "placement 1" in captured.out
    assert "pafu(group_size=" in captured.out
    told = " ".join(captured.out.split())
    assert "memory (training step, adamw, float32, batch 4) <= +50%" in told
    assert "memory of one training step, adamw, float32, batch 4, with margin and reserve" in told
    assert "note: uniform gains mean as many replacements as the budgets allow" in told
    assert "surgeon gains test_resnet --task TASK --data DIR -o gains.json" in told
    assert max(map(len, captured.out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--max-flops", "4,5G"], 2, ["--max-flops", "4.5G"]),
        (["--max-flops", "10%"], 2, ["+10%"]),
        (["--max-flops", "0.9999M"], 1, ["no placement is within --max-flops 0.9999M; the nearest"]),
        (["--max-flops", "+20%", "--max-memory", "1MiB"], 1, ["--max-memory", "nearest", "MiB"]),
        (["--max-params", "+0.0001%"], 1, ["nothing was placed", "--max-params"]),
        (["--layers", "stage9"], 2, ["stage9"]),
        (["--types", "pafo"], 2, ["pafo", "pafu"]),
        (["--types", "sekg", "--atoms", "4"], 2, ["atoms", "sekg"]),
        (["--atoms", "4,x"], 2, ["--atoms", "4,x"]),
        (["--space", "nowhere.yaml"], 2, ["nowhere.yaml"]),
        (["--space", "a.yaml", "--types", "acda"], 2, ["--space"]),
        (["--gains", "nowhere.json"], 2, ["nowhere.json"]),
        (["--max-flops", "-10%"], 1, ["--max-flops", "nearest"]),
        (["--count", "0"], 2, ["--count"]),
        (["--max-layers", "0"], 2, ["--max-layers"]),
        (["-o", "."], 2, ["exists"]),
    ],
)
def test_bad_input(more: list[str], code: int, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLACE, "--quiet", *more]) == code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line and not line.startswith(("usage:", " "))]
    assert len(lines) == 1, captured.err
    assert all(word in lines[0] for word in words), lines[0]
    assert captured.out == ""
    assert [path.name for path in Path().iterdir() if path.name != "cache"] == []
