"""Notebooks: results show as tables in them, and the example runs from its first cell to its last."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm

import surgeon
from surgeon.records.collapse_report import Collapsed, CollapseReport
from surgeon.records.report import Report, Skipped
from surgeon.util import pages
from tests.support.places import ROOT
from tests.support.tiny_runs import tiny

EXAMPLE = ROOT / "examples" / "first_conversion.ipynb"


def test_a_report_is_a_table() -> None:
    report = surgeon.convert(timm.create_model("test_resnet").eval(), layers="stage4", type="pafu", input_size=64)[1]
    shown = report._repr_html_()
    assert "2 of 15 convolutions replaced" in shown
    assert "<td>layer4.0.conv1</td><td>stage4</td>" in shown
    assert len(re.findall("<tr>", shown)) == 1 + len(report.replaced)
    assert "not replaced: 13" in shown
    assert "conv1.0" in shown
    assert "parameters" in shown
    assert_small_and_whole(shown)


def test_an_inspection_is_a_list_and_a_table() -> None:
    sites = surgeon.inspect(tiny(), input_size=64)
    assert isinstance(sites, list)
    shown = sites._repr_html_()
    assert "15 convolutions, " in shown
    assert len(re.findall("<tr>", shown)) == 16
    assert "layer3.0.conv2" in shown
    assert "why not" in shown, "of the two that are dynamic already"
    assert str(sites).startswith("15 convolutions, ")
    for text in (shown, " ".join(str(sites).split())):
        assert "are for one image of 3x64x64." in text
    assert_small_and_whole(shown)


def test_a_collapse_is_a_table() -> None:
    model, _ = surgeon.convert(timm.create_model("test_resnet").eval(), layers="stage4", type="pafu", input_size=64)
    shown = surgeon.collapse(model, input_size=64)[1]._repr_html_()
    assert "2 of 2 dynamic layers folded" in shown
    assert "proven from the parameters" in shown
    assert_small_and_whole(shown)


def test_a_cost_is_a_table() -> None:
    found = surgeon.cost(tiny(), input_size=64)
    shown = found._repr_html_()
    assert "training step, sgd" in shown
    assert len(re.findall("<tr>", shown)) == 15
    assert repr(found) == str(found), "where there is no HTML"
    assert_small_and_whole(shown)


def assert_small_and_whole(shown: str) -> None:
    assert len(shown) < 20_000
    assert not re.search(r"<script|(src|href)=|https?:|url\(", shown), "nothing beside it is needed"
    for tag in ("div", "table", "details", "pre", "style", "b"):
        assert len(re.findall(f"<{tag}[ >]", shown)) == shown.count(f"</{tag}>"), tag
    assert not re.search(r"color:#|background:#", shown), "it has the colors of its surroundings"
    assert all(rule.startswith(".surgeon-report") for rule in re.findall(r"(?:^|\}\s*)([^{}<]+)\{", style(shown)))


def style(shown: str) -> str:
    return shown.partition("<style>")[2].partition("</style>")[0]


def test_words_of_strangers_are_no_markup() -> None:
    bad = "<img src=x onerror=alert(1)>"
    skipped = Skipped(name=bad, stage=bad, module=bad, geometry=None, selected=True, reasons=(bad,))
    report = Report(replaced=[], skipped=[skipped], model=bad, notes=[bad])
    layer: dict[str, Any] = {"name": bad, "type": bad, "folded": False, "reason": bad, "told": bad}
    collapsed = Collapsed(**layer, geometry={}, params_before=1, params_after=1)
    for shown in (
        report._repr_html_(),
        CollapseReport(layers=[collapsed], model=bad, notes=[bad])._repr_html_(),
        pages.snippet(bad, pages.rows([bad], [[bad]]), bad, [(bad, bad)]),
    ):
        assert "<img" not in shown
        assert "&lt;img" in shown


def test_the_example_is_kept_without_outputs() -> None:
    cells = json.loads(EXAMPLE.read_text())["cells"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells if "outputs" in cell)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the notebooks' own libraries
def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install '.[dev]'")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install '.[dev]'")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = nbformat.read(EXAMPLE, as_version=4)
    nbformat.validate(notebook)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    results = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    tables = [found["data"]["text/html"] for found in results if "text/html" in found.get("data", {})]
    assert [re.search("<b>(.*?)</b>", table)[1] for table in tables] == [
        "20 convolutions, 3.63G FLOPs, 11.2M parameters in them",
        "ResNet: 4 of 20 convolutions replaced",
    ]
    words = [found["data"]["text/plain"] for found in results if "data" in found and "text/html" not in found["data"]]
    assert float(words[0].partition(", ")[2].rstrip(")")) <= 1e-4
    assert words[0].startswith("('ResNet'")
    assert words[1:] == ["True", "'Conv2d'"]
    assert "README.md\nmodel.safetensors\nrecipe.json" in "".join(found.get("text", "") for found in results)
