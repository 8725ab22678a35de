"""The main operation: give chosen convolutions of a model dynamic layers that compute the same."""

import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy as is_lazy_tensor

from surgeon.blocks import find_blocks
from surgeon.calls import inside, run_converted
from surgeon.compare import Difference, Leaves, compare
from surgeon.copying import copy_model, eager, without_compiler
from surgeon.errors import (
    ConfigError,
    GeometryError,
    InputError,
    ModelError,
    SelectionError,
    UnsupportedLayerError,
    VerificationError,
)
from surgeon.functional import Raised
from surgeon.gradients import check_gradients
from surgeon.inputs import given_inputs
from surgeon.layers.base import DynamicConv2d, LayerConfig
from surgeon.layers.registry import type_of
from surgeon.layers.source import ConvSource, PlainConvolution
from surgeon.plan import Planned, make_plan, may_compress, nothing_replaced
from surgeon.recipe import CONVOLUTION, Recipe, Rule, get_recipe, quoted, set_recipe, versions
from surgeon.report import Replaced, Report, Skipped, growth_notes
from surgeon.rewrite import Rewrite, build_layer
from surgeon.select import split_items
from surgeon.sites import ConvSite, Sites, find_sites, macs_of
from surgeon.sizes import check_layers
from surgeon.trace import trace_graph
from surgeon.verify import (
    Settled,
    Verification,
    halves_agree,
    judge,
    layer_limit,
    measure,
    outputs,
    run,
    settle_by_layer,
    settle_in_double,
)

Progress = Callable[[str, int, int], None]


@eager()
def convert(
    model: nn.Module,
    *,
    layers: str | Sequence[str] | Recipe | None = None,
    type: str | LayerConfig | None = None,
    pattern: str | None = None,
    example_inputs: Any = None,
    inplace: bool = False,
    as_graph: bool = False,
    recipe: Recipe | None = None,
    input_size: Sequence[int] | int | None = None,
    calibration: Any = None,
    seed: int = 0,
    check: bool = True,
    progress: Progress | None = None,
    **layer_options: Any,
) -> tuple[nn.Module, Report]:
    """Replace convolutions by dynamic layers so that the model computes what it computed.

    Args:
        layers: which convolutions, in the selector language of `surgeon.select`, or a recipe.
        type: the layer type, "acda", "pafu" or "sekg", with `layer_options`; or a config such as `ACDAConfig(atoms=2)`.
        pattern: "dcb" instead of a type: residual blocks become ADFNet's DCBs (see `surgeon.blocks`), those whose first
            convolution `layers` selects (default: all); `layer_options` are those of "sekg".
        example_inputs: a tensor, a tuple of arguments, a list (one argument) or a dict of keyword arguments. Without it the
            model's own input size is used, or `input_size`: (C, H, W), (H, W) or one number.
        inplace: change the caller's model; otherwise a copy is changed. After an error the model is as it was.
        as_graph: return a `torch.fx.GraphModule` of the converted model, traced in its current mode.
        recipe: rules that mix types and options, instead of `layers` and `type`.
        calibration: model inputs, as `example_inputs`; layers that are compressed are fitted to what they get from it.
        check: compare with the original, output and layers, and try that new parameters get gradients.
        progress: called with a stage's name, what is done and how much there is.

    Returns:
        The converted model, and a report in which every convolution is.

    Raises:
        SelectionError, ConfigError: the selection matches nothing, the type or an option is wrong.
        InputError: the model does not run on the inputs.
        NothingReplacedError: every selected convolution was refused; the message has the reasons.
        VerificationError: the result does not compute the same.
    """
    started = time.perf_counter()
    if pattern is not None:
        layers, type, layer_options = _of_pattern(pattern, layers, type, recipe, layer_options)
    order = _read_order(layers, type, recipe, layer_options, seed)
    tell = progress or _silent
    model = without_compiler(model)
    _has_data(model)
    work = model if inplace else copy_model(model)
    params_before = count_parameters(work)
    functional = Raised(work)
    surgery = None
    try:
        tell("trace", 0, 1)
        sites = functional.described(find_sites(work, example_inputs, input_size, origin=model))
        tell("trace", 1, 1)
        plans = make_plan(sites.convs, order.rules)
        if pattern is not None:
            plans = _in_blocks(plans, find_blocks(work, pattern), pattern)
        surgery = Surgery(work=work, sites=sites, plans=plans, seed=order.seed, tell=tell, earlier=get_recipe(work))
        if inplace and any(plan.site.name == "" for plan in surgery.plans):
            raise ConfigError("the model itself is the selected convolution: it cannot be replaced in place")
        surgery.build(calibration)
        result, verification = surgery.operate(check=check)
        if surgery.expected is None:
            functional.keep(surgery.layers)
        else:
            functional.keep_checked(surgery.layers, surgery.expected, sites.seen.inputs, order.seed)
        _remember(result, order, surgery)
        report = surgery.report(verification)
        report.params_before, report.params_after = params_before, count_parameters(result)
        report.model = model.__class__.__name__
        report.notes += growth_notes(report)
        if as_graph and not isinstance(result, fx.GraphModule):
            result = _as_graph(result, surgery, check)
    except BaseException:
        if surgery is not None:
            surgery.undo()
        functional.undo()
        raise
    if inplace:
        report.notes.append(_optimizer_note(surgery))
    report.seconds = time.perf_counter() - started
    return result, report


def inspect(
    model: nn.Module, example_inputs: Any = None, *, input_size: Sequence[int] | int | None = None
) -> list[ConvSite]:
    """Every convolution of a model: names, geometry, stage, shapes, cost, neighbors, and what forbids to replace it.

    The model is not touched. Raises `InputError` if it does not run on the inputs.
    """
    functional = Raised(model)
    try:
        return list(functional.described(find_sites(model, example_inputs, input_size)).convs)
    finally:
        functional.undo()


def count_parameters(model: nn.Module) -> int:
    """Number of parameters of the whole model, shared ones once."""
    return sum(p.numel() for p in model.parameters() if not is_lazy_tensor(p))


OPTIMIZER_NOTE = "an optimizer made before this conversion does not know"  # so begins a note of conversions in place


def _optimizer_note(surgery: "Surgery") -> str:
    count = sum(len(list(layer.parameters())) for layer in surgery.layers.values())
    return f"{OPTIMIZER_NOTE} {count} parameters of the new layers: make it anew"


def _has_data(model: nn.Module) -> None:
    empty = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if empty:
        raise ModelError(
            f"{type(model).__name__} has tensors without data ({', '.join(empty[:3])}: on the meta device, or offloaded): "
            f"load its weights, or take the offloading off (accelerate.hooks.remove_hook_from_module), before it is converted"
        )


def _silent(stage: str, done: int, total: int) -> None:
    return None


# --- what was asked -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Order:
    rules: tuple[Rule, ...]
    seed: int
    recipe: Recipe | None


def _read_order(
    layers: str | Sequence[str] | Recipe | None,
    type: str | LayerConfig | None,
    recipe: Recipe | None,
    options: dict[str, Any],
    seed: int,
) -> _Order:
    if isinstance(layers, Recipe):
        if recipe is not None:
            raise ConfigError("two recipes were given, as layers and as recipe")
        layers, recipe = None, layers
    if recipe is not None:
        if layers is not None or type is not None or options:
            extra = ", ".join(
                [*(["layers"] if layers is not None else []), *(["type"] if type is not None else []), *options]
            )
            raise ConfigError(f"a recipe says everything itself: leave out {extra}")
        if any(rule.type == CONVOLUTION for rule in recipe.rules):
            raise ConfigError("the recipe is that of a collapsed model: its convolutions cannot be made by converting")
        if not recipe.rules:
            raise ConfigError("the recipe has no rules: there is nothing to replace")
        return _Order(rules=recipe.rules, seed=seed or recipe.seed, recipe=recipe)
    if layers is None or type is None:
        missing = "layers" if layers is None else "type"
        raise ConfigError(f"{missing} is missing: say which layers become which type, or pass a recipe")
    if isinstance(type, LayerConfig):
        if options:
            raise ConfigError(
                f"the type is a {type.__class__.__name__} and says its options itself: leave out {', '.join(options)}"
            )
        options = type.to_dict()
        type = type_of(type)
    rule = Rule(layers=",".join(split_items(layers)), type=type, options=options)
    return _Order(rules=(rule,), seed=seed, recipe=None)


def _of_pattern(
    pattern: str, layers: Any, type: Any, recipe: Recipe | None, options: dict[str, Any]
) -> tuple[Any, str, dict[str, Any]]:
    """The selection, type and options of a pattern; raises `ConfigError` where these are said in another way, too."""
    if type is not None or recipe is not None or isinstance(layers, Recipe):
        raise ConfigError(f"the pattern {pattern} says what layers become: leave out type and recipe")
    if "mode" in options:
        raise ConfigError(f"the pattern {pattern} says the mode itself: leave it out")
    return "all" if layers is None else layers, "sekg", {"mode": "dense", **options}


def _in_blocks(plans: list[Planned], blocks: dict[str, str], pattern: str) -> list[Planned]:
    """The plans for the convolutions that a pattern names."""
    chosen = [plan for plan in plans if plan.site.name in blocks]
    if not chosen:
        raise SelectionError(
            f"the selection holds no first convolution of a residual block; for {pattern} there are {', '.join(blocks)}"
        )
    return chosen


def _remember(result: nn.Module, order: _Order, surgery: "Surgery") -> None:
    """Record the conversion in the model: one rule a layer, after those of earlier conversions."""
    earlier = surgery.earlier
    base = order.recipe.base if order.recipe is not None else None
    rules = earlier.rules if earlier is not None else ()
    if base is None and earlier is not None:
        base = earlier.base
    new = tuple(
        Rule(layers=quoted(name), type=layer.type_name, options=layer.config.to_dict())
        for name, layer in surgery.layers.items()
    )
    classes = earlier.classes if earlier is not None else None
    set_recipe(result, Recipe(rules=rules + new, base=base, seed=order.seed, versions=versions(), classes=classes))


def _as_graph(result: nn.Module, surgery: "Surgery", check: bool) -> nn.Module:
    graph = trace_graph(result)
    if check:
        inputs = surgery.sites.seen.inputs
        difference = compare(outputs(result, inputs, surgery.seed), outputs(graph, inputs, surgery.seed))
        if difference.max_rel > 1e-6:
            raise VerificationError(
                f"the traced graph does not compute what the model computes (relative error {difference.max_rel:.1e}): "
                f"the model's forward depends on its inputs or mode. Leave as_graph out."
            )
    set_recipe(graph, get_recipe(result))
    return graph


# --- the operation ------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Surgery:
    """One conversion of one model: the plan, the layers that were built, and the way back."""

    work: nn.Module
    sites: Sites
    plans: list[Planned]
    seed: int
    tell: Progress
    layers: dict[str, DynamicConv2d] = field(default_factory=dict)
    refused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rewrite: Rewrite | None = None
    expected: Leaves | None = None  # what the model gave before the surgery, where that is checked
    earlier: Recipe | None = None

    def build(self, calibration: Any) -> None:
        """Make every planned layer; raises `NothingReplacedError` if none could be made."""
        self.refused = {plan.site.name: plan.reasons for plan in self.plans if plan.reasons}
        wanted = [plan for plan in self.plans if not plan.reasons]
        check_layers((p.layer, p.site.geometry, p.config) for p in wanted if p.site.geometry is not None)
        if calibration is not None and wanted:
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
            self.refused[name] = (f"its layer cannot be made ({type(error).__name__}: {error})",)

    def _build_on(self, calibration: Any, wanted: list[Planned]) -> None:
        """Build layers while the model runs on calibration data, each for the input that its convolution gets first.

        Where the images of a batch are independent of each other, the data run through the model twice at once: as they
        are, and through the layers built so far, so that a layer can make good what earlier ones lost.
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
        for plan in wanted:  # built in eval mode and without gradients
            if plan.site.name in self.layers:
                self.layers[plan.site.name].train(self.work.get_submodule(plan.site.name).training)

    def layer_seed(self, name: str) -> int:
        """Every layer draws its own random numbers, whichever others are replaced."""
        return (self.seed * 1_000_003 + zlib.crc32(name.encode())) % 2**63

    def operate(self, *, check: bool) -> tuple[nn.Module, Verification | None]:
        """Put the layers in, and check. After any error the model has its own modules again."""
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
        """Refuse convolutions that do more in the model than what was read of them: their layer cannot know of it."""
        wrong = [name for name, found in errors.items() if not found.max_rel <= layer_limit(found)]
        if not wrong:
            return
        sources = {name: ConvSource.read(self.work.get_submodule(name)) for name in wrong}
        plain = {name: PlainConvolution(source) for name, source in sources.items()}
        _, own = measure(self.work, plain, self.sites.seen.inputs, self.seed)
        for name, found in own.items():
            if not found.max_rel <= layer_limit(found):
                told = f"what it gives in the model is not the convolution that was read (relative error {found.max_rel:.1e})"
                self.refused[name] = (told,)
                del self.layers[name], errors[name]
        if not self.layers:
            raise nothing_replaced([(plan.site, self.refused[plan.site.name]) for plan in self.plans])

    def _compare_inside(self, result: nn.Module) -> Difference:
        assert self.rewrite is not None
        after = inside(result, self.sites.seen.inputs, self.seed)
        before = self._as_it_was(lambda: inside(self.work, self.sites.seen.inputs, self.seed))
        found = compare(before, {name: after.get(name) for name in before})
        note = f"no tensor of the output can be compared: {len(before)} modules inside of the model were instead"
        return replace(found, notes=(*found.notes, note))

    def _judge(
        self, expected: Leaves, output: Difference, errors: dict[str, Difference], *, settles: bool
    ) -> Verification:
        compressed = any(may_compress(plan.site.geometry, plan.config) for plan in self.plans if plan.site.geometry)
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
                f"the original model does not give the same twice on the same inputs, state and seeds (relative error "
                f"{own.max_rel:.1e}), so nothing can be compared with it: it may draw random numbers from a generator "
                f"of its own. check=False converts without comparing. ({error})"
            ) from error

    def _as_it_was(self, look: Callable[[], Any]) -> Any:
        """Do something with the model before the surgery."""
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
        """The model as it was, with the recipe it had."""
        if self.rewrite is not None:
            self.rewrite.undo()
        set_recipe(self.work, self.earlier)

    # --- report -------------------------------------------------------------------------------------------------------

    def report(self, verification: Verification | None) -> Report:
        """Every convolution: replaced, refused, or not selected."""
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
