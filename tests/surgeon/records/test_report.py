"""Reports: whole in JSON, readable at 80 columns, nothing left out."""

import json
import math
from typing import Any

import pytest

from surgeon.errors import CheckpointError
from surgeon.records.report import Replaced, Report, Skipped, geometry_text, options_text
from surgeon.util.tables import count, table

GEOMETRY: dict[str, Any] = {
    "in_channels": 256,
    "out_channels": 512,
    "kernel_size": [3, 3],
    "stride": [2, 2],
    "padding": [1, 1, 1, 1],
    "dilation": [1, 1],
    "groups": 1,
    "padding_mode": "zeros",
    "bias": False,
}


def replaced(name: str, **changes: Any) -> Replaced:
    values: dict[str, Any] = {
        "name": name,
        "stage": "stage3",
        "type": "acda",
        "options": {"atoms": 6, "scales": 3},
        "geometry": GEOMETRY,
        "calls": 1,
        "params_before": 1_179_648,
        "params_after": 2_500_000,
        "macs_before": 231_211_008,
        "macs_after": 462_000_000,
        "max_abs_error": 1.2e-6,
        "max_rel_error": 3.1e-7,
    }
    return Replaced(**(values | changes))


def skipped(name: str, *, selected: bool, reasons: tuple[str, ...]) -> Skipped:
    return Skipped(name=name, stage=None, module="Conv2d", geometry=GEOMETRY, selected=selected, reasons=reasons)


def example() -> Report:
    return Report(
        replaced=[replaced("layer3.0.conv2"), replaced("blocks.4.2.a_very_long_name_of_a_module.conv", notes=("odd",))],
        skipped=[
            skipped("layer1.0.conv1", selected=False, reasons=("not selected",)),
            skipped("layer3.1.conv2", selected=True, reasons=("its weight is read elsewhere, by layer3.2",)),
            skipped("layer3.2.conv2", selected=True, reasons=("its weight is read elsewhere, by layer3.2",)),
        ],
        max_abs_error=2e-6,
        max_rel_error=4e-7,
        params_before=25_557_032,
        params_after=40_000_000,
        macs_before=4_089_184_256,
        macs_after=5_000_000_000,
        input_size=(3, 224, 320),
        model="resnet50",
        notes=["called twice"],
    )


def test_a_report_comes_back_as_it_was() -> None:
    report = example()
    assert Report.from_dict(json.loads(report.to_json())) == report


def test_numbers_that_are_not_finite_stay_valid_json() -> None:
    report = Report(replaced=[replaced("a", max_rel_error=math.inf)], skipped=[], max_rel_error=math.nan)
    back = Report.from_dict(json.loads(report.to_json(), parse_constant=lambda _: pytest.fail("not JSON")))
    assert back.replaced[0].max_rel_error == math.inf
    assert back.max_rel_error is not None
    assert math.isnan(back.max_rel_error)


@pytest.mark.parametrize("values", [{}, {"replaced": [{}], "skipped": []}, {"replaced": 1, "skipped": []}])
def test_what_is_no_report_is_one_error(values: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="not a report"):
        Report.from_dict(values)


@pytest.mark.parametrize("width", [80, 120])
def test_the_text_fits_its_width_and_leaves_nothing_out(width: int) -> None:
    text = example().to_text(width)
    assert max(map(len, text.splitlines())) <= width
    assert text.isascii()
    assert "\x1b" not in text
    for word in (
        "resnet50: 2 of 5 convolutions replaced",
        "layer3.0.conv2",
        "stage3",
        "256>512 3x3 s2",
        "acda",
        "m6 S3",
        "1.18M",
        "2.50M",
        "462M",
        "924M",
        "3.1e-07",
        "refused: 2",
        "its weight is read elsewhere, by layer3.2 (2):",
        "layer3.1.conv2, layer3.2.conv2",
        "not selected: 1",
        "25.6M -> 40.0M (x1.57)",
        "8.18G -> 10.0G (x1.22) in convolutions at 224x320",
        "4.0e-07 relative",
        "note: called twice",
        "odd",
    ):
        assert word in text, word


def test_a_report_of_nothing_is_still_text() -> None:
    text = Report(replaced=[], skipped=[]).to_text()
    assert "0 of 0 convolutions" in text
    assert "not measured" in text


def test_compressed_conversions_say_so() -> None:
    report = example()
    report.exact = False
    assert "not exact by choice" in report.to_text()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "256>512 3x3 s2"),
        ({"in_channels": 96, "out_channels": 96, "groups": 96, "stride": [1, 1]}, "dw96 3x3"),
        ({"in_channels": 96, "out_channels": 192, "groups": 96, "stride": [1, 1]}, "96>192 3x3 g96"),
        ({"kernel_size": [1, 7], "stride": [2, 1], "dilation": [1, 3], "groups": 2}, "256>512 1x7 s2x1 d1x3 g2"),
    ],
)
def test_geometries_in_few_characters(changes: dict[str, Any], expected: str) -> None:
    assert geometry_text(GEOMETRY | changes) == expected


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (None, "-"),
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (25_557_032, "25.6M"),
        (999_999, "1.00M"),
        (10**15, "1000T"),
    ],
)
def test_counts_have_three_digits(number: int | None, expected: str) -> None:
    assert count(number) == expected


def test_what_is_too_long_for_its_column_stands_whole_on_a_line_of_its_own() -> None:
    name = "stages.3.blocks.2.attention.query_key_value_projection"
    text = table(("name", "n"), [("short", "1"), (name, "12345")], width=40)
    assert text.splitlines()[-2:] == [name, " " * 35 + "12345"]
    assert table(("a",), []) == ""


def test_a_long_last_column_of_text_runs_over_and_breaks_no_key() -> None:
    rows = [("float32 products", "highest"), ("operators", "/a" * 40)]
    lines = table(("setting", "value"), rows, width=60, left=2).splitlines()
    assert lines[2:] == ["float32 products highest", f"operators        {'/a' * 40}"]
    assert len(lines[1]) == 60


def test_a_kernel_size_that_means_nothing_is_not_told() -> None:
    """Of a depthwise 5×5 convolution `sekg k3` read as if it had become 3×3."""
    assert options_text("sekg", {"mode": "dense", "kernel_size": 3, "kernel_groups": 8}) == "sekg k3 g8"
    assert options_text("sekg", {"mode": "depthwise", "kernel_size": 3, "kernel_groups": 8}) == "sekg g8"
    assert options_text("acda", {"atoms": 6, "scales": 3}) == "acda m6 S3"
