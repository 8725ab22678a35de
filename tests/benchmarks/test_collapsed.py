"""The program that folds a converted network back."""

import json
from pathlib import Path

import pytest

from benchmarks import collapsed, report


def test_collapsed_is_the_original_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--group-size", "2", "--batch", "1", "--size", "32", "--repeats", "1", "--results", str(tmp_path)]
    assert collapsed.main(small) == 0
    content = json.loads((tmp_path / "collapsed.json").read_text())
    plain, converted, folded = content["rows"]
    assert plain["flops"] == folded["flops"] < converted["flops"]
    assert plain["parameters"] == folded["parameters"] < converted["parameters"]
    assert content["kept"] == []
    assert content["units"] == 17
    assert content["max_rel_error"] <= 1e-5
    assert "17 units, 17 folded" in capsys.readouterr().out
    assert "resnet18, 17 units, 0 kept" in report.collapsed(content)
