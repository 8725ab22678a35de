"""One conversion of one model: builds layers, puts them in, checks them, and can undo everything."""

import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy as is_lazy_tensor

from surgeon.errors import (
    ConfigError,
    GeometryError,
    InputError,
    UnsupportedLayerError,
    VerificationError,
    called,
)
from surgeon.layers.base import DynamicConv2d
from surgeon.layers.source import ConvSource, PlainConvolution
from surgeon.records.recipe import Recipe, set_recipe
from surgeon.records.report import Replaced, Report, Skipped
from surgeon.sites.inputs import given_inputs
from surgeon.sites.sites import ConvSite, Sites, macs_of
from surgeon.surgery.calls import inside, run_converted
from surgeon.surgery.compare import Difference, Leaves, compare
from surgeon.surgery.gradients import check_gradients
from surgeon.surgery.plan import Planned, nothing_replaced
from surgeon.surgery.rewrite import Rewrite, build_layer
from surgeon.surgery.running import halves_agree, outputs, run
from surgeon.surgery.sizes import check_layers
from surgeon.surgery.verify import Settled, Verification, judge, layer_limit, measure, settle_by_layer, settle_in_double
from surgeon.util.progress import OnProgress


def count_parameters(model: nn.Module) -> int:
    """Number of parameters of the whole model, shared ones once."""
    return sum(p.numel() for p in model.parameters() if not is_lazy_tensor(p))


@dataclass(kw_only=True)
class Surgery:
    """One conversion of one model: the plan, the layers built for it, and how to undo it."""

    work: nn.Module
    sites: Sites
    plans: list[Planned]
    seed: int
    tell: OnProgress
    layers: dict[str, DynamicConv2d] = field(default_factory=dict)
    refused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rewrite: Rewrite | None = None
    expected: Leaves | None = None  # output before the surgery, if it is checked
    earlier: Recipe | None = None

    def build(self, calibration: Any) -> None:
        """Build every planned layer; raises `NothingReplacedError` if none could be built."""
        self.refused = {plan.site.name: plan.reasons for plan in self.plans if plan.reasons}
        wanted = [plan for plan in self.plans if not plan.reasons]
        check_layers((p.layer, p.site.geometry, p.config) for p in wanted if p.site.geometry is not None)
        if calibration is not None and wanted:
            if not any(
                p.config.asks_to_compress() or p.config.may_compress(p.site.geometry)
                for p in wanted
                if p.site.geometry is not None
            ):
                what = called("--calibrate fits", "calibration fits")
                raise ConfigError(
                    f"{what} layers to the images where they compress, and none of these does: they are exact on any image. "
                    f"{called('Add --compress, or leave it out', 'Leave it out')}"
                )
            self._build_on(calibration, wanted)
        for done, plan in enumerate(wanted):
            self.tell("build", done, len(wanted))
            if plan.site.name not in self.layers and plan.site.name not in self.refused:
                self._build_one(plan, {})
        self.tell("build", len(wanted), len(wanted))
        self.layers = {plan.site.name: self.layers[plan.site.name] for plan in wanted if plan.site.name in self.layers}
        if not self.layers:
            raise nothing_replaced([(plan.site, self.refused[plan.site.name]) for plan in self.plans])

    def _build_one(self, plan: Planned, context: dict[str, Any]) -> None:
        name = plan.site.name
        conv = self.work.get_submodule(name)
        try:
            self.layers[name] = build_layer(conv, plan.layer, plan.config, self.layer_seed(name), context)
        except UnsupportedLayerError as error:
            self.refused[name] = error.reasons or (str(error),)
        except (ConfigError, GeometryError) as error:
            self.refused[name] = (str(error),)
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.refused[name] = (f"its layer cannot be built ({type(error).__name__}: {error})",)

    def _build_on(self, calibration: Any, wanted: list[Planned]) -> None:
        """Build layers while the model runs on calibration data, each for the first input of its convolution.

        If the images of a batch do not affect each other, the data run through the model twice at once: unchanged,
        and through the layers built so far, so that a layer can compensate for errors of earlier ones.
        """
        inputs = given_inputs(calibration)
        pairs = inputs.twice()
        paired = pairs is not None and halves_agree(self.work, [p.site.name for p in wanted], pairs, self.seed)

        def hook(plan: Planned) -> Callable[..., Tensor | None]:
            name = plan.site.name

            def build(conv: nn.Module, args: Any, kwargs: dict[str, Any], out: Tensor) -> Tensor | None:
                x: Tensor = args[0] if args else next(iter(kwargs.values()))
                exact, lossy = x.chunk(2) if paired else (None, x)
                if name not in self.layers and name not in self.refused:
                    self.tell("build", len(self.layers), len(wanted))
                    self._build_one(plan, {"calibration": lossy, "calibration_exact": exact})
                if not paired or name not in self.layers:
                    return None
                return torch.cat([out.chunk(2)[0], self.layers[name].eval()(lossy)])

            return build

        handles = [
            self.work.get_submodule(plan.site.name).register_forward_hook(hook(plan), with_kwargs=True)
            for plan in wanted
        ]
        try:
            run(self.work, pairs if paired and pairs is not None else inputs, self.seed)
        finally:
            for handle in handles:
                handle.remove()
        for plan in wanted:  # built in eval mode, without gradients
            if plan.site.name in self.layers:
                self.layers[plan.site.name].train(self.work.get_submodule(plan.site.name).training)

    def layer_seed(self, name: str) -> int:
        """A separate seed per layer, so that its random numbers do not depend on which others are replaced."""
        return (self.seed * 1_000_003 + zlib.crc32(name.encode())) % 2**63

    def operate(self, *, check: bool) -> tuple[nn.Module, Verification | None]:
        """Put the layers in, and check. After any error the model has its original modules again."""
        inputs = self.sites.seen.inputs
        calls: Counter[str] = Counter()
        if check:
            self.tell("verify", 0, 3)
            expected, errors = measure(self.work, self.layers, inputs, self.seed, calls)
            self.expected = expected
            self._refuse_unfaithful(errors)
        old = {name: self.work.get_submodule(name) for name in self.layers}
        self.rewrite = Rewrite(self.work, self.layers)
        try:
            result = self.rewrite.apply()
            if not check:
                return result, None
            self.tell("verify", 1, 3)
            output = compare(expected, run_converted(result, old, calls, inputs, self.seed))
            seen = output if output.compared else self._compare_inside(result)
            verification = self._judge(expected, seen, errors, settles=output.compared > 0)
            self.tell("verify", 2, 3)
            verification.notes += check_gradients(self.layers)
            self.tell("verify", 3, 3)
        except BaseException:
            self.rewrite.undo()
            raise
        return result, verification

    def _refuse_unfaithful(self, errors: dict[str, Difference]) -> None:
        """Refuse convolutions whose output in the model differs from the one that was read: their layer would miss the rest."""
        wrong = [name for name, found in errors.items() if not found.max_rel <= layer_limit(found)]
        if not wrong:
            return
        sources = {name: ConvSource.read(self.work.get_submodule(name)) for name in wrong}
        plain = {name: PlainConvolution(source) for name, source in sources.items()}
        _, own = measure(self.work, plain, self.sites.seen.inputs, self.seed)
        for name, found in own.items():
            if not found.max_rel <= layer_limit(found):
                told = f"its output in the model is not that of the convolution that was read (relative error {found.max_rel:.1e})"
                self.refused[name] = (told,)
                del self.layers[name], errors[name]
        if not self.layers:
            raise nothing_replaced([(plan.site, self.refused[plan.site.name]) for plan in self.plans])

    def _compare_inside(self, result: nn.Module) -> Difference:
        assert self.rewrite is not None
        after = inside(result, self.sites.seen.inputs, self.seed)
        before = self._as_it_was(lambda: inside(self.work, self.sites.seen.inputs, self.seed))
        found = compare(before, {name: after.get(name) for name in before})
        note = f"no tensor of the output can be compared: compared {len(before)} modules inside the model instead"
        return replace(found, notes=(*found.notes, note))

    def _judge(
        self, expected: Leaves, output: Difference, errors: dict[str, Difference], *, settles: bool
    ) -> Verification:
        compressed = any(plan.config.may_compress(plan.site.geometry) for plan in self.plans if plan.site.geometry)
        try:
            if not settles:
                return judge(output, errors, self._dtype(), _nothing_to_settle, compressed)
            return judge(output, errors, self._dtype(), self._settle, compressed, self._settle_by_layer)
        except VerificationError as error:
            again = self._as_it_was(lambda: outputs(self.work, self.sites.seen.inputs, self.seed))
            own = compare(expected, again)
            if own.max_rel == 0:
                raise
            raise VerificationError(
                f"the original model is not deterministic: two runs with the same inputs, state and seeds differ (relative error "
                f"{own.max_rel:.1e}), so nothing can be compared with it: it may draw random numbers from a generator "
                f"of its own. check=False converts without comparing. ({error})"
            ) from error

    def _as_it_was(self, look: Callable[[], Any]) -> Any:
        """Run something on the model as it was before the surgery."""
        assert self.rewrite is not None
        self.rewrite.undo()
        try:
            return look()
        finally:
            self.rewrite.apply()

    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.work.parameters() if p.is_floating_point()), torch.float32)

    def _settle(self) -> Settled:
        settled: Settled = self._as_it_was(
            lambda: settle_in_double(self.work, self._builders(), self.sites.seen.inputs, self.seed)
        )
        return settled

    def _settle_by_layer(self) -> Settled:
        assert self.rewrite is not None
        rewrite = self.rewrite

        def original() -> nn.Module:
            rewrite.undo()
            return self.work

        try:
            return settle_by_layer(original, rewrite.apply, self._builders(), self.sites.seen.inputs, self.seed)
        finally:
            rewrite.apply()

    def _builders(self) -> dict[str, Callable[[nn.Module], nn.Module]]:
        return {plan.site.name: self._builder(plan) for plan in self.plans if plan.site.name in self.layers}

    def _builder(self, plan: Planned) -> Callable[[nn.Module], DynamicConv2d]:
        return lambda conv: build_layer(conv, plan.layer, plan.config, self.layer_seed(plan.site.name))

    def undo(self) -> None:
        """Restore the model and its recipe."""
        if self.rewrite is not None:
            self.rewrite.undo()
        set_recipe(self.work, self.earlier)

    # --- report -------------------------------------------------------------------------------------------------------

    def report(self, verification: Verification | None) -> Report:
        """A report of every convolution: replaced, refused, or not selected."""
        selected = {plan.site.name for plan in self.plans}
        replaced, skipped, macs_after = [], [], 0
        for site in self.sites.convs:
            if site.name in self.layers:
                entry = self._replaced(site, verification)
                replaced.append(entry)
                macs_after += entry.macs_after or 0
                continue
            macs_after += site.macs or 0
            reasons = self.refused.get(site.name, ("not selected",))
            skipped.append(_skipped(site, site.name in selected, reasons))
        report = Report(replaced=replaced, skipped=skipped)
        report.macs_before, report.macs_after = sum(site.macs or 0 for site in self.sites.convs), macs_after
        if verification is None:
            report.notes.append("not verified")
            return report
        report.max_abs_error, report.max_rel_error = verification.max_abs_error, verification.max_rel_error
        report.precision, report.exact = verification.precision, verification.exact
        report.notes += verification.notes
        return report

    def _replaced(self, site: ConvSite, verification: Verification | None) -> Replaced:
        layer = self.layers[site.name]
        error = Difference(max_abs=float("nan"), max_rel=float("nan"))
        if verification is not None:
            error = verification.layers[site.name]
        return Replaced(
            name=site.name,
            aliases=site.aliases,
            stage=site.stage,
            type=layer.type_name,
            options=layer.config.to_dict(),
            geometry=layer.geometry.to_dict(),
            calls=len(site.calls),
            params_before=site.params,
            params_after=count_parameters(layer),
            macs_before=site.macs,
            macs_after=macs_of(layer, site.calls, self.sites.seen.inputs.batch),
            max_abs_error=error.max_abs,
            max_rel_error=error.max_rel,
            notes=site.notes + error.notes,
        )


def _nothing_to_settle() -> Settled:
    raise InputError("its output has no tensor")


def _skipped(site: ConvSite, selected: bool, reasons: tuple[str, ...]) -> Skipped:
    return Skipped(
        name=site.name,
        aliases=site.aliases,
        stage=site.stage,
        module=site.module,
        geometry=None if site.geometry is None else site.geometry.to_dict(),
        selected=selected,
        reasons=reasons,
    )
