"""The benchmark programs of the search, on made-up values and tiny networks: what they count, that they resume, what they write."""

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import _data, _results, _search_tables, fine_tunes, gain_methods, placement, search_cifar, tabulated
from surgeon.search.gains.gain import GainTable

OPTIONS = ("keep", *(option.label for option in fine_tunes.OPTIONS))


# --- the exhaustive space -----------------------------------------------------------------------------------------


def made_up(layers: tuple[str, ...], steps: tuple[float, ...] = (0.0, 0.1, -0.05, 0.2)) -> dict[str, Any]:
    """A table whose losses add up: option j of layer i is worth (i + 1) · steps[j]."""
    rows = []
    for chosen in itertools.product(range(4), repeat=len(layers)):
        gain = sum((i + 1) * steps[j] for i, j in enumerate(chosen))
        placement = {layer: OPTIONS[j] for layer, j in zip(layers, chosen, strict=True) if j}
        rows.append({"placement": placement, "seed": 0, "loss": 3.0 - gain})
    return {"settings": {"layers": {"space": layers, "singles": layers}}, "rows": rows}


def test_searches_of_a_table_are_compared_with_its_optimum(tmp_path: Path, capsys: Any) -> None:
    content = made_up(fine_tunes.SPACE)
    (tmp_path / "fine_tunes.json").write_text(json.dumps(content))
    modes = ["decoder", "raw random", "raw tpe", "raw nsga2"]
    command = ["--from", str(tmp_path), "--results", str(tmp_path)]
    assert tabulated.main([*command, "--trials", "9", "--seeds", "2", "--modes", *modes]) == 0
    found = json.loads((tmp_path / "tabulated.json").read_text())
    free, limited = found["cases"]
    assert free["placements"] == 256
    assert (free["original_loss"], free["optimum_loss"]) == (3.0, pytest.approx(1.0))  # (1 + 2 + 3 + 4) · 0.2
    better = [row["loss"] < 3.0 for row in content["rows"]]
    assert free["better_than_original"] == pytest.approx(np.mean(better))
    assert 128 <= limited["placements"] < 256
    assert limited["optimum_loss"] > 1.0
    assert [(row["mode"], row["gains"]) for row in found["rows"][:4]] == [
        ("decoder", "uniform"),
        *((mode, "-") for mode in modes[1:]),
    ]
    assert all(row["found_lowest"] <= row["found_median"] <= 100 for row in found["rows"])
    assert len({row["found_median"] for row in found["rows"]}) > 2
    assert "| no budget | 256 |" in _search_tables.tabulated(found)
    del content["rows"][7]
    (tmp_path / "fine_tunes.json").write_text(json.dumps(content))
    assert tabulated.main(command) == 2
    assert "has not 1 of the placements" in capsys.readouterr().err


def test_the_right_gain_table_finds_the_optimum_at_once(tmp_path: Path) -> None:
    space, values = tabulated.read_table(made_up(fine_tunes.SPACE))
    gain = np.outer(np.arange(1, 5), (0.0, 0.1, -0.05, 0.2))
    gains = GainTable(
        layers=space.layers, options=space.labels, gain=gain, error=np.zeros_like(gain), estimator="truth"
    )
    for case in tabulated.make_cases(space, values):
        row = tabulated.compare(case, "decoder", gains, 2, 1)  # the original, and the optimum of the table
        assert row["found_median"] == pytest.approx(100.0)
        assert case.found(case.original) == 0.0


def test_optuna_alone_finds_what_a_search_finds() -> None:
    space, values = tabulated.read_table(made_up(fine_tunes.SPACE))
    gains = tabulated.uniform_gains(space)
    for case in tabulated.make_cases(space, values):
        rows = [tabulated.compare(case, mode, gains, 14, 2) for mode in ("posterior", tabulated.ALONE)]
        assert rows[0] | {"mode": ""} == rows[1] | {"mode": ""}  # the same proposals
        assert rows[0]["found_median"] > 90


def test_proposals_of_every_sampler_are_counted() -> None:
    for name in ("random", "optuna.samplers:TPESampler"):
        row = placement.count_over(name, 30, trials=15)
        assert (row["proposals"], row["studies"], row["over_budget"], row["repeated"]) == (30, 2, 0, 0)


# --- estimators ---------------------------------------------------------------------------------------------------


def test_two_halves_of_the_truth() -> None:
    same = np.tile([0.1, 0.3, 0.2, 0.7], (4, 1))
    assert gain_methods.agreement(same) == pytest.approx(1.0)
    assert gain_methods.agreement(np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])) == pytest.approx(-1.0)
    assert gain_methods.agreement(same[:1]) is None
    assert gain_methods.rank(np.ones(3), np.arange(3.0)) == 0.0


def test_only_whole_seeds_are_the_truth() -> None:
    layers = fine_tunes.SPACE
    content = made_up(layers)
    space, _ = tabulated.read_table(content)
    for row in list(content["rows"]):
        if len(row["placement"]) <= 1:
            content["rows"].append(row | {"seed": 1, "loss": row["loss"] + 1.0})
    content["rows"].append({"placement": {}, "seed": 2, "loss": 1.0})  # of this seed there is no more
    gains = gain_methods.single_gains(content, space)
    assert gains.shape == (2, 12)
    np.testing.assert_allclose(gains[0], gains[1])
    assert gains[0].max() == pytest.approx(0.8)
    assert len(gain_methods.whole(content, space)) == 256


# --- programs that train ------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """As many stages as a ResNet, in little."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=4, padding=1)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.layer3 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.layer3(self.layer1(self.stem(x))).mean((2, 3)))
        return out


def _network(folder: Path, name: str = "") -> nn.Module:
    torch.manual_seed(2)
    return Tiny().eval()


def _images(path: Path) -> _data.Labeled:
    x = torch.randint(0, 256, (24, 3, 32, 32), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return _data.Labeled(x, torch.arange(24) % 10)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_data, "cifar_jpeg", _images)
    monkeypatch.setattr(_data, "missing", lambda names, folder: [])
    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path / "cache"))
    for module in (fine_tunes, search_cifar):
        monkeypatch.setattr(module, "network", _network)


@pytest.mark.usefixtures("tiny")
def test_every_placement_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = ("layer1.0", "layer3.0")
    monkeypatch.setattr(fine_tunes, "QUICK", fine_tunes.Size(space=layers, singles=layers, steps=1, test=6))
    command = ["--quick", "--seeds", "2", "--results", str(tmp_path), "--data", str(tmp_path)]
    assert fine_tunes.main(command) == 0
    rows = json.loads((tmp_path / "fine_tunes-quick.json").read_text())["rows"]
    assert len(rows) == 16 + 7  # all placements with one seed, and the unmodified one and six singles with another
    assert len({json.dumps(row["placement"]) for row in rows if row["seed"] == 0}) == 16
    monkeypatch.setattr(fine_tunes, "measure", lambda *_: pytest.fail("this row was there"))
    assert fine_tunes.main(command) == 0


@pytest.mark.long
@pytest.mark.usefixtures("tiny")
def test_a_search_and_its_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_cifar, "QUICK", search_cifar.Size(steps=2, rung=0, images=6))
    monkeypatch.setattr(search_cifar, "BUDGETS", {"flops": "+4000%"})
    monkeypatch.setattr(search_cifar, "make_gains", partial(search_cifar.make_gains, batches=4))
    command = ["--quick", "--trials", "3", "--seeds", "2", "--results", str(tmp_path), "--data", str(tmp_path)]
    assert search_cifar.main(command) == 0
    found = json.loads((tmp_path / "search_cifar-quick.json").read_text())
    assert [arm["arm"] for arm in found["arms"]] == [
        *("no conversion", "found", "ACDA, last stage", "PAFU, first of stage", "random feasible")
    ]
    assert all(arm["seeds"] == 2 for arm in found["arms"])
    assert found["placements"]["no conversion"] == {}
    assert found["placements"]["ACDA, last stage"] == {"layer3.0": search_cifar.ACDA.label}
    assert found["search"]["trials"] == 3
    gaps = {gap["against"]: gap for gap in found["differences"]}
    assert list(gaps) == ["no conversion", "ACDA, last stage", "PAFU, first of stage", "random feasible"]
    loss = {(row["arm"], row["seed"]): row["loss"] for row in found["rows"] if "arm" in row}
    mean = sum(loss["found", seed] - loss["no conversion", seed] for seed in (0, 1)) / 2
    assert gaps["no conversion"]["loss difference"].startswith(f"{mean:+.3f} ± ")
    assert "| no conversion | 0 |" in _search_tables.search_cifar(found)
    monkeypatch.setattr(search_cifar, "train", lambda *_: pytest.fail("this row was there"))
    assert search_cifar.main(command) == 0

    monkeypatch.setattr(search_cifar, "train", lambda *_: {"loss": 0.5, "top1": 80.0, "seconds": 1.0})
    monkeypatch.setattr(search_cifar, "WIDE", {"flops": "+5000%"})
    assert search_cifar.main([*command, "--wide"]) == 0
    wide = json.loads((tmp_path / "search_cifar-quick-wide.json").read_text())
    assert wide["settings"]["budgets"] == {"flops": "+5000%"}
    again = {(row["arm"], row["seed"]): row["loss"] for row in wide["rows"] if "arm" in row}
    assert all(again[arm, seed] == loss[arm, seed] for arm in search_cifar.FREE for seed in (0, 1))
    assert again["random feasible", 0] == 0.5


def test_an_arm_is_not_trained_for_each_name_of_its_placement(tmp_path: Path) -> None:
    rows = _results.Rows(tmp_path / "rows.jsonl")
    placements = {"found": np.array([0, 1]), "original": np.array([0, 0]), "as published": np.array([0, 1])}
    assert search_cifar.alike(placements, "found") == ["as published"]
    assert search_cifar.alike(placements, "original") == []
    for arm, loss in (("found", 1.0), ("original", 2.0), ("as published", 1.0)):
        for seed in range(3):
            rows.add(f"{arm}/{seed}", {"arm": arm, "seed": seed, "loss": loss * (1 + 0.1 * seed), "top1": 50.0})
    gaps = {gap["against"]: gap for gap in search_cifar.differences_of_found(rows, ["as published"])}
    assert gaps["as published"]["loss verdict"] == "the same placement"
    assert gaps["original"]["loss verdict"] == "won"
