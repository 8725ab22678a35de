"""The benchmark of compiled operators in layers and networks compares two ways that compute the same."""

import json
from pathlib import Path

import pytest

from benchmarks import native_models
from benchmarks._operator_cases import SHAPES


def test_compares_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for shape in SHAPES:
        monkeypatch.setitem(SHAPES, shape, (1, 8, 8))
    networks = list(native_models.cases(32))
    monkeypatch.setattr(native_models, "cases", lambda size: networks[::5])  # without the large ones
    assert native_models.main(["--repeats", "1", "--results", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "native_models.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["acda A", "pafu B", "sekg C"]
    assert all(row["difference"] < 1e-4 for row in rows)
    assert "torch / native" in capsys.readouterr().out
