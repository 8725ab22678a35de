"""docs/own_network.md: its file, commands and Python run in its order, and say what the page says."""

import logging
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import transcripts
from surgeon.cli import main
from surgeon.commands.common.arguments import model_name
from tests.support.places import ROOT

PAGE = (ROOT / "docs" / "own_network.md").read_text()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the page's files and photos, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name, content in transcripts.files(PAGE).items():
        Path(name).write_text(content)
    for part in ("train", "val"):
        Path("photos", part).mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(Path("photos", part, "one.png"))
    yield tmp_path
    sys.modules.pop("mynet", None)


@pytest.mark.long
def test_the_page_is_true(folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    (block,) = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    python, *commands = [shlex.split(line) for line in block.splitlines()]
    torch.manual_seed(1)  # not 0, from which `make` makes the weights that stand for the original's
    runpy.run_path(python[1], run_name="__main__")
    assert [words[1] for words in commands] == ["convert", "finetune", "evaluate", "export"]
    for words in commands:
        if "--max-steps" in words:
            words[words.index("--max-steps") + 1] = "1"
        capsys.readouterr()
        assert main([*words[1:], "--quiet"]) == 0, words
        if words[1] == "convert":
            said = capsys.readouterr().out.splitlines()
            assert said[-2:] == [
                "written to  runs/mynet-sekg",
                "built by    mynet:make: other commands run it with --trust-factory",
            ]
    assert (folder / "mynet.pt2").is_file()

    _, code = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    with caplog.at_level(logging.WARNING):
        exec(compile(code, "docs/own_network.md", "exec"), {})
    (warning,) = [record.getMessage() for record in caplog.records if "no way to rebuild" in record.getMessage()]
    assert "surgeon.save(..., factory='module:NAME') records" in warning
    capsys.readouterr()
    assert main(["verify", "runs/repaired", "--trust-factory", "--quiet"]) == 2
    assert "the weights of mynet:make came from a model object and are not recorded" in capsys.readouterr().err
    assert main(["verify", "runs/repaired", "--trust-factory", "--quiet", "--weights", "mynet.pth"]) == 0
    assert main(["verify", "runs/named", "--trust-factory", "--quiet"]) == 0


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("mynet:make", "mynet"),
        ("own.nets:build_model", "nets"),
        ("own.nets:small_denoiser", "small_denoiser"),
        ("torchvision/resnet18", "resnet18"),
        ("runs/model", "model"),
        ("resnet50", "resnet50"),
    ],
)
def test_folders_are_named_by_the_module_where_the_function_says_nothing(spec: str, name: str) -> None:
    assert model_name(spec) == name
