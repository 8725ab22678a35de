"""docs/tour.md is what its commands print, and the excerpts elsewhere are what docs/tour.md says."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from benchmarks import transcripts
from surgeon.cli import main

TOUR = transcripts.TOUR.read_text()
DEPENDS_ON_DIGITS = (
    "search",
    "study",
    "collapse",
    "visualize",
)  # what is chosen, folded, counted may differ by machine


def masked(output: str) -> str:
    """Without the digits of numbers, and the widths of columns."""
    return re.sub(r"[ -]+", " ", re.sub(r"[+-]?\d[\d.,]*(e[+-]\d+)?", "#", output))


def test_the_tour_is_the_hour() -> None:
    shown = [command.split()[1] for command in transcripts.transcript(TOUR) if command.startswith("surgeon")]
    order = ["inspect", "convert", "finetune", "evaluate", "search", "export"]
    assert [name for name in dict.fromkeys(shown[1:]) if name in order] == order
    assert {"verify", "visualize", "collapse", "place", "study"} <= set(shown)


@pytest.mark.parametrize("document", [transcripts.TOUR, *transcripts.EXCERPTS], ids=lambda path: path.name)
def test_excerpts_are_what_the_tour_says(document: Path) -> None:
    text = document.read_text()
    assert len(transcripts.transcript(text)) >= 3
    assert transcripts.filled(text, transcripts.transcript(TOUR)) == text, "python -m benchmarks.transcripts"


def test_search_begins_with_a_short_tour() -> None:
    text = (transcripts.ROOT / "docs" / "search.md").read_text()
    assert len(transcripts.transcript(text.partition("\n## ")[0])) == 3


def test_the_first_outputs_are_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made anew with a training of one step in place of the tour's; no digit but the errors' and the time depends on that."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name, content in transcripts.files(TOUR).items():
        Path(name).write_text(content)
    unstable = re.compile(r"(( +\d\.\de-\d\d| +0)+)$|^(error|took) .*$", re.MULTILINE)

    def stable(text: str) -> str:
        """Without these digits, and without the widths that follow from them."""
        return re.sub(r"  +|-+", " ", unstable.sub("", text)).replace(" \n", "\n")

    compared = []
    for command, output in transcripts.transcript(TOUR).items():
        words = shlex.split(command)
        if words[0] == "python":
            runpy.run_path(words[1])
            continue
        if "--max-steps" in words:
            words[words.index("--max-steps") + 1] = "1"
        assert main([*words[1:], "--quiet"]) == 0
        printed = capsys.readouterr().out
        if words[1] in ("inspect", "convert", "verify"):
            assert stable(printed.strip("\n")) == stable(output), command
            compared.append(words[1])
        if words[1] == "verify":
            break
    assert compared == ["inspect", "convert", "verify"]


@pytest.mark.slow
def test_the_whole_tour(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the tour ends with an export to ONNX")
    said = transcripts.transcript(TOUR)
    found = dict(transcripts.run(TOUR, tmp_path))
    assert list(found) == list(said)
    for command, output in found.items():
        lines = 1 if command.split()[1] in DEPENDS_ON_DIGITS else None
        assert masked(output).split("\n")[:lines] == masked(said[command]).split("\n")[:lines], command
    assert all((tmp_path / made).is_file() for made in transcripts.PICTURES)


# --- the program -------------------------------------------------------------------------------------------------------

PAGE = """# A page

```python
# made.py
print("made", 6 * 7)
```

```console
$ python made.py
old

$ seq 9
1
...
8
9
```
"""


def test_commands_run_in_order_and_their_outputs_are_filled_in(tmp_path: Path) -> None:
    assert transcripts.transcript(PAGE) == {"python made.py": "old", "seq 9": "1\n...\n8\n9"}
    outputs = dict(transcripts.run(PAGE, tmp_path))
    assert outputs["python made.py"] == "made 42"
    assert outputs["seq 9"] == "\n".join(map(str, range(1, 10)))
    assert transcripts.filled(PAGE, outputs) == PAGE.replace("old", "made 42")


def test_an_output_that_fits_is_not_cut() -> None:
    assert transcripts.cut("1\n2", "x\n...\ny") == "1\n2"
    assert transcripts.cut("1\n2\n3", "x\n...\ny") == "1\n...\n3"
    assert transcripts.cut("1\n2\n3", "x\n...") == "1\n..."
    assert transcripts.cut("1\n2\n3", "x") == "1\n2\n3"


def test_a_command_that_fails_ends_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="exit code 3: exit 3"):
        list(transcripts.run("```console\n$ exit 3\n```\n", tmp_path))


def test_an_excerpt_of_nothing_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"it has no 'surgeon inspect other'"):
        transcripts.filled("```console\n$ surgeon inspect other\n```\n", transcripts.transcript(TOUR))


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old").touch()
    with pytest.raises(SystemExit):
        transcripts.main([str(tmp_path)])
    assert "is not empty: the commands begin with nothing" in capsys.readouterr().err
