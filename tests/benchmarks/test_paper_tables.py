"""The papers' comparisons: definitions that fit the zoo, published numbers kept apart, rows that resume, tables that add up."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgeon.zoo as zoo
from benchmarks import paper_tables
from benchmarks._paper_costs import COSTS, cost_rows
from benchmarks._paper_data import FULL, SMALL, DataSet
from benchmarks._paper_tables import Arm, Comparison
from surgeon.zoo.recipes import training_recipe
from tests.support.training import task_data

ALL = paper_tables.comparisons()


def by_key(key: str) -> Comparison:
    return next(c for c in ALL if c.key == key)


# --- definitions ------------------------------------------------------------------------------------------------------


def test_every_table_that_is_asked_for() -> None:
    found = {c.table for c in ALL} | set(COSTS)
    acda = {f"ACDA {n}" for n in ("1", "3", "4", "5", "6", "7", "B")}
    pafu = {f"PAFU {n}" for n in range(1, 7)}
    adfnet = {f"ADFNet {n}" for n in ("1", "2", "4", "7", "2, cost")}
    assert found == acda | pafu | adfnet
    assert len({c.key for c in ALL}) == len(ALL)


@pytest.mark.parametrize("comparison", ALL, ids=lambda c: c.key)
def test_a_comparison_is_sound(comparison: Comparison) -> None:
    names = [arm.name for arm in comparison.arms]
    assert len(set(names)) == len(names)
    assert sum(arm.of is None for arm in comparison.arms) >= 1
    assert comparison.data in FULL
    for arm in comparison.arms:
        assert arm.of is None or arm.of in names
        assert arm.trained_as is None or arm.trained_as in names
        for network in filter(None, (arm.network, arm.small_network)):
            assert network.startswith("timm:") or network in zoo.names()
        for full in (True, False):
            recipe = paper_tables._recipe(comparison, arm, full)
            recipe.config()
            recipe.make_task()
            assert full or recipe.config().max_steps <= 1000
            assert full or recipe.config(**paper_tables._changes(comparison, arm, full, None)).max_steps <= 5000


@pytest.mark.parametrize("comparison", ALL, ids=lambda c: c.key)
def test_arms_are_trained_for_equal_steps(comparison: Comparison) -> None:
    for full in (True, False):
        if comparison.table == "ADFNet 2" and full:
            continue  # the larger one is trained for longer, as in the paper
        over = {} if full else comparison.small_train
        configs = [paper_tables._recipe(comparison, arm, full).config(**over) for arm in comparison.arms]
        assert len({(c.epochs, c.max_steps, c.batch_size, c.lr, c.opt) for c in configs}) == 1


def test_published_numbers_are_those_of_the_papers() -> None:
    """Spot checks against the papers' text."""
    crowd = {arm.name: arm.published for arm in by_key("ACDA 3/SHTech-A").arms}
    assert crowd["Ad-ResNet-s"] == {"SHTech-A mae": 57.88, "SHTech-A mse": 91.27}
    espcnn = by_key("PAFU 4/ESPCNN x3").arms[1]
    assert espcnn.published == {"Set5 psnr": 33.08, "Set14 psnr": 29.53, "B100 psnr": 28.53, "Urban100 psnr": 26.48}
    assert by_key("ADFNet 1/σ = 50").arms[-1].published["McMaster psnr"] == 29.96
    assert by_key("PAFU 2/x4").arms[-1].published == {"Set5 psnr": 29.96, "Set14 psnr": 27.15}


def test_equal_weights_for_equal_seeds() -> None:
    comparison = by_key("PAFU 2/x2")
    recipe = paper_tables._recipe(comparison, comparison.arms[1], full=False)
    first, again, other = (paper_tables.network(recipe, comparison.arms[1], seed, False) for seed in (0, 0, 1))
    state = [torch.cat([p.flatten() for p in m.parameters()]) for m in (first, again, other)]
    assert torch.equal(state[0], state[1])
    assert not torch.equal(state[0], state[2])


@pytest.mark.parametrize(("name", "atoms", "scales"), [("m = 9", 9, 3), ("S = 5", 6, 5)])
def test_the_ablation_changes_one_thing(name: str, atoms: int, scales: int) -> None:
    comparison = by_key("ACDA B/x3")
    arm = next(arm for arm in comparison.arms if arm.name == name)
    model = paper_tables.network(paper_tables._recipe(comparison, arm, full=False), arm, 0, False)
    layers = [m for m in model.modules() if type(m).__name__ == "ACDAConv2d"]
    assert len(layers) == 4
    assert {(layer.config.atoms, layer.config.scales) for layer in layers} == {(atoms, scales)}


def test_a_smaller_resnet_with_units_in_the_same_places() -> None:
    comparison = by_key("PAFU 5/CIFAR-10")
    plain, ours = (
        paper_tables.network(paper_tables._recipe(comparison, arm, full=False), arm, 0, False)
        for arm in comparison.arms
    )
    units = [name for name, m in ours.named_modules() if type(m).__name__ == "PAFUConv2d"]
    assert units == ["layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"]
    assert sum(isinstance(m, nn.Conv2d) for m in plain.modules()) == 19


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny images in the place of the material, and one comparison with a tiny patch."""
    task_data.image_folders(tmp_path / "data")
    small = {
        "sr": DataSet({"train": "train", "val": "val"}, {"Set5": {"val": "val"}, "Set14": {"val": "val"}}, "waves")
    }
    monkeypatch.setattr(paper_tables, "SMALL", small)
    comparison = by_key("PAFU 2/x2")
    tiny = Comparison(**{**vars(comparison), "small_options": {"patch": 12}, "small_train": {"batch_size": 2}})
    monkeypatch.setattr(paper_tables, "comparisons", lambda: [tiny, by_key("ACDA 1/CIFAR-100")])
    return tmp_path


def run(folder: Path, *more: str) -> int:
    common = [
        "--small-data",
        str(folder / "data"),
        "--results",
        str(folder / "results"),
        "--picture",
        str(folder / "p.png"),
    ]
    return paper_tables.main([*common, "--only", "PAFU 2", "ACDA 1", *more])


def test_rows_come_and_resume(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(folder, "--steps", "2", "--seeds", "1") == 0
    out, error = capsys.readouterr()
    assert "cifar100: nothing stands for it at small scale" in error
    assert "PAFU 2, Linear super-resolution ×2" in out
    assert "waves" in out
    content = json.loads((folder / "results" / "paper_tables.json").read_text())
    assert content["scale"] == "small"
    rows = {row["network"]: row for row in content["rows"]}
    assert set(rows) == {"5×5 convolution", "5×5", "5×5&7×7", "5×5, +", "5×5&7×7, +"}
    assert {row["steps"] for row in rows.values()} == {2}
    assert rows["5×5"]["scores"] != rows["5×5, +"]["scores"], "the same network, judged otherwise"
    assert rows["5×5"]["parameters"] == rows["5×5, +"]["parameters"]
    assert set(rows["5×5"]["scores"]) == {"Set5 psnr", "Set14 psnr"}

    seeds: list[int] = []
    original = paper_tables.run

    def counted(*args: Any, **options: Any) -> Any:
        seeds.append(args[3])
        return original(*args, **options)

    monkeypatch.setattr(paper_tables, "run", counted)
    assert run(folder, "--steps", "2", "--seeds", "2") == 0
    assert seeds == [1, 1, 1], "the first seed is not trained again"
    assert run(folder, "--report") == 0
    assert seeds == [1, 1, 1]

    capsys.readouterr()
    assert run(folder, "--steps", "3", "--seeds", "1") == 0
    assert seeds == [1, 1, 1, 0, 0, 0], "rows of fewer steps are trained again"
    shown = [line.split()[:5] for line in capsys.readouterr().out.splitlines() if line.startswith("5×5 conv")]
    assert shown == [["5×5", "convolution", "900", "3", "1"]], "seeds of other steps are not averaged with them"


def test_full_scale_runs_by_the_same_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The paper's batch, patches and rate, on folders named as `--data` wants them; a single step."""
    for number, place in enumerate(("div2k/train/a", "div2k/train/b", "Set5/a", "Set14/a", "B100/a", "Urban100/a")):
        task_data.photo(tmp_path / f"{place}.png", 100, 104, number)
    results = tmp_path / "results"
    arguments = [
        "--data",
        str(tmp_path),
        "--only",
        "PAFU 2/x2",
        "--steps",
        "1",
        "--seeds",
        "1",
        "--results",
        str(results),
    ]
    assert paper_tables.main([*arguments, "--networks", "5×5 convolution"]) == 0
    (row,) = json.loads((results / "paper_tables-full.json").read_text())["rows"]
    assert row["scale"] == "full"
    assert set(row["scores"]) == {"Set5 psnr", "Set14 psnr", "B100 psnr", "Urban100 psnr"}
    assert not (results / "paper_tables.json").exists(), "full and small scale are kept apart"
    assert "5×5 convolution" in capsys.readouterr().out


def test_missing_material_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        paper_tables.main(["--small-data", str(folder / "no"), "--results", str(folder / "r"), "--only", "PAFU 2"]) == 0
    )
    assert f"sr: there is no {folder / 'no' / 'train'}" in capsys.readouterr().err
    assert paper_tables.main(["--only", "PAFU 9"]) == 2
    assert "no such table: PAFU 9" in capsys.readouterr().err
    assert paper_tables.main(["--only", "PAFU 2", "--list"]) == 0
    assert capsys.readouterr().out.startswith("PAFU 2/x2: Linear")


def test_small_material_is_where_the_definitions_say(data: Path) -> None:
    for name, found in SMALL.items():
        if name != "cifar10":
            assert found.located(data).missing() == []


def test_the_picture_waits_for_both(tmp_path: Path) -> None:
    task_data.photo(tmp_path / "val/a.png", 40, 44)
    task = training_recipe("adfnet").make_task(val=tmp_path / "val", patch=16)
    model = task.bind(zoo.create("dncnn", channels=3, depth=3, width=4))
    for name, there in zip(paper_tables.SHOWN_ARMS, (False, True), strict=True):
        paper_tables.show(tmp_path / "p.png", tmp_path, name, model, task)
        assert (tmp_path / "p.png").is_file() == there


# --- the tables -------------------------------------------------------------------------------------------------------


def rows_of(scores: dict[str, list[float]], lower: bool = False) -> tuple[Comparison, list[dict[str, Any]]]:
    arms = (
        Arm(name="plain", network="srcnn", published={"Set5 psnr": 30.0}),
        Arm(name="ours", network="pafu_srcnn", of="plain", published={"Set5 psnr": 30.5}),
    )
    comparison = Comparison(table="T", setting="s", title="t", recipe="srcnn", data="sr", arms=arms, lower=lower)
    rows = [
        {"network": name, "seed": seed, "parameters": 1000, "steps": 9, "scores": {"Set5 psnr": value}}
        for name, values in scores.items()
        for seed, value in enumerate(values)
    ]
    return comparison, rows


def test_differences_are_taken_seed_by_seed() -> None:
    comparison, rows = rows_of({"plain": [20.0, 22.0, 30.0], "ours": [21.0, 21.5]})
    plain, ours = paper_tables.lines(comparison, rows)
    assert plain == ["plain", "1,000", 9, 3, "Set5 24.00", "", "", "Set5 30.00", ""]
    assert ours == ["ours", "1,000", 9, 2, "Set5 21.25", "Set5 +0.25 ± 0.75", "undecided", "Set5 30.50", "Set5 +0.50"]


@pytest.mark.parametrize(("lower", "said"), [(False, "won"), (True, "lost")])
def test_the_direction(lower: bool, said: str) -> None:
    comparison, rows = rows_of({"plain": [20.0, 20.0, 20.0], "ours": [21.0, 21.1, 20.9]}, lower)
    assert paper_tables.lines(comparison, rows)[1][6] == said


def test_fewer_than_three_seeds_decide_nothing() -> None:
    comparison, rows = rows_of({"plain": [20.0, 20.0], "ours": [21.0, 21.0]})
    assert paper_tables.lines(comparison, rows)[1][6] == "undecided"


def test_the_tally(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison, rows = rows_of({"plain": [20.0, 22.0, 23.0], "ours": [21.0, 23.1, 24.0]})
    monkeypatch.setattr(paper_tables, "comparisons", lambda: [comparison])
    for row in rows:
        row |= {"table": "T", "comparison": comparison.key, "data": ""}
    assert paper_tables.summary(rows) == "of 1 comparisons: 1 won, 0 lost, 0 undecided"
    rows[-1]["scores"] = {"Set5 psnr": 18.0}
    assert paper_tables.summary(rows) == "of 1 comparisons: 0 won, 0 lost, 1 undecided"


def test_an_arm_without_its_plain_twin_has_no_difference() -> None:
    comparison, rows = rows_of({"ours": [21.0]})
    (line,) = paper_tables.lines(comparison, rows)
    assert line[5:7] == ["", ""]


def test_trainings_of_different_length_are_not_compared() -> None:
    comparison, rows = rows_of({"plain": [20.0, 21.0], "ours": [22.0, 23.0]})
    rows[-1]["steps"] = 18  # of ours, the second seed
    plain, ours = paper_tables.lines(comparison, rows)
    assert plain[2:5] == [9, 2, "Set5 20.50"]
    assert ours[2:7] == [18, 1, "Set5 23.00", "", ""]


def test_macs_of_table_6_follow_from_the_shapes() -> None:
    """256 → 256 channels at 100×100: c·c'·l² and one addition an output; m·c'·l² + c·c'·m, and that addition, for ACDA."""
    rows = {(row["kernel"], row["method"]): row for row in cost_rows("ACDA 6")}
    for side in (3, 5, 7):
        conv, only = rows[(f"{side}×{side}", "Conv")], rows[(f"{side}×{side}", "ACDA (conv only)")]
        assert conv["MACs, ours"] == pytest.approx((256 * 256 * side**2 + 256) / 100, abs=0.06)
        assert conv["MACs, ours"] == pytest.approx(conv["published"], abs=0.1)
        assert only["MACs, ours"] == pytest.approx((256 * 6 * side**2 + 256 * 256 * 6 + 256) / 100, abs=0.06)
        assert only["MACs, ours"] == pytest.approx(only["published"], abs=0.1)


@pytest.mark.slow
def test_costs_of_training_and_of_adfnet() -> None:
    conv, dfn, acda = cost_rows("ACDA 7")
    assert float(acda["parameters"].split()[0]) < float(conv["parameters"].split()[0])
    assert float(dfn["memory, predicted"].split()[0]) > 0
    small, large = cost_rows("ADFNet 2, cost")
    assert small["MACs"] == "12.29 G"
    assert large["MACs"] == "39.66 G"
