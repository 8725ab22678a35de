"""Searches, costs and exports: what people report elsewhere, tried here."""

import json
import os
import signal
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import surgeon
from surgeon.cli import main
from surgeon.errors import ExportError
from surgeon.exporting.export import Exported
from surgeon.search.study.journal import StudyError
from surgeon.search.study.study import worker_name
from surgeon.util import machine as machines
from tests.support.search.records import proposals
from tests.support.search.toys import toy_search

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a worker of a machine of the same host name, of whose process number there is none here."""
    monkeypatch.setattr(os, "getpid", lambda: 4194305)
    here = machines.machine()
    return f"{here[:-8]}{'0' * 8}-4194305-abcdef"


def test_workers_of_another_machine_of_this_name_are_not_taken_for_dead(elsewhere: str) -> None:
    """T1: containers and cloned machines have equal host names: a process number proves nothing there."""
    from surgeon.search.study.database import _is_gone

    assert not _is_gone(elsewhere)
    assert not _is_gone(f"{machines.machine()[:-9]}-4194305-abcdef")  # by an earlier surgeon
    assert _is_gone(worker_name())
    assert _is_gone(None)


def test_the_name_of_a_machine_tells_boots_and_containers_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """T1: boot and namespace of process numbers are part of it."""
    names = {machines.machine()}
    read, link = Path.read_text, Path.readlink
    monkeypatch.setattr(Path, "read_text", lambda self, **kw: "other" if self.name == "boot_id" else read(self, **kw))
    names.add(machines.machine.__wrapped__())
    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(Path, "readlink", lambda self: Path("pid:[1]") if self.name == "pid" else link(self))
    names.add(machines.machine.__wrapped__())
    assert len(names) == 3


# --- costs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_cost_of_models_of_other_dtypes(dtype: torch.dtype) -> None:
    """T10: the images are of the model's dtype: half of it, about half of the memory, the same FLOPs."""
    from surgeon.costs import cost_table

    model = timm.create_model("test_resnet")
    single = surgeon.cost(model, input_size=64, batch_size=4)
    whole = cost_table(model, input_size=64, batch_size=4, cache=False)
    model.to(dtype)
    found = surgeon.cost(model, input_size=64, batch_size=4)
    share = dtype.itemsize / 4
    assert not found.estimated
    assert (found.flops, found.params) == (single.flops, single.params)
    assert found.peak_bytes == pytest.approx(share * single.peak_bytes, rel=0.05)
    table = cost_table(model, input_size=64, batch_size=4, cache=False)
    assert table.windows.max() == pytest.approx(share * whole.windows.max(), rel=0.05)
    for one, other in zip(table.rows, whole.rows, strict=True):
        assert one.saved_bytes == pytest.approx(
            share * other.saved_bytes, rel=0.3, abs=2048
        )  # selections are not halved
        assert one.static_bytes == pytest.approx(share * other.static_bytes, rel=0.2)


class Grouped(nn.Module):
    """Attention in which several heads of the query share a key and a value."""

    def __init__(self, *, grouped: bool) -> None:
        super().__init__()
        self.images, self.grouped = nn.Conv2d(3, 64, 1), grouped
        self.query, self.key, self.value = nn.Linear(64, 512), nn.Linear(64, 128), nn.Linear(64, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.images(x).flatten(2).transpose(1, 2)
        query, key, value = (
            layer(x).view(*x.shape[:2], -1, 64).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        if not self.grouped:
            key, value = key.repeat_interleave(4, 1), value.repeat_interleave(4, 1)
        out = nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=self.grouped)
        return out.mean((1, 2))


def test_attention_with_grouped_queries_under_amp() -> None:
    """T23: flash attention takes grouped queries as they are: less memory than with repeated keys, not three times as much."""
    step = {"input_size": (3, 32, 32), "batch_size": 2, "amp": True}
    grouped, repeated = (surgeon.cost(Grouped(grouped=grouped), **step) for grouped in (True, False))
    assert grouped.flops == repeated.flops
    assert 0.5 * repeated.peak_bytes < grouped.peak_bytes < repeated.peak_bytes


def test_batch_norm_on_one_value_a_channel(capsys: Capture) -> None:
    """T16: on the cost side: a step of one image whose last features are of one pixel is one error with a hint."""
    argv = ["place", "test_resnet", "--weights", "random", "--gains", "uniform", "--max-flops", "+10%", "--quiet"]
    assert main([*argv, "--input-size", "32", "--batch-size", "1"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "its BatchNorm sees one value per channel: use a larger batch (--batch-size 2)" in error


def test_a_cost_by_name_makes_no_weights(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """T25: `surgeon cost` needs shapes alone: the meta device."""
    from surgeon.commands import cost as cost_command

    seen = []
    cost = cost_command.__dict__["_cost_of"]
    monkeypatch.setattr(cost_command, "_cost_of", lambda *a, **k: (seen.append(found := cost(*a, **k)), found)[1])
    argv = ["cost", "test_resnet", "--json", "--compare", "zoo/resnet20_cifar", "--input-size", "3,64,64"]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["input_size"] == [3, 64, 64]
    assert len(seen) == 2
    assert all(parameter.is_meta for model, _ in seen for parameter in model.parameters())


def test_a_cost_that_needs_values_makes_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """T25: a model that cannot be traced without data is built in earnest."""
    from argparse import Namespace

    from surgeon.commands import cost as cost_command

    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.conv(x) * (1.0 if x.sum().item() > 0 else 2.0)
            return out

    def meta(spec: str) -> nn.Module:
        with torch.device("meta"):
            return Stubborn()

    monkeypatch.setattr("surgeon.models.names.shapes_of", meta)
    monkeypatch.setattr(cost_command, "build", lambda spec, **_: Stubborn())
    args = Namespace(measure=False, trust_factory=False)
    model, found = cost_command.__dict__["_cost_of"]("stubborn", args, {}, input_size=(3, 16, 16), batch_size=4)
    assert found.estimated
    assert not next(model.parameters()).is_meta


SIZES = {"64": (64, 64), "48x64": (48, 64), "3,48,64": (3, 48, 64), "3×48×64": (3, 48, 64), " 48 X 64 ": (48, 64)}


@pytest.mark.parametrize("text", [*SIZES, "0", "3x", "1x2x3x4", "big", "-3", "1e2", ""])
def test_sizes_are_read_by_one_parser(text: str) -> None:
    """T19: every command that takes --input-size reads it alike."""
    import argparse

    from surgeon.cli import __dict__ as cli
    from surgeon.commands.common.arguments import size

    commands = next(a for a in cli["_parser"]()._actions if isinstance(a, argparse._SubParsersAction)).choices
    options = [a for command in commands.values() for a in command._actions if "--input-size" in a.option_strings]
    assert len(options) >= 7
    assert {option.type for option in options} == {size}
    if text in SIZES:
        assert size(text) == SIZES[text]
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="expected SIZE, HxW or CxHxW"):
            size(text)


@pytest.mark.parametrize("given", [12, (12,), [12, 12], (3, 12, 12)])
def test_export_takes_all_forms_of_a_size(given: object, tmp_path: Path) -> None:
    """T19: `surgeon export --input-size 64` failed after half a minute."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    found = surgeon.export(model, tmp_path / "m.pt2", format="torch", input_size=given, free="none")
    assert found.input_shape[1:] == (3, 12, 12)


# --- export ---------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["first", "second"])


class Gives(nn.Module):
    """A convolution whose output is given in a form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.conv, self.form = nn.Conv2d(3, 4, 3), form
        if form == "parameter":
            self.images = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x)
        made: dict[str, Callable[[], Any]] = {
            "parameter": lambda: y * getattr(self, "images", 1.0),
            "named tuple": lambda: Pair(y, y * 2),
            "dictionary": lambda: {"out": y, "aux": [y * 2, {"deep": y * 3}]},
            "names that are taken": lambda: {"mul": y, "conv2d": y * 2, "images": y + 1, "conv.weight": y * 3},
            "a number": lambda: (y, 3),
            "a text": lambda: {"y": y, "kind": "text"},
            "nothing": lambda: [],
            "dropout": lambda: nn.functional.dropout(y, 0.5, training=True),
            "noise": lambda: y + 1e-2 * torch.rand_like(y),
        }
        return made[self.form]()


def _export(form: str, path: Path, **options: Any) -> Exported:
    torch.manual_seed(0)
    return surgeon.export(Gives(form).eval(), path, input_size=(3, 8, 8), free="none", **options)


@pytest.mark.parametrize(
    ("form", "given", "outputs"),
    [
        ("parameter", "input", ["output"]),
        ("named tuple", "images", ["first", "second"]),
        ("dictionary", "images", ["out", "aux.0", "aux.1.deep"]),
        ("names that are taken", "input", ["mul", "conv2d", "images", "conv.weight_"]),
    ],
)
def test_names_of_inputs_and_outputs(form: str, given: str, outputs: list[str], tmp_path: Path) -> None:
    """T17: a parameter called like an input, named tuples, and keys of dictionaries, which become names."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    found = _export(form, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [one.name for one in graph.input] == [given]
    assert [one.name for one in graph.output] == found.outputs == outputs


@pytest.mark.parametrize("form", ["named tuple", "dictionary"])
def test_an_archive_gives_what_the_model_gives(form: str, tmp_path: Path) -> None:
    """T17: named tuples, whose class is not where the archive is read, become dictionaries there."""
    _export(form, tmp_path / "m.pt2", format="torch")
    given = torch.export.load(tmp_path / "m.pt2").module()(torch.zeros(1, 3, 8, 8))
    assert list(given) == (["first", "second"] if form == "named tuple" else ["out", "aux"])


@pytest.mark.parametrize(
    ("form", "format", "words"),
    [
        ("a number", "onnx", r"Gives returns 3 \(int\) at 1: a file of format onnx can store only tensors$"),
        ("a text", "onnx", r"'text' \(str\) at kind: a file of format onnx can store only tensors$"),
        ("a text", "torch", r"'text' \(str\) at kind: a file of format torch can store only tensors and numbers"),
        ("nothing", "torch", "returns no tensor but"),
        ("nothing", "onnx", "returns no tensor but"),
        ("dropout", "torch", "is random in eval mode: two runs on the same images differ"),
        ("noise", "onnx", "is random in eval mode: two runs on the same images differ"),
    ],
)
def test_outputs_that_no_file_can_hold(form: str, format: Any, words: str, tmp_path: Path) -> None:
    """T17, T18: numbers, texts and nothing as outputs; models that are random in eval mode."""
    with pytest.raises(ExportError, match=words):
        _export(form, tmp_path / "m.file", format=format)
    assert list(tmp_path.iterdir()) == []


def test_a_number_in_an_archive(tmp_path: Path) -> None:
    """T17: a torch.export archive holds numbers beside its tensors."""
    _export("a number", tmp_path / "m.pt2", format="torch")
    assert torch.export.load(tmp_path / "m.pt2").module()(torch.zeros(1, 3, 8, 8))[1] == 3


@pytest.mark.parametrize(("asked", "found"), [(None, 18), (21, 21), (13, None), (99, None)])
def test_the_opset_is_the_one_that_was_asked_for(asked: int | None, found: int | None, tmp_path: Path) -> None:
    """T9: opset 18 was written whatever was asked, and nothing said."""
    pytest.importorskip("onnxscript")
    if found is None:
        with pytest.raises(
            ExportError, match=f"torch.onnx wrote opset 18, not {asked}, for this model; nothing was written"
        ):
            _export("dictionary", tmp_path / "m.onnx", opset=asked)
        assert list(tmp_path.iterdir()) == []
        return
    result = _export("dictionary", tmp_path / "m.onnx", opset=asked)
    assert result.opset is not None
    assert result.opset >= found
    assert result.opset == found or asked is None
    assert result.to_dict()["opset"] == result.opset


# --- searches -------------------------------------------------------------------------------------------------------


def test_a_placement_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T21: for every proposal all old placements were decoded again, and the labels of all options made anew."""
    from surgeon.search.sampling.parameters import Parameters

    decoded: list[int] = []
    read = Parameters.placement
    monkeypatch.setattr(Parameters, "placement", lambda self, values: (decoded.append(1), read(self, values))[1])
    search = toy_search(tmp_path / "s.jsonl", sampler="random", trials=40, seed=3)
    search.open()
    assert search.run().evaluated == 40
    assert len(decoded) <= 40
    assert search.space.labels is search.space.labels


def test_a_search_that_is_asked_to_stop_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R9: to be asked to stop four times in one trial is not to die four times: the same proposals follow."""
    from surgeon.search.evaluate.evaluator import StoppedError, TableEvaluator

    evaluate, stops = TableEvaluator.evaluate, iter(range(5))

    def stopped(self: Any, placement: Any, report: Any, rung: int) -> float:
        value = evaluate(self, placement, report, rung)
        if len(calls := (tmp_path / "calls.txt").read_text().split()) >= 8 and next(stops, None) is not None:
            raise StoppedError(f"after {len(calls)} evaluations")
        return value

    def again(path: Path, resume: bool) -> Any:
        search = toy_search(path, sampler="posterior", trials=12, seed=3)
        search.open(resume=resume)
        return search, search.run()

    monkeypatch.setattr(TableEvaluator, "evaluate", stopped)
    (_, outcome), sittings = again(tmp_path / "s.jsonl", resume=False), 1
    while outcome.stopped == "interrupted":
        (broken, outcome), sittings = again(tmp_path / "s.jsonl", resume=True), sittings + 1
    assert sittings == 6
    (tmp_path / "whole").mkdir()
    monkeypatch.setattr(TableEvaluator, "evaluate", evaluate)
    whole, _ = again(tmp_path / "whole" / "s.jsonl", resume=False)
    assert proposals(broken.file.records()) == proposals(whole.file.records())
    assert {one.attempts for one in broken.file.records()} == {1}


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_signals_ask_a_search_to_stop(sign: signal.Signals) -> None:
    """R9: SIGTERM asks to stop, as Ctrl-C does; the second one stops at once."""
    from surgeon.search.study.stop import Stop, on_interrupt

    before, stop = signal.getsignal(sign), Stop(None)

    def twice() -> None:
        with on_interrupt(stop):
            signal.raise_signal(sign)
            assert stop.reason == "interrupted"
            signal.raise_signal(sign)

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert signal.getsignal(sign) is before


def test_a_second_interruption_of_a_search(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """R9: after a second Ctrl-C it is said how to go on, in place of "nothing was written"."""
    from argparse import Namespace
    from contextlib import nullcontext

    from surgeon.commands.search import search as search_command

    class Search:
        def run(self) -> None:
            raise KeyboardInterrupt

    names = search_command.__dict__
    monkeypatch.setattr("surgeon.commands.search.setup.make_setup", lambda args: None)
    monkeypatch.setattr("surgeon.commands.search.jobs.helpers", lambda *rest: nullcontext([]))
    monkeypatch.setattr(search_command, "_make", lambda *rest: (Search(), None))
    monkeypatch.setattr(search_command, "_begin", lambda *rest: None)
    folder, file = search_command.__dict__["Path"]("s"), Namespace(name=None, shared=False)
    assert names["_search"](Namespace(quiet=True), Namespace(path=folder), file) == 130
    assert "resume with the same command and --resume" in capsys.readouterr().err


def test_curves_that_cannot_be_written_do_not_end_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """T20: a full disk under TensorBoard is said once, and the search goes on."""
    import errno

    from surgeon.search.study.board import Board

    board, calls = Board(tmp_path, None, "loss"), []

    def full(self: Any, *rest: Any) -> None:
        calls.append(rest)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Board, "_add", full)
    for _ in range(3):
        board.add(None, None)
    assert len(calls) == 1
    assert [record.message for record in caplog.records] == [f"no more curves in {tmp_path}: No space left on device"]


def test_a_journal_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T20: one line, and the journal is as it was: what was completed can be gone on with."""
    import errno

    search = toy_search(tmp_path / "s.jsonl", sampler="random", trials=9, seed=3)
    search.open()
    written: list[int] = []
    sync = os.fsync

    def full(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StudyError, match=r"cannot write the study .*s.jsonl: No space left on device"):
            search.run()
    assert (tmp_path / "s.jsonl").read_bytes().endswith(b"\n")
    again = toy_search(tmp_path / "s.jsonl", sampler="random", trials=9, seed=3)
    again.open(resume=True)
    again.run()
    (tmp_path / "whole").mkdir()
    whole = toy_search(tmp_path / "whole" / "s.jsonl", sampler="random", trials=9, seed=3)
    whole.open()
    whole.run()
    assert proposals(again.file.records()) == proposals(whole.file.records())
