"""The additive table against whole traces, its look-ups, its cache, the commands and the picture."""

import argparse
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from surgeon.commands import bench as bench_command
from surgeon.commands import cost as cost_command
from surgeon.costs import CostTable, Option, cost, cost_table, store
from surgeon.costs.build import option_layer
from surgeon.costs.plot import draw
from surgeon.errors import ConfigError, SurgeonError
from surgeon.layers.registry import layer_types
from surgeon.search.budget import Calibration
from surgeon.sites.sites import find_sites

OPTIONS = [Option(name, {}) for name in layer_types()] + [Option("pafu", {"group_size": 3})]


def place(model: nn.Module, table: CostTable, placement: Any, options: list[Option]) -> nn.Module:
    work = copy.deepcopy(model)
    geometries = {site.name: site.geometry for site in find_sites(model).convs}
    configs: dict[Any, Any] = {}
    for layer, choice in zip(table.layers, placement, strict=True):
        geometry = geometries[layer]
        if choice:
            assert geometry is not None
            work.set_submodule(layer, option_layer(geometry, options[choice - 1], configs))
    return work


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("resnet18", {"amp": True, "optimizer": "adamw", "channels_last": True}),
        ("test_efficientnet", {"mode": "infer"}),
        ("convnext_atto", {"accumulate": 2}),
        pytest.param("resnet18", {}, marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", {"mode": "infer"}, marks=pytest.mark.slow),
    ],
)
def test_table_sums_are_whole_traces(name: str, settings: dict[str, Any]) -> None:
    model = timm.create_model(name)
    table = cost_table(model, OPTIONS, batch_size=4, cache=False, **settings)
    rng = np.random.default_rng(0)
    placements = [np.zeros(len(table.layers), dtype=np.int64)]
    for _ in range(2):
        choice = [rng.choice(np.flatnonzero(allowed)) if rng.random() < 0.5 else 0 for allowed in table.allowed]
        placements.append(np.array(choice))
    found = table.look_up(np.stack(placements))
    for i, placement in enumerate(placements):
        whole = cost(place(model, table, placement, OPTIONS), batch_size=4, **settings)
        assert found.peak_bytes[i] == pytest.approx(whole.peak_bytes, rel=0.001)
        assert found.flops[i] == pytest.approx(whole.flops, rel=1e-6)
        assert found.backward_flops[i] == pytest.approx(whole.backward_flops, rel=1e-6)
        assert found.params[i] == whole.params


@pytest.fixture(scope="module")
def table() -> CostTable:
    return cost_table(
        timm.create_model("resnet18"), [Option("pafu", {}), Option("pafu", {"group_size": 4})], cache=False
    )


def test_look_ups_are_what_the_rows_say(table: CostTable) -> None:
    placement = table.placement({table.layers[3]: "pafu(group_size=4)", table.layers[5]: "pafu"})
    rows = {(row.layer, row.option): row for row in table.rows}
    chosen = [rows[table.layers[3], "pafu(group_size=4)"], rows[table.layers[5], "pafu"]]
    found = table.look_up(placement)
    assert found.flops[0] == pytest.approx(table.base["flops"] + sum(row.flops for row in chosen))
    assert found.params[0] == table.base["params"] + sum(row.params for row in chosen)
    exact = (table.windows + sum(table.memory[i, o] for i, o in enumerate(placement))).max()
    assert found.peak_bytes[0] == exact
    many = table.look_up(np.tile(placement, (5000, 1)), chunk=999)
    assert (many.peak_bytes == exact).all()


def test_wrong_placements(table: CostTable) -> None:
    for wrong in (np.zeros((2, 3), dtype=int), np.full(len(table.layers), 9), np.zeros(len(table.layers))):
        with pytest.raises(ConfigError, match="placements"):
            table.look_up(wrong)
    with pytest.raises(ConfigError, match="nowhere"):
        table.placement({"nowhere": "pafu"})


def test_tables_are_kept_by_what_they_depend_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path))
    model, options = timm.create_model("resnet18"), [Option("pafu", {"group_size": 2})]
    first = cost_table(model, options, layers="layer4.1")
    files = list((tmp_path / "cost").iterdir())
    assert len(files) == 1
    monkeypatch.setattr("surgeon.costs.build.build", lambda *_: pytest.fail("built again"))
    again = cost_table(timm.create_model("resnet18"), options, layers="layer4.1")
    assert again.rows == first.rows
    assert (again.memory == first.memory).all()
    files[0].write_bytes(b"broken")
    assert store.load(files[0].stem) is None
    monkeypatch.undo()


# --- the commands -----------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: str, module: Any = cost_command) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    for flag in ("--json", "--quiet"):
        parser.add_argument(flag, action="store_true")
    code = module.run(parser.parse_args(words))
    return code, capsys.readouterr().out


def test_cost_prints_and_compares(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "resnet18", "--batch-size", "8", "--amp", "--compare", "resnet34")
    assert code == 0
    assert "FLOPs per image, forward" in out
    assert "resnet34" in out
    code, out = run(capsys, "resnet18", "--json", "--infer", "--table", "--layers", "layer4.1")
    document = json.loads(out)
    assert code == 0
    assert document["flops"] == 3_628_146_688
    assert {row["layer"] for row in document["table"]} == {"layer4.1.conv1", "layer4.1.conv2"}


def test_budgets_decide_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "resnet18", "--max-flops", "4G", "--max-memory", "8GiB")[0] == 0
    code, out = run(capsys, "resnet18", "--max-flops", "1G")
    assert code == 1
    assert "over budget: 3,628,146,688 FLOPs per image, above 1,000,000,000 FLOPs" in out
    assert (
        "MiB of memory with margin, above 9.0 MiB"
        in run(capsys, "test_resnet", "--input-size", "32", "--max-memory", "9MiB")[1]
    )
    found = json.loads(run(capsys, "test_resnet", "--input-size", "32", "--json")[1])
    assert found["needed_bytes"] == round(found["peak_bytes"] * Calibration().margin + sum(found["reserve"].values()))
    between = (found["total_bytes"] + found["needed_bytes"]) // 2
    assert run(capsys, "test_resnet", "--input-size", "32", "--max-memory", f"{between}B")[0] == 1
    assert run(capsys, "test_resnet", "--input-size", "32", "--max-memory", f"{found['needed_bytes']}B")[0] == 0
    with pytest.raises(ConfigError, match="--max-flops: '1GiB' is a number of bytes"):
        run(capsys, "resnet18", "--max-flops", "1GiB")
    with pytest.raises(ConfigError, match=r"--max-memory.*4\.5G"):
        run(capsys, "resnet18", "--max-memory", "4,5G")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so only where there is no CUDA device")
def test_measuring_without_a_device_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SurgeonError, match="needs a CUDA device") as failure:
        run(capsys, "resnet18", "--measure")
    assert failure.value.exit_code == 1


@pytest.mark.gpu
def test_prediction_against_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    _, out = run(capsys, "resnet50", "--batch-size", "32", "--measure", "--json")
    assert abs(json.loads(out)["measured"]["error"]) < 0.1


def test_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "memory.png"
    assert run(capsys, "resnet18", "--batch-size", "4", "--plot", str(file))[0] == 0
    with Image.open(file) as image:
        assert image.size[0] == 1000
        assert len(image.convert("RGB").getcolors(2**24) or []) > 20
    found = cost(timm.create_model("resnet18"))
    for wrong in (tmp_path / "memory.txt", tmp_path / "memory.png" / "memory.png"):
        with pytest.raises(ConfigError):
            draw(found, wrong)
    draw(found, tmp_path / "new" / "memory.png")
    assert (tmp_path / "new" / "memory.png").is_file()


def test_bench_compares_interleaved(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("zoo/resnet20_cifar", "--compare", "zoo/resnet20_cifar", "--rounds", "2", "--device", "cpu", "--json")
    code, out = run(capsys, *words, module=bench_command)
    document = json.loads(out)
    assert code == 0
    assert document["memory_ratio"] == 1
    assert [row["model"] for row in document["models"]] == ["original", "converted"]


def test_commands_load_no_torch_before_they_run(root: Path) -> None:
    code = "import sys, surgeon.commands.cost, surgeon.commands.bench; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], cwd=root, env={"PYTHONPATH": str(root)}).returncode == 0
