"""One model of the coverage matrix in a separate process: converts it to each type and prints a JSON line for each.

    python -m benchmarks._coverage_worker LIBRARY KIND FAMILY NAME TYPES MEMORY_GIB [fx|export]

A crash or a memory blow-up ends only this process; the lines printed before it count.
"""

import copy
import json
import os
import resource
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import surgeon
from benchmarks._models import (
    Case,
    build,
    inputs,
    relative_change,
    sensitivity,
    settle_norms,
    smallest_size,
    spatial_convolutions,
    tensors,
    training_loss,
)
from surgeon.errors import SurgeonError, VerificationError
from surgeon.layers.base import DynamicConv2d
from surgeon.passes import DynamicConvPass

FLOAT32_ERROR, FLOAT64_ERROR = 1e-5, 1e-10
LAYER_ROUNDING = 1e-12  # up to this, a layer in float64 differs by rounding only


@dataclass(frozen=True)
class Trial:
    """A model, what it became, and the size of its inputs."""

    model: nn.Module
    converted: nn.Module
    case: Case
    kind: str
    size: int

    def inputs(self) -> tuple[Any, ...]:
        """Others than those that the pass was given."""
        return inputs(self.model, self.case, self.size, seed=7)


def main(argv: Sequence[str]) -> int:
    names, (types, memory, *through) = argv[:4], argv[4:]
    case = Case(*names)
    limit = int(float(memory) * 2**30)
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")
    model = build(case)
    found = len(spatial_convolutions(model))
    size = smallest_size(model, case) if found else None
    known: dict[str, Any] = {"size": size, "found": found}
    if size:
        settle_norms(model, lambda: training_loss(model.train(), case, size))
        known["sensitivity"] = sensitivity(model, case, size)
    if size and through:
        return through_graph(model, case, size, types.split(","), through[0], known)
    for kind in types.split(","):
        start = time.perf_counter()
        facts = known | (check(model, case, kind, size) if size else {"status": "none", "failures": []})
        facts["seconds"] = round(time.perf_counter() - start, 1)
        print(json.dumps({"type": kind, **facts}), flush=True)
    return 0


def _end_with_parent() -> None:
    sys.stdin.read()  # ends when the parent does
    os._exit(1)


def check(model: nn.Module, case: Case, kind: str, size: int) -> dict[str, Any]:
    """Convert all spatial convolutions to one type and look at everything that a user would."""
    out: dict[str, Any] = {"status": "ok", "failures": []}
    try:
        torch.manual_seed(0)
        start = time.perf_counter()
        converted, report = surgeon.convert(model, layers="all", type=kind, example_inputs=inputs(model, case, size))
        out["seconds_convert"] = round(time.perf_counter() - start, 1)
    except SurgeonError as error:
        refused = error.exit_code == 1 and not isinstance(error, VerificationError)
        return out | {"status": "refused" if refused else "failed", "failures": [_line(error)]}
    except Exception as error:
        traceback.print_exc()
        return out | {"status": "failed", "failures": [f"convert: {_line(error)}"]}
    refused = [(site.name, list(site.reasons)) for site in report.skipped if site.selected]
    out |= {
        "replaced": len(report.replaced),
        "refused": [{"name": name, "reasons": reasons} for name, reasons in refused],
        "unaccounted": _unaccounted(model, report),
        "max_rel_error": report.max_rel_error,
        "precision": report.precision,
        "worst_layer_error": max((site.max_rel_error for site in report.replaced), default=None),
    }
    if out["unaccounted"]:
        out["failures"].append(f"not in the report: {', '.join(out['unaccounted'][:5])}")
    trial = Trial(model, converted, case, kind, size)
    for name, probe in (("own_error", _own_error), ("round_trip", _round_trip), ("train_step", _train_step)):
        try:
            out[name], failure = probe(trial)
        except Exception as error:
            traceback.print_exc()
            out[name], failure = None, _line(error)
        if failure:
            out["failures"].append(f"{name}: {failure}")
    if out["failures"]:
        out["status"] = "failed"
    return out


# --- the graph form ---------------------------------------------------------------------------------------------------


def through_graph(
    model: nn.Module, case: Case, size: int, types: Sequence[str], how: str, known: dict[str, Any]
) -> int:
    """As `main`, of the model as a graph: traced by torch.fx, or exported by torch.export."""
    try:
        graph = _graph(model, how, inputs(model, case, size))
    except Exception as error:  # tracers raise anything
        for kind in types:
            told = {"status": "untraceable", "failures": [], "why": _line(error)}
            print(json.dumps({"type": kind, **known, **told}), flush=True)
        return 0
    for kind in types:
        start = time.perf_counter()
        facts = known | check_graph(model, graph, case, kind, size)
        facts["seconds"] = round(time.perf_counter() - start, 1)
        print(json.dumps({"type": kind, **facts}), flush=True)
    return 0


def _graph(model: nn.Module, how: str, args: tuple[Any, ...]) -> nn.Module:
    with torch.no_grad():
        if how == "fx":
            return torch.fx.symbolic_trace(copy.deepcopy(model))
        return torch.export.export(copy.deepcopy(model), args).module(check_guards=False)


def check_graph(model: nn.Module, graph: Any, case: Case, kind: str, size: int) -> dict[str, Any]:
    """Run the pass on a copy of the graph; the original model says what it must give, and which convolutions there are."""
    out: dict[str, Any] = {"status": "ok", "failures": []}
    work = copy.deepcopy(graph)
    own = DynamicConvPass("all", kind, example_inputs=inputs(model, case, size))
    try:
        own(work)
    except SurgeonError as error:
        refused = error.exit_code == 1 and not isinstance(error, VerificationError)
        return out | {"status": "refused" if refused else "failed", "failures": [_line(error)]}
    except Exception as error:
        traceback.print_exc()
        return out | {"status": "failed", "failures": [f"convert: {_line(error)}"]}
    assert own.report is not None
    report = own.report
    functional = [entry for entry in report.replaced if _was_functional(graph, entry.name)]
    seen = {name for entry in (*report.replaced, *report.skipped) for name in (entry.name, *entry.aliases)}
    out |= {
        "replaced": len(report.replaced),
        "functional": len(functional),
        "folded": sum(any("computed from" in note for note in entry.notes) for entry in functional),
        "refused": [{"name": s.name, "reasons": list(s.reasons)} for s in report.skipped if s.selected],
        "max_rel_error": report.max_rel_error,
        "precision": report.precision,
        "worst_layer_error": max((entry.max_rel_error for entry in report.replaced), default=None),
        "unaccounted": _unreported(work, seen),
    }
    if out["unaccounted"]:
        out["failures"].append(f"not in the report: {', '.join(out['unaccounted'][:5])}")
    with torch.no_grad():
        pairs = zip(
            tensors(model.eval()(*inputs(model, case, size))), tensors(work(*inputs(model, case, size))), strict=True
        )
        out["own_error"] = max((relative_change(a, b) for a, b in pairs), default=0.0)
    limit = FLOAT32_ERROR if report.precision == "float32" else 1e3 * FLOAT32_ERROR
    if not out["own_error"] <= limit:
        out["failures"].append(f"own_error: {out['own_error']:.2g} against the model itself ({report.precision})")
    if out["failures"]:
        out["status"] = "failed"
    return out


def _was_functional(graph: nn.Module, name: str) -> bool:
    try:
        return not isinstance(graph.get_submodule(name), nn.Conv2d)
    except AttributeError:
        return True


def _unreported(graph: Any, seen: set[str]) -> list[str]:
    """Convolutions that are left in the graph, modules and functions, beyond those that the report names as left."""
    modules = [n for n, m in graph.named_modules() if isinstance(m, nn.Conv2d) and not _in_dynamic(graph, n)]
    functions = [
        str(node.args[1])
        for node in graph.graph.nodes
        if node.op == "call_function" and "conv" in getattr(node.target, "__name__", "")
    ]
    left = len(functions) - sum(1 for name in seen if _is_left(graph, name))
    return [name for name in modules if name not in seen] + (functions[:left] if left > 0 else [])


def _is_left(graph: Any, name: str) -> bool:
    try:
        return not isinstance(graph.get_submodule(name), nn.Conv2d | DynamicConv2d)
    except AttributeError:
        return True


def _in_dynamic(graph: Any, name: str) -> bool:
    parts = name.split(".")
    return any(isinstance(graph.get_submodule(".".join(parts[:i])), DynamicConv2d) for i in range(1, len(parts)))


def _unaccounted(model: nn.Module, report: Any) -> list[str]:
    """Spatial convolutions of the original that the report does not name."""
    named = {n for site in (*report.replaced, *report.skipped) for n in (site.name, *site.aliases)}
    return [name for name in spatial_convolutions(model) if name not in named]


def _own_error(trial: Trial) -> tuple[dict[str, Any], str | None]:
    """Relative output error; where float32 does not settle it, of the same conversion done in float64."""
    error = _relative_error(trial.model, trial.converted, trial.inputs())
    if error <= FLOAT32_ERROR:
        return {"rel_error": error, "precision": "float32"}, None
    model = copy.deepcopy(trial.model).double()
    example = _double(inputs(trial.model, trial.case, trial.size))
    converted, _ = surgeon.convert(model, layers="all", type=trial.kind, example_inputs=example, check=False)
    error64 = _relative_error(model, converted, _double(trial.inputs()))
    result = {"rel_error": error64, "precision": "float64", "float32": error}
    if error64 <= FLOAT64_ERROR:
        return result, None
    # a network that amplifies even float64 rounding: exact layers, the original around them, and no more than rounding does
    layers = _layer_errors(model, converted, _double(trial.inputs()))
    own = _relative_error(model, _Rounded(model, layers), _double(trial.inputs()))
    around = _relative_error(model, _Forced(converted, model), _double(trial.inputs()))
    result |= {"own_rounding": own, "around": around, "layers": (worst := max(layers.values()))}
    if error64 <= 10 * own and around <= FLOAT64_ERROR and worst <= LAYER_ROUNDING:
        return result, None
    return result, f"relative error {error:.2g}, in float64 {error64:.2g} (rounding of the original itself: {own:.2g})"


def _layer_errors(model: nn.Module, converted: nn.Module, args: tuple[Any, ...]) -> dict[str, float]:
    """Relative error of every new layer on the inputs that the original's convolution gets."""
    found: dict[str, float] = {}

    def look(name: str) -> Any:
        layer = copy.deepcopy(converted.get_submodule(name)).eval()

        def hook(_: nn.Module, inputs: Any, out: Tensor) -> None:
            found[name] = max(found.get(name, 0.0), relative_change(out, layer(*inputs)))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(look(name)) for name in spatial_convolutions(model)]
    try:
        with torch.no_grad():
            model.eval()(*args)
    finally:
        for handle in handles:
            handle.remove()
    return found


class _Forced(nn.Module):
    """A converted model in which the original's spatial convolutions compute for the layers in their places."""

    def __init__(self, converted: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(converted)
        for name in spatial_convolutions(model):
            conv = copy.deepcopy(model.get_submodule(name))
            self.model.get_submodule(name).register_forward_hook(lambda _, args, __, conv=conv: conv(*args))

    def forward(self, *args: Any) -> Any:
        return self.model(*args)


class _Rounded(nn.Module):
    """A model whose spatial convolutions are off by these relative errors (at least a rounding), of random sign."""

    def __init__(self, model: nn.Module, errors: dict[str, float]) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(0)
        for name, error in errors.items():

            def off(_: nn.Module, args: Any, out: Tensor, error: float = error) -> Tensor:
                sign = torch.randint(0, 2, out.shape, generator=generator).to(out) * 2 - 1
                return out + sign * max(error, torch.finfo(out.dtype).eps) * out.abs().max()

            self.model.get_submodule(name).register_forward_hook(off)

    def forward(self, *args: Any) -> Any:
        return self.model(*args)


def _relative_error(model: nn.Module, converted: nn.Module, args: tuple[Any, ...]) -> float:
    with torch.no_grad():
        pairs = list(zip(tensors(model.eval()(*args)), tensors(converted.eval()(*args)), strict=True))
    return max((relative_change(a, b) for a, b in pairs), default=0.0)


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    return type(value)(_double(item) for item in value)


def _round_trip(trial: Trial) -> tuple[bool, str | None]:
    """The state dict goes through a file back into the model, whose numbers were changed, and into layers rebuilt from configs.

    One copy of the numbers is in memory: what SEKG makes of wide depthwise convolutions has more than 10^9 parameters.
    """
    args, converted = trial.inputs(), trial.converted.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected = tensors(converted(*args))
        path = Path(folder) / "state.pth"
        torch.save(converted.state_dict(), path)
        for layer in converted.modules():
            if isinstance(layer, DynamicConv2d):
                rebuilt = type(layer)(layer.geometry, layer.config)
                rebuilt.load_state_dict(layer.state_dict())
        for parameter in converted.parameters():
            parameter.uniform_(-1, 1)
        converted.load_state_dict(torch.load(path, weights_only=True, mmap=True))
        same = all(torch.equal(a, b) for a, b in zip(expected, tensors(converted(*args)), strict=True))
    return same, None if same else "the outputs differ after loading the state dict"


def _train_step(trial: Trial) -> tuple[bool, str | None]:
    """Forward in train mode, backward, one SGD step; everything stays finite and every new parameter is reached."""
    problem = _step(trial.converted, trial.case, trial.size)
    if problem is None:
        return True, None
    if (own := _step(copy.deepcopy(trial.model), trial.case, trial.size)) is not None:
        return True, None if own == problem else f"{problem} (the original: {own})"
    return False, problem


def _step(model: nn.Module, case: Case, size: int) -> str | None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    try:
        loss = training_loss(model, case, size)
        loss.backward()
    except (RuntimeError, ValueError) as error:
        return _line(error)
    if not bool(torch.isfinite(loss)):
        return f"the loss is {float(loss)}"
    infinite = [n for n, p in model.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    if infinite:
        return f"infinite gradients in {len(infinite)} parameters, as {infinite[0]}"
    unreached = _unreached(model)
    if unreached:
        return f"no gradient reaches {len(unreached)} new parameters, as {unreached[0]}"
    optimizer.step()
    broken = [n for n, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    return f"infinite parameters after the step, as {broken[0]}" if broken else None


def _unreached(model: nn.Module) -> list[str]:
    """New parameters without a gradient, of layers whose other parameters have one."""
    return [
        f"{name}.{local}"
        for name, layer in model.named_modules()
        if isinstance(layer, DynamicConv2d) and any(p.grad is not None for p in layer.parameters())
        for local, parameter in layer.new_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
