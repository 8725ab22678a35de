"""Odd numbers, odd names, full disks, missing homes, kills: one clear line, nothing left behind."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import surgeon
from surgeon.cli import main
from surgeon.errors import ConfigError, RecipeError
from surgeon.layers.registry import layer_class

Capture = pytest.CaptureFixture[str]
CONVERT = ["convert", "test_resnet", "--weights", "random", "--input-size", "32", "--quiet", "--dry-run"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fails(argv: list[str], words: str, capsys: Capture, code: int = 2) -> None:
    """The command fails with one line that has these words, and leaves no file."""
    assert main(argv) == code
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
    fails([*CONVERT, *large], "bytes (75.5 GiB), and this machine has 8.0 GiB; if it is meant, set SURGEON_MEMORY", capsys)
    monkeypatch.setenv("SURGEON_MEMORY", "64KiB")
    fails([*CONVERT, *options], "this machine has 0.0 GiB", capsys)
    monkeypatch.setenv("SURGEON_MEMORY", "much")
    fails([*CONVERT, *options], "SURGEON_MEMORY: cannot read 'much'", capsys)
    monkeypatch.setenv("SURGEON_MEMORY", "2GiB")
    assert main([*CONVERT, *options]) == 0


def test_a_folder_whose_layers_ask_for_terabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R2: the recipe of a surgeon folder asks for layers that this machine has no memory for."""
    from surgeon.checkpoint import apply_rules
    from surgeon.recipe import Rule

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
    monkeypatch.setattr("surgeon.sizes._MODULES", 1000)
    monkeypatch.setenv("SURGEON_MEMORY", "1GiB")
    argv = ["convert", model, "--weights", "random", "--type", "pafu", "--dry-run", "--quiet"]
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
