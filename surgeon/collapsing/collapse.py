"""Fold dynamic layers that do not vary back into plain convolutions, and check that nothing else changes."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.collapsing.evidence import Evidence, prove, settled, watching
from surgeon.costs import cost
from surgeon.errors import ConfigError, NothingFoldedError, SelectionError, SurgeonError, UnsupportedLayerError, called
from surgeon.layers.base import CodedConv2d, DynamicConv2d
from surgeon.records.collapse_report import Collapsed, CollapseReport, growth_notes
from surgeon.records.recipe import get_recipe
from surgeon.sites.inputs import Inputs
from surgeon.sites.observe import Call, observe
from surgeon.sites.select import Selector
from surgeon.sites.sites import macs_of
from surgeon.surgery.compare import Difference, compare
from surgeon.surgery.operation import count_parameters
from surgeon.surgery.rewrite import Rewrite, drop_rules, dynamic_layers, plain_convolution
from surgeon.surgery.running import outputs, run
from surgeon.surgery.verify import Settled, Verification, judge, measure
from surgeon.util.copying import copy_model, eager
from surgeon.util.progress import OnProgress, silent
from surgeon.util.tables import rounded_up

CHUNK = 8  # images per forward pass
UNSEEN = "the parameters allow variation, and no images were given to see whether there is any"
NOT_SELECTED = "not selected"


@eager()
def collapse(
    model: nn.Module,
    *,
    tolerance: float = 0.0,
    calibration: Any = None,
    example_inputs: Any = None,
    input_size: Sequence[int] | int | None = None,
    layers: Selector | None = None,
    inplace: bool = False,
    seed: int = 0,
    progress: OnProgress | None = None,
) -> tuple[nn.Module, CollapseReport]:
    """Fold every dynamic layer whose filter is the same at every pixel into one plain convolution.

    Layers proven constant by their parameters need no images. The others are observed on `calibration`, and folded if they do
    not vary, or vary no more than `tolerance`; in the latter case at the filter of their mean code, which is not exact.

    Args:
        tolerance: largest relative variation of a layer's filter, in [0, 1): root mean square over pixels, see
            `surgeon.collapsing.evidence`.
        calibration: images, as model inputs (a tensor (N, C, H, W), or as `example_inputs`).
        example_inputs: inputs for comparing both models if there is no calibration; see `surgeon.convert`.
        layers: names of dynamic layers, or of modules that contain them; default all.
        inplace: change the caller's model; otherwise a copy is changed. After an error the model is unchanged.

    Returns:
        The model, and a report that covers every dynamic layer. Without dynamic layers left it is the plain architecture.

    Raises:
        SelectionError: there is no dynamic layer, or none of these names.
        NothingFoldedError: every layer is kept; the message has the reasons, `report` the numbers.
        VerificationError: an exact folding is not equivalent.
    """
    started = time.perf_counter()
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < 1:
        raise ConfigError(f"tolerance is a relative variation in [0, 1), got {tolerance!r}")
    work = model if inplace else copy_model(model)
    every = dynamic_layers(work)
    if not every:
        raise SelectionError("there is nothing to collapse: the model has no dynamic layer")
    chosen = dynamic_layers(work, layers)
    if inplace and "" in chosen:
        raise ConfigError("the model itself is the dynamic layer: it cannot be collapsed in place")
    tell = progress or silent
    given, name = (example_inputs, "example_inputs") if calibration is None else (calibration, "calibration")
    seen = observe(work, list(every), given, input_size, argument=name)
    batches = _chunks(seen.inputs)
    folding = _Folding(
        work=work, chosen=chosen, batches=batches, images=seen.inputs.batch if calibration is not None else 0
    )
    folding.tolerance, folding.seed, folding.tell = float(tolerance), seed, tell
    folding.decide()
    report = _report(folding, every, seen.calls, seen.inputs.batch)
    report.model, report.input_size = type(model).__name__, seen.inputs.image_size
    report.params_before = report.params_after = count_parameters(work)
    if not folding.convs:
        raise NothingFoldedError(_nothing(report), report)
    report.flops_before = _flops(work, seen.inputs)
    result, verification = folding.operate()
    _conclude(report, folding, verification)
    report.params_after, report.flops_after = count_parameters(result), _flops(result, seen.inputs)
    report.notes += growth_notes(report)
    drop_rules(result, get_recipe(model), folding.convs)
    report.seconds = time.perf_counter() - started
    return result, report


def _chunks(inputs: Inputs) -> list[Inputs]:
    """One batch of images as several small ones; other inputs stay whole."""
    only = inputs.args[0] if len(inputs.args) == 1 and not inputs.kwargs else None
    if not isinstance(only, Tensor) or only.dim() != 4:
        return [inputs]
    return [replace(inputs, args=(part,)) for part in only.split(CHUNK)]


@dataclass(kw_only=True)
class _Folding:
    """One collapse of one model: the evidence, the convolutions, and how to undo it."""

    work: nn.Module
    chosen: dict[str, DynamicConv2d]
    batches: list[Inputs]
    images: int
    tolerance: float = 0.0
    seed: int = 0
    tell: OnProgress = silent
    evidence: dict[str, Evidence] = field(default_factory=dict)
    convs: dict[str, nn.Conv2d] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    errors: dict[str, Difference] = field(default_factory=dict)

    def decide(self) -> None:
        """Gather the evidence, and build the convolutions if it suffices."""
        self.evidence = self._find(self.work, self.chosen, self.batches if self.images else [])
        for done, (name, layer) in enumerate(self.chosen.items()):
            self.tell("fold", done, len(self.chosen))
            found = self.evidence.get(name)
            if found is None:
                self.reasons[name] = self._no_evidence(layer)
                continue
            try:
                conv = plain_convolution(settled(layer, found), name)
            except UnsupportedLayerError as error:
                why = "no variation, but" if found.variation == 0 else "variation that no tolerance folds:"
                self.reasons[name] = f"{why} {'; '.join(error.reasons)}"
                continue
            if found.variation <= self.tolerance:
                self.convs[name] = conv
            else:
                self.reasons[name] = _varies(self.tolerance)

    def _find(
        self, model: nn.Module, layers: Mapping[str, DynamicConv2d], batches: list[Inputs]
    ) -> dict[str, Evidence]:
        found = {name: prove(layer) for name, layer in layers.items()}
        open_ = {n: layer for n, layer in layers.items() if found[n] is None and isinstance(layer, CodedConv2d)}
        if batches and open_:
            with watching(model, open_) as watches:
                for done, inputs in enumerate(batches):
                    self.tell("observe", done, len(batches))
                    run(model, inputs, self.seed)
            found |= {name: watch.evidence() for name, watch in watches.items()}
        return {name: evidence for name, evidence in found.items() if evidence is not None}

    def _no_evidence(self, layer: DynamicConv2d) -> str:
        if not isinstance(layer, CodedConv2d):
            return f"layers of type {layer.type_name} do not expose what varies in them"
        if self.images:
            return "not reached by the forward pass"
        return UNSEEN

    # --- the operation ------------------------------------------------------------------------------------------------

    def operate(self) -> tuple[nn.Module, Verification]:
        """Put the convolutions in, and check. After any error the model has its original modules again."""
        expected = []
        for done, inputs in enumerate(self.batches):
            self.tell("verify", done, 2 * len(self.batches))
            output, errors = measure(self.work, self.convs, inputs, self.seed)
            expected.append(output)
            _take_in(self.errors, errors)
        rewrite = Rewrite(self.work, self.convs)
        try:
            result = rewrite.apply()
            difference = Difference()
            for done, (inputs, output) in enumerate(zip(self.batches, expected, strict=True), start=len(self.batches)):
                self.tell("verify", done, 2 * len(self.batches))
                difference = difference.worse(compare(output, outputs(result, inputs, self.seed)))
            return result, self._judge(difference, rewrite)
        except BaseException:
            rewrite.undo()
            raise

    def _judge(self, output: Difference, rewrite: Rewrite) -> Verification:
        """Exact foldings must be exact; if some are not exact, the model's output error is only reported."""
        exact = {name: conv for name, conv in self.convs.items() if self.evidence[name].variation == 0}
        errors = {name: self.errors[name] for name in exact}
        if len(exact) == len(self.convs):
            return judge(output, errors, self._dtype(), lambda: self._settle(list(exact), rewrite))
        checked = judge(
            Difference(compared=output.compared), errors, self._dtype(), lambda: self._settle(list(exact), rewrite)
        )
        return replace(checked, output=output, exact=False, precision=str(self._dtype()).removeprefix("torch."))

    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.work.parameters() if p.is_floating_point()), torch.float32)

    def _settle(self, names: list[str], rewrite: Rewrite) -> Settled:
        """Errors of the same folding on a float64 copy."""
        rewrite.undo()
        try:
            double = copy_model(self.work).double()
        finally:
            rewrite.apply()
        batches = [inputs.to_dtype(torch.float64) for inputs in self.batches]
        layers = {name: layer for name, layer in dynamic_layers(double).items() if name in names}
        evidence = self._find(double, layers, batches)
        convs = {name: plain_convolution(settled(layer, evidence[name]), name) for name, layer in layers.items()}
        errors: dict[str, Difference] = {}
        expected = []
        for inputs in batches:
            output, found = measure(double, convs, inputs, self.seed)
            expected.append(output)
            _take_in(errors, found)
        folded = Rewrite(double, convs).apply()
        difference = Difference()
        for inputs, output in zip(batches, expected, strict=True):
            difference = difference.worse(compare(output, outputs(folded, inputs, self.seed)))
        return Settled(difference, errors)


def _take_in(errors: dict[str, Difference], more: Mapping[str, Difference]) -> None:
    for name, difference in more.items():
        errors[name] = errors[name].worse(difference) if name in errors else difference


# --- report -------------------------------------------------------------------------------------------------------


def _report(
    folding: _Folding, every: Mapping[str, DynamicConv2d], calls: Mapping[str, list[Call]], batch: int
) -> CollapseReport:
    entries = [_entry(folding, name, layer, calls.get(name, []), batch) for name, layer in every.items()]
    return CollapseReport(layers=entries, tolerance=folding.tolerance, images=folding.images)


def _entry(folding: _Folding, name: str, layer: DynamicConv2d, calls: list[Call], batch: int) -> Collapsed:
    conv, found = folding.convs.get(name), folding.evidence.get(name)
    params = sum(p.numel() for p in layer.parameters())
    macs = macs_of(layer, calls, batch)
    after = macs
    if conv is not None and calls:
        after = sum(call.output[0] * math.prod(call.output[2:]) * conv.weight.numel() for call in calls) // batch
    return Collapsed(
        name=name,
        type=layer.type_name,
        folded=conv is not None,
        reason="" if conv is not None else folding.reasons.get(name, NOT_SELECTED),
        evidence=None if found is None else found.kind,
        variation=None if found is None else found.variation,
        pixels=0 if found is None else found.pixels,
        told="" if found is None else found.told,
        geometry=layer.geometry.to_dict(),
        kernel_size=None if conv is None else tuple(conv.kernel_size),
        params_before=params,
        params_after=params if conv is None else sum(p.numel() for p in conv.parameters()),
        macs_before=macs,
        macs_after=after,
    )


def _conclude(report: CollapseReport, folding: _Folding, verification: Verification) -> None:
    report.max_abs_error, report.max_rel_error = verification.max_abs_error, verification.max_rel_error
    report.precision, report.exact = verification.precision, verification.exact
    report.notes += verification.notes
    report.layers = [
        replace(x, max_abs_error=folding.errors[x.name].max_abs, max_rel_error=folding.errors[x.name].max_rel)
        if x.folded
        else x
        for x in report.layers
    ]
    if any(x.evidence == "images" for x in report.folded):
        report.notes.append("observations hold for these images; on others such a layer may vary")
    if not report.exact:
        inexact = [x.name for x in report.folded if x.variation]
        report.notes.append(
            f"folded within the tolerance although they vary: {len(inexact)}; error reported, not bounded"
        )


def _varies(tolerance: float) -> str:
    return f"variation over the images beyond the tolerance, {tolerance:g}"


def _nothing(report: CollapseReport) -> str:
    """Which layers cannot be folded, and what would help; in Python also why, which the report of a command has said."""
    groups: dict[str, list[str]] = {}
    tried = [layer for layer in report.layers if layer.reason != NOT_SELECTED]
    for layer in tried:
        groups.setdefault(layer.reason, []).append(layer.name)
    reasons = "; ".join(
        f"{reason} ({', '.join(names[:3])}{', ...' if names[3:] else ''})" for reason, names in groups.items()
    )
    varying = _varies(report.tolerance)
    least = min((x.variation for x in report.kept if x.variation and x.reason == varying), default=None)
    hint = ""
    if least is not None and float(enough := rounded_up(least)) < 1:
        hint = f". {called(f'--tolerance {enough}', f'tolerance={enough}')} folds the layer that varies least"
    if UNSEEN in groups:
        hint = f". Images show whether there is variation: {called('--images DIR', 'calibration=')}"
    which = "the dynamic layer cannot" if len(tried) == 1 else f"none of the {len(tried)} dynamic layers can"
    return f"{which} be folded{called('', f': {reasons}')}{hint}"


def _flops(model: nn.Module, inputs: Inputs) -> int | None:
    """FLOPs of the whole model for one image; None if its input is not one batch of images, or it cannot be counted."""
    only = inputs.args[0] if len(inputs.args) == 1 and not inputs.kwargs else None
    if not isinstance(only, Tensor) or only.dim() != 4:
        return None
    try:
        return cost(model, input_size=tuple(only.shape[1:]), mode="infer").flops
    except SurgeonError:
        return None
