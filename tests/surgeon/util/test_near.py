"""Hints for misspelled names."""

from pathlib import Path

import pytest

from surgeon.util.near import no_folder


def test_a_missing_folder_has_the_most_similar_one_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "val").mkdir(parents=True)
    (tmp_path / "photo.txt").write_text("a file")
    assert no_folder("photo") == "there is no folder photo. Did you mean 'photos'?"
    assert no_folder("photos/vall") == "there is no folder photos/vall. Did you mean 'photos/val'?"
    assert no_folder(tmp_path / "xyz" / "val") == f"there is no folder {tmp_path / 'xyz' / 'val'}"
    assert no_folder("unlike") == "there is no folder unlike"
