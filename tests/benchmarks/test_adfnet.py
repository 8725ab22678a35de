"""The ADFNet benchmark compares two formulations that compute the same."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import adfnet


def test_compares_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    def grown(module: str, args: list[str], threads: int) -> int:
        asked.append(args[1])
        return 10**6 * len(asked)

    monkeypatch.setattr(adfnet, "in_subprocess", grown)
    assert adfnet.main(["--size", "16", "--repeats", "1", "--results", str(tmp_path)]) == 0
    document: dict[str, Any] = json.loads((tmp_path / "adfnet.json").read_text())
    assert asked == ["surgeon", "unfold"]
    assert document["memory_ratio"] == 2
    assert document["surgeon"]["cpu_ms"] > 0
    assert document["difference"] < 1e-5
    assert "unfold / surgeon" in capsys.readouterr().out


def test_measures_a_peak(capsys: pytest.CaptureFixture[str]) -> None:
    assert adfnet.main(["--peak-of", "unfold", "--size", "64", "--step"]) == 0
    assert int(capsys.readouterr().out) >= 0
