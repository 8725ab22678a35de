"""The benchmark programs of export, generators, large images and compiled formulas run, resume and count right, on tiny inputs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon
from benchmarks import compiled, export_coverage, generators, large_image, report
from surgeon.exporting.export import Check, Exported
from surgeon.sites.inputs import Inputs

Capture = pytest.CaptureFixture[str]
TINY = {"A": (1, 4, 6)}


@pytest.fixture(autouse=True)
def _threads_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)


@pytest.mark.filterwarnings("ignore")
def test_generators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(generators, "SHAPES", TINY)
    words = ["--shapes", "A", "--repeats", "1", "--seeds", "1", "--steps", "2", "--results", str(tmp_path)]
    assert generators.main(words) == 0
    rows = {row["key"]: row for row in json.loads((tmp_path / "generators.json").read_text())["rows"]}
    assert set(rows) == {"cost/A", *(f"toy/{form}/0" for form in generators.FORMS)}
    forms = rows["cost/A"]["forms"]
    # Of a 3×3 convolution of 4 channels, 144 MACs a pixel: reduce 4·64, expand 64·9·126 or its factors.
    assert forms["full"]["generator_macs"] == pytest.approx((256 + 64 * 9 * 126) / 144)
    assert forms["separable"]["generator_macs"] == pytest.approx((256 + 64 * 9 + 64 * 126) / 144)
    assert forms["lowrank 4"]["generator_macs"] == pytest.approx((256 + 64 * 9 * 4 + 4 * 126) / 144)
    assert rows["toy/separable/0"]["parameters"] < rows["toy/full/0"]["parameters"]
    printed = capsys.readouterr().out
    assert generators.main(words) == 0  # nothing runs again
    assert capsys.readouterr().out == printed


def test_large_images_grow_by_what_the_layer_holds() -> None:
    plain, dynamic = (large_image.measure(name, 256, 4) for name in ("conv 3×3", "dconv, depthwise"))
    assert plain["output_bytes"] == dynamic["output_bytes"] == 4 * 4 * 256 * 256
    assert plain["growth_bytes"] >= 0
    rows = [
        {"layer": "conv 3×3", "growth_bytes": 2**20, "cpu_s": 1.0},
        {"layer": "acda", "growth_bytes": 3 * 2**20, "cpu_s": 2.0},
    ]
    assert large_image.lines(rows)[1] == [["conv 3×3", "1", "1.00", "1.0"], ["acda", "3", "3.00", "2.0"]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("operator", list(compiled.OPERATORS))
def test_compiled_formulas_are_checked_and_timed(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "SHAPES", {"A": (1, 4, 8)})
    monkeypatch.setattr(compiled, "ADFNET", {"A": 32})
    found = compiled.measure(f"{operator}/A", 1)
    assert "lean" in found["ways"]
    assert all(way["forward"] >= 0 for way in found["ways"].values())
    if operator == "adfnet":
        assert not any("both" in way for way in found["ways"].values())
    else:
        assert all(way["both"] > 0 for way in found["ways"].values())
    assert compiled.lines([found])[1]


def test_export_coverage_gives_a_row_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    asked: list[str] = []

    def here(network: export_coverage.Network, args: Any) -> dict[str, Any]:
        asked.append(network.key)
        return export_coverage.measure(network, args.format)

    monkeypatch.setattr(export_coverage, "in_process", here)
    words = ["--only", "zoo/lenet*", "--format", "torch", "--results", str(tmp_path)]
    assert export_coverage.main(words) == 0
    rows = {row["key"]: row for row in json.loads((tmp_path / "export_coverage-torch.json").read_text())["rows"]}
    assert set(rows) == {"zoo/lenet", "zoo/lenet_acda"} == set(asked)
    for row in rows.values():
        assert row["status"] == "ok"
        assert row["rel_error"] <= 1e-4
        assert list(row["free"]) == ["batch"]
        assert "takes no other size" in row["fixed"]["height"]
    assert rows["zoo/lenet"]["varies"] is None
    assert rows["zoo/lenet_acda"]["varies"] > export_coverage.NOTHING
    assert export_coverage.main(words) == 0
    assert len(asked) == 2  # nothing runs again
    assert "takes no other size" in capsys.readouterr().out


def test_what_was_not_done_in_time_is_tried_with_the_batch_alone_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = export_coverage.Network("zoo", "linear_demosaic")
    late = {"status": "unknown", "reason": "not done after 5 s"}
    monkeypatch.setattr(export_coverage, "in_process", lambda network, args: late)
    words = ["--only", network.key, "--format", "torch", "--results", str(tmp_path)]
    assert export_coverage.main(words) == 0
    monkeypatch.setattr(
        export_coverage,
        "in_process",
        lambda network, args: export_coverage.measure(network, args.format, args.free),
    )
    assert export_coverage.main([*words, "--retry", "--free", "batch"]) == 0
    (row,) = json.loads((tmp_path / "export_coverage-torch.json").read_text())["rows"]
    assert row["status"] == "ok"
    assert list(row["free"]) == ["batch"]
    assert row["fixed"] == {"height": "asked for", "width": "asked for"}
    assert export_coverage.line(row)[-1] == "with free image sizes not done after 5 s"


def test_a_refusal_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    network = export_coverage.Network("zoo", "lenet")
    model = torch.nn.Bilinear(2, 2, 2)
    monkeypatch.setattr(export_coverage, "_model", lambda network: (model, Inputs(args=(torch.randn(2, 3, 8, 8),))))
    row = vars(network) | export_coverage.measure(network, "torch")
    assert row["status"] == "refused"
    assert export_coverage.line(row)[-1] == row["reason"] != ""


@pytest.mark.parametrize(
    ("varies", "error", "status"),
    [(0.1, 1e-6, "ok"), (0.1, 1e-3, "loose"), (1e-4, 1e-3, "blind"), (math.inf, 0.0, "blind")],
)
def test_a_check_that_says_little_is_no_ok(
    varies: float, error: float, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = [Check(shape=(1, 3, 8, 8), max_rel=error, max_abs=1.0)]
    made = Exported(path="m", format="onnx", input_shape=(1, 3, 8, 8), dtype="float32", free={}, checks=checks)
    monkeypatch.setattr(export_coverage, "_model", lambda network: (torch.nn.Identity(), Inputs()))
    monkeypatch.setattr(export_coverage, "_varies", lambda model, inputs: varies)
    monkeypatch.setattr(surgeon, "export", lambda *args, **words: made)
    assert export_coverage.measure(export_coverage.Network("zoo", "lenet"), "onnx")["status"] == status


def test_dynamic_parts_vary_as_much_as_rounding_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    monkeypatch.setattr(export_coverage, "_awaken", lambda model, inputs, std: asked.append(std))
    monkeypatch.setattr(export_coverage, "_rounding", lambda model, inputs: asked[-1] / 1e3)
    export_coverage._model(export_coverage.Network("zoo", "lenet"))
    assert asked == [0.02, 0.005]


@pytest.mark.parametrize(("takes", "size"), [((768, 224), 224), ((768,), 768), ((256, 224), 256)])
def test_large_images_become_small_ones_where_the_model_takes_them(takes: tuple[int, ...], size: int) -> None:
    class Choosy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.default_cfg = {"input_size": (3, takes[0], takes[0])}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[-1] in takes
            return x

    (images,) = export_coverage._inputs(Choosy()).args
    assert images.shape[1:] == (3, size, size)


class Explodes(torch.nn.Module):
    """From its fifth call on. The counter is no part of the module, whose state every run begins with."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Explodes.calls += 1
        return torch.sin(1e6 * x) if Explodes.calls > 4 else x


def test_rounding_is_looked_for_on_many_images() -> None:
    """With a batch of two, what explodes on one image in ten passed for calm, and its file for wrong."""
    inputs = Inputs(args=(torch.ones(2, 3, 8, 6),))
    batches = export_coverage._batches(inputs)
    assert batches[0] is inputs
    assert {batch.args[0].shape for batch in batches} == {(2, 3, 8, 6)}
    assert len({float(image.sum()) for batch in batches for image in batch.args[0]}) == 7, "six more"
    model = Explodes()
    Explodes.calls = 0
    assert export_coverage._rounding(model, batches[:2]) == 0
    Explodes.calls = 4
    assert export_coverage._rounding(model, batches[1:]) > export_coverage.ROUNDING
    assert Explodes.calls == 6, "in float32 and float64: once it has exploded, no other image is looked at"
    other = Inputs(args=([torch.ones(3, 8, 6)],))
    assert export_coverage._batches(other) == [other]


def test_the_libraries_are_covered_family_by_family_with_every_type() -> None:
    found = export_coverage.networks(["timm", "torchvision"])
    families = [(network.library, network.family) for network in found]
    assert len(families) == len(set(families)) > 80
    assert {network.type for network in found} == {"acda", "pafu", "sekg"}
    names = {network.family: network.name for network in found if network.library == "torchvision"}
    assert (names["resnet"], names["convnext"]) == ("resnet18", "convnext_tiny"), "the smallest"


def test_the_tables_can_be_made_of_the_rows() -> None:
    row = {"key": "zoo/x", "library": "zoo", "name": "x", "type": "", "status": "ok", "free": {"batch": "any"}}
    row |= {"fixed": {"height": "why", "width": "why"}, "foreign": [], "rel_error": 1e-7}
    told = report.export_coverage({"rows": [row]})
    assert "1 networks: 1 ok" in told
    assert "| zoo/x | - | ok | batch | 1e-07 | - | - | why |" in told
