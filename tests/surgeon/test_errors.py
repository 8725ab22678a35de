"""An error names a flag to the reader at a terminal, and an argument to the reader of a Python traceback."""

from pathlib import Path

import pytest
import timm

import surgeon
from surgeon.cli import main
from surgeon.errors import ConfigError


def test_each_reader_gets_the_words_of_their_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "model.onnx"
    there.write_bytes(b"")
    assert main(["export", "test_resnet", "-o", str(there), "--quiet"]) == 2
    terminal = capsys.readouterr().err
    assert "choose another with -o, or replace it with --force" in terminal
    assert "True" not in terminal
    with pytest.raises(ConfigError, match="choose another, or replace it with force=True"):  # also after a command
        surgeon.export(timm.create_model("test_resnet"), there)
