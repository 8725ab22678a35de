"""Odd numbers, odd names, full disks, missing homes, kills: one clear line, nothing left behind."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgeon
from surgeon.cli import main
from surgeon.errors import ConfigError, RecipeError, SurgeonError
from surgeon.layers.registry import layer_class

Capture = pytest.CaptureFixture[str]
CONVERT = ["convert", "test_resnet", "--weights", "random", "--input-size", "32", "--quiet", "--dry-run"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fails(argv: list[str], words: str, capsys: Capture, code: int = 2) -> None:
    """The command fails with one line that has these words, and leaves no file."""
    assert main([argv[0], "--quiet", *argv[1:]]) == code
    out, error = capsys.readouterr()
    lines = [line for line in error.splitlines() if line and not line.startswith(("usage:", " "))]
    assert len(lines) == 1, error
    assert words in lines[0], lines[0]
    assert out == ""
    assert not [path for path in Path().rglob("*") if "partial" in path.name or path.suffix == ".tmp"]


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "option", "value", "most"),
    [
        ("acda", "atoms", 257, 256),
        ("acda", "scales", 60, 16),
        ("acda", "basis_size", 2000, 64),
        ("acda", "hidden", 10**9, 65536),
        ("acda", "static_atoms", 10**9, 65536),
        ("acda", "extra_elements", 10**12, 65536),
        ("pafu", "group_size", 100_000, 1024),
        ("pafu", "selector_depth", 10**30, 64),
        ("pafu", "supports", (10**6 + 1,), 127),
        ("sekg", "kernel_size", 10**6, 127),
        ("sekg", "kernel_groups", 10**30, 65536),
    ],
)
def test_every_option_of_a_layer_has_an_upper_end(kind: str, option: str, value: Any, most: int) -> None:
    """R2: a few bytes of a recipe ask for terabytes or for hours."""
    with pytest.raises(ConfigError, match=f"{option} must be at most {most}, got"):
        layer_class(kind).Config(**{option: value})


def test_layers_for_which_there_is_no_memory(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """R2: the bytes are known before anything is allocated, and the bound can be raised."""
    options = ["--layers", "stage4", "--type", "acda"]
    large = [*options, "--option", "hidden=65536", "atoms=256", "basis_size=64"]
    monkeypatch.setenv("SURGEON_MEMORY", "8GiB")
    fails(
        [*CONVERT, *large],
        "bytes (75.5 GiB), and this machine has 8.0 GiB; if this is intended, set SURGEON_MEMORY",
        capsys,
    )
    monkeypatch.setenv("SURGEON_MEMORY", "64KiB")
    fails([*CONVERT, *options], "this machine has 0.0 GiB", capsys)
    monkeypatch.setenv("SURGEON_MEMORY", "much")
    fails([*CONVERT, *options], "SURGEON_MEMORY: cannot read 'much'", capsys)
    monkeypatch.setenv("SURGEON_MEMORY", "2GiB")
    assert main([*CONVERT, *options]) == 0


def test_a_folder_whose_layers_ask_for_terabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R2: the recipe of a surgeon folder asks for layers that this machine has no memory for."""
    from surgeon.models.checkpoint import apply_rules
    from surgeon.records.recipe import Rule

    monkeypatch.setenv("SURGEON_MEMORY", "8GiB")
    rule = Rule(layers="0", type="acda", options={"hidden": 65536, "atoms": 256, "basis_size": 64})
    with pytest.raises(ConfigError, match=r"this machine has 8\.0 GiB"):
        apply_rules(nn.Sequential(nn.Conv2d(64, 64, 3)), (rule,), "recipe")


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("vit_tiny_patch16_224", ["embed_dim=10000000"], "this machine has"),
        ("resnet18", ["layers=[100000,2,2,2]"], "would have more than"),
        ("test_resnet", ["num_classes=20000000000"], "no option of a network is as large as"),
        ("test_resnet", ["num_classes=10000000"], "this machine has"),
        ("test_resnet", ["num_classes=1e400"], "is not a finite number"),
        ("test_resnet", ["num_classes=" + "1" * 5000], "5000 digits"),
    ],
)
def test_options_of_a_network_that_ask_for_anything(
    model: str, options: list[str], words: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R2: timm's own size options."""
    monkeypatch.setattr("surgeon.surgery.sizes._MODULES", 1000)
    monkeypatch.setenv("SURGEON_MEMORY", "1GiB")
    for weights in ("random", "auto"):
        argv = ["convert", model, "--weights", weights, "--type", "pafu", "--dry-run", "--quiet"]
        fails([*argv, "--model-args", *options], words, capsys)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--input-size", "100000"], "an input of 2 x 3 x 100000 x 100000 would take 240,000,000,000 bytes"),
        (["--seed", "9" * 30], "--seed: expected an integer from 0 to 2^63 - 1"),
        (["--seed", "9" * 5000], "--seed: expected an integer from 0 to 2^63 - 1"),
        (["--seed", "-1"], "--seed: expected an integer from 0 to 2^63 - 1"),
        (["--num-classes", "9" * 12], "expected at most 2,147,483,647"),
        (["--atoms", "9" * 12], "expected at most 2,147,483,647"),
    ],
)
def test_numbers_beyond_reason(more: list[str], words: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """R2: sizes, seeds and counts have an upper end."""
    monkeypatch.setenv("SURGEON_MEMORY", "64GiB")
    fails([*CONVERT, "--type", "pafu", *more], words, capsys)


def test_other_numbers_beyond_reason(capsys: Capture) -> None:
    """R2, R3: budgets, rungs and rules."""
    fails(["cost", "test_resnet", "--max-memory", "1e400"], "more than any machine has", capsys)
    search = ["search", "test_resnet", "--task", "denoising", "--data", "."]
    fails([*search, "--rung", "1000000"], "--rung must be at most 20", capsys)
    fails([*search, "--jobs", "100000"], "--jobs must be at most 1024", capsys)
    rules = [{"layers": "stage4", "type": "pafu"}] * 10_001
    with pytest.raises(RecipeError, match="10,001 rules"):
        surgeon.Recipe.from_dict({"format": "surgeon-recipe", "version": 1, "rules": rules})


# --- odd weights and inputs -----------------------------------------------------------------------------------------


def three() -> nn.Sequential:
    """Three convolutions in a row."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()


@pytest.mark.parametrize("kind", ["acda", "pafu", "sekg"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(kind: str, value: float) -> None:
    """R5: NaN or Inf weights: that layer is refused with its reason, the others are converted."""
    model = three()
    with torch.no_grad():
        model[4].weight[0, 0] = value
    _, report = surgeon.convert(model, layers="all", type=kind, example_inputs=torch.randn(1, 3, 16, 16))
    assert [layer.name for layer in report.replaced] == ["0", "2"]
    assert [(layer.name, layer.reasons) for layer in report.skipped] == [
        ("4", ("its weights contain NaN or infinity",))
    ]


def test_calibration_data_that_are_not_finite() -> None:
    """R5: NaN in what a compressed layer is fitted to."""
    x = torch.randn(2, 3, 16, 16)
    with pytest.raises(SurgeonError, match="its input contains NaN or infinity on the calibration data"):
        surgeon.convert(
            three(), layers="all", type="acda", static_atoms=0, example_inputs=x, calibration=x * float("nan")
        )


@pytest.mark.parametrize("kind", ["acda", "pafu", "sekg"])
@pytest.mark.parametrize("size", [1e-45, 1e-41, 1e-36])
def test_weights_that_are_denormal(kind: str, size: float) -> None:
    """R5: the step down a gradient as small as a denormal number overflowed."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    with torch.no_grad():
        model[0].weight.uniform_(-size, size)
    _, report = surgeon.convert(model, layers="all", type=kind, example_inputs=torch.randn(1, 3, 16, 16))
    assert len(report.replaced) == 1
    assert any("denormal" in note for note in report.notes) == (size < 1e-38)


class Constants(nn.Module):
    """Its first convolution sees constants, whatever the input."""

    def __init__(self, constant: str) -> None:
        super().__init__()
        self.first, self.second, self.constant = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), constant
        self.parameter = nn.Parameter(torch.randn(1, 3, 16, 16))
        self.register_buffer("buffer", torch.randn(1, 3, 16, 16))
        self.plain = torch.randn(1, 3, 16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = {"fresh": torch.ones(1, 3, 16, 16), "like": torch.zeros_like(x)}
        given = made.get(self.constant, getattr(self, self.constant, x))
        out: torch.Tensor = self.second(self.first(given) * x.mean())
        return out


@pytest.mark.parametrize("constant", ["parameter", "buffer", "plain", "fresh", "like"])
@pytest.mark.parametrize("as_graph", [False, True])
def test_a_first_convolution_that_gets_constants(constant: str, as_graph: bool) -> None:
    """R5: `Boolean value of Tensor with more than one value is ambiguous`."""
    x = torch.randn(2, 3, 16, 16)
    options: dict[str, Any] = {"example_inputs": x, "as_graph": as_graph, "calibration": x}
    _, report = surgeon.convert(Constants(constant).eval(), layers="all", type="acda", static_atoms=0, **options)
    assert len(report.replaced) == 2


@pytest.mark.parametrize("do", ["convert", "inspect", "calibrate", "collapse", "verify", "export"])
def test_a_batch_without_images(do: str) -> None:
    """R5: a batch of 0 images as example."""
    none, x = torch.zeros(0, 3, 16, 16), torch.randn(2, 3, 16, 16)
    acts = {
        "convert": lambda: surgeon.convert(three(), layers="all", type="pafu", example_inputs=none),
        "inspect": lambda: surgeon.inspect(three(), none),
        "calibrate": lambda: surgeon.convert(
            three(), layers="all", type="acda", static_atoms=0, example_inputs=x, calibration=none
        ),
        "collapse": lambda: surgeon.collapse(
            surgeon.convert(three(), layers="all", type="pafu", example_inputs=x)[0], calibration=none
        ),
        "verify": lambda: surgeon.verify(three(), three(), example_inputs=none),
        "export": lambda: surgeon.export(three(), "m.pt2", format="torch", example_inputs=none),
    }
    with pytest.raises(SurgeonError, match="an empty batch"):
        acts[do]()


# --- full disks, no home, odd names ---------------------------------------------------------------------------------


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk on which nothing can be finished."""

    def fail(*rest: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(Path, "replace", fail)


PLACE = ["place", "test_resnet", "--weights", "random", "--gains", "uniform", "--max-flops", "+10%"]
PLACE += ["--input-size", "64", "--batch-size", "2", "--layers", "stage4", "--types", "pafu", "--quiet"]
WRITERS = {
    "a cost's plot": ["cost", "test_resnet", "--input-size", "64", "--plot", "m.png"],
    "a recipe": [*PLACE, "-o", "r.json"],
    "an archive": ["export", "test_resnet", "-o", "m.pt2", "--input-size", "64", "--free", "none", "--quiet"],
    "a folder": ["convert", *CONVERT[1:-1], "--layers", "stage4", "--type", "pafu", "-o", "run"],
}


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize("argv", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    argv: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R6: cost --plot, place -o, export and convert; the caches of costs, which are not kept then, say nothing."""
    monkeypatch.setenv("SURGEON_CACHE", "cache")
    monkeypatch.setenv("SURGEON_BACKEND", "torch")  # no line about compiling, whatever ran before
    argv = [*argv, "--weights", "random"] if argv[0] == "export" else argv
    assert main([argv[0], "--quiet", *argv[1:]]) in (1, 2)
    out, error = capsys.readouterr()
    assert len(error.splitlines()) == 1, error
    assert "No space left on device" in error
    assert "cannot write" in error
    assert out == ""
    assert not [path for path in Path().rglob("*") if path.is_file()]


@pytest.mark.usefixtures("full")
def test_whatever_else_is_written_on_a_full_disk(tmp_path: Path) -> None:
    """R6: the files of a search, gain tables, pictures, folders of pictures."""
    import numpy as np

    from surgeon.search.gains.gain import GainTable, cached
    from surgeon.search.study.folder import write_json
    from surgeon.util.files import filling

    table = GainTable(
        layers=("a",), options=("keep", "pafu"), gain=np.zeros((1, 2)), error=np.zeros((1, 2)), estimator="toy"
    )
    with pytest.raises(SurgeonError, match=r"cannot write .*: No space left on device"):
        write_json(tmp_path / "search.json", {})
    with pytest.raises(SurgeonError, match=r"cannot write .*: No space left on device"):
        table.write(tmp_path / "gains.json")
    with (
        pytest.raises(SurgeonError, match=r"cannot write .*: No space left on device"),
        filling(tmp_path / "out") as fresh,
    ):
        (fresh / "a.png").write_bytes(b"x")
    assert cached("key", lambda: table) is table
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_killed_processes_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """R6: files and folders of processes that were killed while they wrote."""
    from surgeon.util.files import write_text
    from surgeon.util.machine import machine

    left = [tmp_path / f".{name}.partial-{machine()}-4194305-0" for name in ("r.json", "another.json")]
    other = tmp_path / ".r.json.partial-elsewhere-4194305-0"
    for folder in (*left, other):
        folder.mkdir()
        (folder / "r.json").write_text("half")
    write_text(tmp_path / "r.json", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "r.json"]
    os.utime(other, (0, 0))  # another machine's, of long ago
    write_text(tmp_path / "r.json", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize("command", ["doctor", "place", "cost"])
def test_no_home(
    command: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """R7: HOME unset and no passwd entry: tables are kept in a temporary folder, which is said once."""
    from surgeon.util import files

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SURGEON_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    files.__dict__["_temporary_cache"].cache_clear()
    cost = ["cost", "test_resnet", "--table", "--layers", "stage4", "--input-size", "64", "--batch-size", "2"]
    argv = {"doctor": ["doctor"], "place": PLACE, "cost": cost}
    for _ in range(2):
        assert main(argv[command]) == 0
    told = [record for record in caplog.records if "no home folder" in record.message]
    assert len(told) == 1
    assert "set SURGEON_CACHE" in told[0].message


LONG = "x" * 300


@pytest.mark.parametrize(
    "argv",
    [
        ["verify", LONG],
        ["convert", LONG, "--type", "pafu"],
        [*CONVERT[:-1], "--type", "pafu", "-o", LONG],
        [*CONVERT, "--recipe", LONG],
        ["convert", "test_resnet", "--weights", LONG, "--type", "pafu"],
        ["study", "status", LONG],
        ["cost", "test_resnet", "--input-size", "64", "--plot", f"{LONG}.png"],
        ["export", "test_resnet", "-o", f"{LONG}.pt2", "--weights", "random"],
        [*PLACE[:-5], "--space", LONG],
        ["evaluate", LONG, "--task", "denoising", "--data", "."],
    ],
)
def test_names_longer_than_any_file_has(argv: list[str], capsys: Capture) -> None:
    """R8: names over 255 bytes."""
    fails(argv, "File name too long", capsys)


def test_names_of_just_the_longest_length(tmp_path: Path) -> None:
    """R8: what is written has a longer name only in its own unfinished folder."""
    from surgeon.util.files import write_text

    write_text(tmp_path / ("x" * 255), "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 255]


@pytest.mark.parametrize(
    "argv",
    [
        ["export", "test_resnet", "-o=--"],
        ["convert", "test_resnet", "--output=--"],
        ["inspect", "test_resnet", "--weights=--"],
        ["place", "test_resnet", "--max-flops=--"],
        ["cost", "test_resnet", "--batch-size=--"],
        ["convert", "test_resnet", "-o", "a", "b"],
    ],
)
def test_options_without_their_value(argv: list[str], capsys: Capture) -> None:
    """R8: `-o=--` was an empty list in Python's argparse; several names for one option."""
    fails(argv, "unexpected 'b'" if argv[-1] == "b" else "expected one argument, got '--'", capsys)


def test_json_is_one_document_whatever_is_printed(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """R10: what libraries print while weights are fetched goes to stderr."""
    from surgeon.commands import inspect as inspect_command

    build = inspect_command.build
    monkeypatch.setattr(inspect_command, "build", lambda args: (print("Downloading: 100 %"), build(args))[1])
    assert main(["inspect", "test_resnet", "--weights", "random", "--input-size", "32", "--json"]) == 0
    out, error = capsys.readouterr()
    assert json.loads(out)["model"] == "test_resnet"
    assert "Downloading" in error


def test_the_table_of_the_zoo_is_there_at_once(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """R10, N3: its numbers come with surgeon; to count them again is asked for."""
    from surgeon.zoo import table

    counted: list[str] = []
    count = table.__dict__["_count"]
    monkeypatch.setattr(table, "_count", lambda found, at: (counted.append(found.name), count(found, at))[1])
    for how in ("--table", "--markdown"):
        assert main(["zoo", how]) == 0
        assert capsys.readouterr().out.count("adfnet") >= 1
    assert counted == []
    assert main(["zoo", "lenet", "--table", "--fresh", "--quiet"]) == 0
    assert set(counted) == {"lenet"}


@pytest.mark.parametrize("name", ["lenet_acda", "srcnn", "mcnn", "resnet20_cifar"])
def test_numbers_of_the_zoo_are_those_of_its_networks(name: str) -> None:
    """R10, N3: after a change: python -c "from surgeon import zoo; from surgeon.zoo.table import *; write_counted(zoo.names())"."""
    from surgeon.zoo.table import make_row

    assert make_row(name) == make_row(name, fresh=True)


@pytest.mark.slow
def test_all_numbers_of_the_zoo_are_those_of_its_networks() -> None:
    """R10, N3: the whole table that comes with surgeon."""
    from surgeon import zoo
    from surgeon.zoo.table import make_table

    assert make_table(zoo.names()) == make_table(zoo.names(), fresh=True)
