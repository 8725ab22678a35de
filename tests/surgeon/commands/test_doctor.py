"""surgeon doctor asks the dispatcher: new backends, refusals and wrong kernels show up by themselves."""

import json

import pytest
from torch import Tensor

from surgeon.cli import main
from surgeon.doctor import diagnose
from surgeon.layers.examples import operators
from surgeon.layers.ops.dispatch import Backend

Capture = pytest.CaptureFixture[str]
ACDA = next(operator for operator in operators() if operator.name == "acda_conv")


def test_it_prints_versions_devices_and_the_backend_of_every_operator(capsys: Capture) -> None:
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    for part in ("torch ", "triton", "threads", "cpu", "OMP_NUM_THREADS", *(o.name for o in operators())):
        assert part in told
    assert "why not the others" in told
    assert " ".join(told.split()).count("(all on cpu)") >= 2, "the operators are listed once, in the table"
    assert "every operator computes what its reference computes" in told


def test_json_holds_a_finding_an_operator_device_and_dtype(capsys: Capture) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is True
    keys = {(f["operator"], f["dtype"]) for f in found["findings"] if f["device"] == "cpu"}
    assert keys == {(o.name, d) for o in operators() for d in ("float32", "float16", "bfloat16")}
    for finding in found["findings"]:
        assert finding["backend"]
        assert set(finding["against"]) | {finding["backend"]} == set(_operator(finding["operator"]).backends)


def _operator(name: str) -> object:
    return next(operator for operator in operators() if operator.name == name)


def test_a_new_backend_shows_up_with_its_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = Backend("fast", lambda *args: args[0], lambda *args: ["needs a device that is not here"])
    monkeypatch.setattr(ACDA, "backends", {"fast": fast, **ACDA.backends})
    finding = next(f for f in diagnose().findings if f.operator == "acda_conv")
    assert finding.backend in ("native", "torch")
    assert finding.against["fast"] == ["needs a device that is not here"]


def test_a_wrong_or_broken_backend_is_a_problem(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def half(*args: object) -> Tensor:
        y: Tensor = ACDA.backends["reference"].run(*args)
        return y * 0.5

    def broken(*args: object) -> Tensor:
        raise RuntimeError("ptxas is not here")

    own = ACDA.backends
    for run, said in ((half, "differs from the reference by"), (broken, "ptxas is not here")):
        monkeypatch.setattr(ACDA, "backends", {"fast": Backend("fast", run, lambda *args: []), **own})
        assert not diagnose().healthy
        assert main(["doctor"]) == 1
        told = " ".join(capsys.readouterr().out.split())
        assert "PROBLEM acda_conv on cpu" in told
        assert said in told
    monkeypatch.setattr(ACDA, "backends", {"fast": Backend("fast", broken, lambda *args: ["no such device"])})
    finding = next(f for f in diagnose().findings if f.operator == "acda_conv")
    assert finding.backend == ""
    assert "no backend can run acda_conv" in finding.problem
