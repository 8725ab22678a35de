"""`surgeon zoo`: lists, explains and compares."""

import json
import re

import pytest

import surgeon.zoo as zoo
from surgeon.cli import main
from surgeon.zoo.recipes import recipe_names
from surgeon.zoo.table import ZooRow, make_row
from tests.support.places import ROOT


def test_lists_every_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == zoo.names()
    assert all(len(line.split(maxsplit=1)[1]) > 10 for line in lines)


def test_json_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "lenet", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["name"] == "lenet"
    assert one["params"] == 62_006
    assert main(["zoo", "pafu_linear*", "--json"]) == 0
    several = json.loads(capsys.readouterr().out)
    assert len(several) == 8
    assert all(entry["recipe"][0]["type"] == "pafu" for entry in several)


def test_one_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "lenet_acda"]) == 0
    out = capsys.readouterr().out
    assert "Table 1" in out
    assert "made from   lenet" in out
    recipe = json.loads(out[out.index("[\n") :])
    assert recipe[0]["layers"] == "conv1,conv2"


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "acda_?i*", "--table", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["acda_sidd"]
    assert rows[0]["params_off"] == pytest.approx(-0.008, abs=0.001)
    assert main(["zoo", "sidd", "--table"]) == 0
    out = capsys.readouterr().out
    assert "1.783M" in out
    assert "-21.8%" in out
    assert "sidd_conv: the paper gives no widths" in out
    assert main(["zoo", "sidd_conv", "--markdown"]) == 0
    assert "| `sidd_conv` | 1,782,771 | 2.28 M | -21.8% |" in capsys.readouterr().out


def test_unknown_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "ad_resnet_xl"]) == 2
    assert "Did you mean ad_resnet_l" in capsys.readouterr().err


def test_a_difference_without_a_reason_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = zoo.entry("sidd_conv")
    monkeypatch.setitem(vars(zoo.registry)["_ENTRIES"], "sidd_conv", type(found)(**{**vars(found), "difference": ""}))
    assert main(["zoo", "sidd_conv", "--table"]) == 1
    assert "sidd_conv is off by more than 1 %" in capsys.readouterr().err


def test_macs_are_counted_by_hand() -> None:
    """SRCNN 9-5-5 at 48×48."""
    row = make_row("srcnn")
    assert isinstance(row, ZooRow)
    assert row.macs == 48 * 48 * (81 * 3 * 64 + 25 * 64 * 32 + 25 * 32 * 3)


def test_the_documented_table_is_up_to_date() -> None:
    recipes, _, text = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8").partition("## Published and ours")
    named = [
        name
        for line in recipes.splitlines()
        if line.startswith("| `")
        for name in re.findall("`(\\w+)`", line.split("|")[1])
    ]
    assert sorted(named) == recipe_names()
    listed = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert listed == zoo.names()
    for name in ("adfnet", "ad_resnet_s", "lenet_acda"):
        count = sum(p.numel() for p in zoo.create(name).parameters())
        assert f"| `{name}` | {count:,} |" in text
        assert zoo.entry(name).difference in text
