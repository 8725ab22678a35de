"""The study of the defaults runs, resumes, and counts what failed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import _data, finetune_defaults


def _images(path: Path) -> _data.Labeled:
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, 256, (12, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return _data.Labeled(x, torch.arange(12) % 10)


def _network(folder: Path) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)),
    ).eval()


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    size = dataclasses.replace(
        finetune_defaults.QUICK, layers="3", steps=2, batch=4, test=6, scales=(0.1, 1.0), warmups=("0",)
    )
    monkeypatch.setattr(finetune_defaults, "QUICK", size)
    monkeypatch.setattr(finetune_defaults, "network", _network)
    monkeypatch.setattr(_data, "cifar_jpeg", _images)
    monkeypatch.setattr(_data, "missing", lambda names, folder: [])


def _run(folder: Path, *more: str) -> list[dict[str, Any]]:
    arguments = ["--quick", "--types", "sekg", "--results", str(folder), "--data", str(folder), *more]
    assert finetune_defaults.main(arguments) == 0
    rows: list[dict[str, Any]] = json.loads((folder / "finetune_defaults-quick.json").read_text())["rows"]
    return rows


def test_every_setting_has_a_row_and_none_is_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _run(tmp_path)
    assert [(row["type"], row["scale"]) for row in rows] == [("conv", 1.0), ("sekg", 0.1), ("sekg", 1.0)]
    assert len({row["loss_before"] for row in rows}) <= 2
    assert rows[1]["loss"] != rows[2]["loss"]
    headers, lines = finetune_defaults.lines(rows)
    assert headers[3:] == ["new x 0.1", "new x 1"]
    assert [line[0] for line in lines] == ["conv", "sekg"]
    assert lines[0][3] == ""  # the unconverted network has no new parameters
    assert lines[1][3].startswith(f"{rows[1]['loss']:.3f} / ")
    assert finetune_defaults.lines([rows[1] | {"loss": None}])[1][0][3] == "1 failed"

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("this row was there")

    monkeypatch.setattr(finetune_defaults, "one", fail)
    assert _run(tmp_path) == rows


def test_absent_data_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(_data, "missing", lambda names, folder: list(names))
    assert finetune_defaults.main(["--quick", "--results", str(tmp_path), "--data", str(tmp_path)]) == 2
    assert "cifar10/train_jpeg_20k.npz" in capsys.readouterr().err
