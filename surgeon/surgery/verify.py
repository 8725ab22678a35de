"""Equivalence checks between converted and original model: outputs, and every new layer."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from surgeon.errors import InputError, UnsupportedLayerError, VerificationError
from surgeon.layers.base import DynamicConv2d
from surgeon.sites.inputs import Inputs
from surgeon.sites.observe import observe
from surgeon.surgery.compare import Difference, Leaves, compare, compare_tensors
from surgeon.surgery.raised import Raised
from surgeon.surgery.rewrite import (
    Rewrite,
    build_layer,
    dynamic_layers,
    folded_from,
    folded_window,
    folded_windows,
    plain_convolution,
    sample_input,
)
from surgeon.surgery.running import fails, outputs
from surgeon.util.copying import check_module, copy_model, eager, evaluating, is_lazy, seeded, strict_float32

TOLERANCE = 1e-5  # relative error in float32
TOLERANCE_DOUBLE = 1e-10  # relative error of the float64 run that settles what float32 leaves open
_LAYER_ROUNDING = 1e-12  # up to this, a layer differs only by rounding in float64
_SENSITIVITY = 10.0  # allowed difference in float64, as a multiple of the original's own rounding error
_LAYER_LIMIT = 1e-4  # beyond this, a layer is wrong in float32 regardless of float64
_STORED_ROUNDING = 8  # allowed error of a given layer that computes in float64, in units of its own dtype's resolution
_MOST_CALLS = 4  # maximum measured calls of one convolution per forward pass

Build = Callable[[nn.Module], nn.Module]


class Settled(NamedTuple):
    """Errors of the same conversion in float64, of the outputs and of every layer.

    `own` is the change of the original's own outputs when every replaced convolution is perturbed by its layer's error.
    `around` is the output error with the old convolutions running in the converted model: changes made elsewhere by the surgery.
    """

    output: Difference
    layers: dict[str, Difference]
    own: float = 0.0
    around: float = 0.0


@dataclass(kw_only=True)
class Verification:
    """Results of a check. Output errors are from the run named by `precision`, layer errors in the model's own dtype."""

    output: Difference
    layers: dict[str, Difference]
    precision: str
    exact: bool = True
    notes: list[str] = field(default_factory=list)

    @property
    def max_abs_error(self) -> float:
        return self.output.max_abs

    @property
    def max_rel_error(self) -> float:
        return self.output.max_rel


def measure(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: Inputs, seed: int = 0, calls: Counter[str] | None = None
) -> tuple[Leaves, dict[str, Difference]]:
    """Run a model and compare each new layer with the old one's output for the same input.

    Stores only the largest errors, and in `calls` the number of calls of each old layer. A layer that the forward pass does not
    reach is compared on a random input.
    """
    model = copy_model(model) if is_lazy(model) else model
    found: dict[str, Difference] = {}
    calls = Counter() if calls is None else calls

    def hook(name: str, layer: nn.Module) -> Callable[..., None]:
        def look(conv: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            calls[name] += 1
            if calls[name] <= _MOST_CALLS:
                x: Tensor = args[0] if args else next(iter(kwargs.values()))
                if torch.is_autocast_enabled(x.device.type):  # it would mask errors of the layer itself
                    with torch.autocast(x.device.type, enabled=False):
                        x = x.to(next(conv.parameters()).dtype)
                        difference = compare_tensors(conv.forward(x), layer.forward(x), name)
                else:
                    difference = compare_tensors(output, layer.forward(x), name)
                found[name] = found[name].worse(difference) if name in found else difference

        return look

    handles = [
        model.get_submodule(name).register_forward_hook(hook(name, layer), with_kwargs=True, prepend=True)
        for name, layer in layers.items()
    ]
    with evaluating(nn.ModuleList(layers.values())), strict_float32():
        try:
            output = outputs(model, inputs, seed)
        finally:
            for handle in handles:
                handle.remove()
        for name, layer in layers.items():
            if name not in found:
                old = model.get_submodule(name)
                with evaluating(model), seeded(seed):
                    x = sample_input(layer if isinstance(layer, DynamicConv2d) else old, 2, 5)
                    found[name] = compare_tensors(old.forward(x), layer.forward(x), name)
    return output, found


# --- decision -----------------------------------------------------------------------------------------------------


def judge(
    output: Difference,
    layers: dict[str, Difference],
    dtype: torch.dtype,
    settle: Callable[[], Settled],
    compressed: bool = False,
    by_layer: Callable[[], Settled] | None = None,
) -> Verification:
    """Decide whether a conversion is exact.

    Within `TOLERANCE` it is. Beyond, `settle` must return the errors in float64, and these must be within `TOLERANCE_DOUBLE`;
    if the network amplifies even float64 rounding beyond that, each layer must be exact to rounding, the model around the
    layers must equal the original, and the outputs must differ no more than the original does under its own rounding.
    Compressed conversions are not bounded. Raises `VerificationError` naming the worst layers.
    """
    name = str(dtype).removeprefix("torch.")
    if not output.compared and not (layers and all(found.compared for found in layers.values())):
        raise VerificationError(
            "nothing could be compared: the output contains no tensor, and no replaced layer ran on these inputs. Give "
            "example_inputs that reach them, or check=False to convert without comparing"
        )
    result = Verification(output=output, layers=layers, precision=name, notes=list(output.notes))
    worst = max([output.max_rel, *(d.max_rel for d in layers.values())])
    if worst <= TOLERANCE:
        return result
    if compressed:
        result.exact = False
        result.notes.append("compressed: the errors are reported, not bounded")
        return result
    coarsest = torch.finfo(dtype).eps
    wrong = {layer: d for layer, d in layers.items() if not d.max_rel <= layer_limit(d, coarsest)}
    if wrong:
        limit = min(layer_limit(d, coarsest) for d in wrong.values())
        raise VerificationError(_failed(output, wrong, f"layers beyond {limit:.0e}"))
    _settle(result, settle, name, by_layer)
    return result


def layer_limit(found: Difference, eps: float = 0.0) -> float:
    """Allowed rounding error of a layer: by the dtype of its own output, or the given one if it has none."""
    return max(_LAYER_LIMIT, 8 * (found.eps or eps))


def _settle(
    result: Verification, settle: Callable[[], Settled], name: str, by_layer: Callable[[], Settled] | None = None
) -> None:
    output = result.output
    try:
        settled = settle()
    except InputError as error:
        if by_layer is not None and _exact_by_layer(result, by_layer()):
            return
        if output.max_rel <= 100 * TOLERANCE:
            result.notes.append(
                f"no layer differs by more than {max((d.max_rel for d in result.layers.values()), default=0.0):.1e}, but the "
                f"model does not run in float64, which would settle whether that is rounding ({error})"
            )
            return
        raise VerificationError(
            _failed(output, result.layers, f"and it cannot be settled in float64 ({error})")
        ) from error
    worst_layer = max((d.max_rel for d in settled.layers.values()), default=0.0)
    chaotic = (
        worst_layer <= _LAYER_ROUNDING
        and settled.output.max_rel <= _SENSITIVITY * settled.own
        and math.isfinite(settled.output.max_rel)
    )
    exact = max(settled.output.max_rel, worst_layer) <= TOLERANCE_DOUBLE or chaotic
    if not (exact and settled.around <= TOLERANCE_DOUBLE):
        raise VerificationError(
            _failed(output, settled.layers, _remaining(settled, max(settled.output.max_rel, worst_layer)))
        )
    result.precision = "float64"
    result.notes.append(
        f"{name} rounding is amplified by depth to a relative error of {output.max_rel:.1e}; the same conversion of a "
        f"float64 copy has {settled.output.max_rel:.1e}"
    )
    if settled.output.max_rel > TOLERANCE_DOUBLE:
        result.notes.append(
            f"this network amplifies even float64 rounding: each layer is exact to {worst_layer:.1e}, and disturbing the "
            f"original's convolutions by rounding alone changes its output by {settled.own:.1e}; with the old convolutions "
            f"computing in the converted model the outputs differ by {settled.around:.1e}"
        )
    result.output = settled.output  # report the errors of the named precision


def _remaining(settled: Settled, worst: float) -> str:
    """Description of the remaining difference in float64: the redone conversion, the surroundings of its layers, or both."""
    told = [] if worst <= TOLERANCE_DOUBLE else [f"in float64 still {worst:.1e}"]
    if settled.around > TOLERANCE_DOUBLE and settled.layers:
        told.append(f"{settled.around:.1e} with the old convolutions in the new model: it differs around its layers")
    elif settled.around > TOLERANCE_DOUBLE:
        told.append(
            f"in float64 still {settled.around:.1e}; no layer was replaced between the two, something else differs"
        )
    return ", and ".join(told)


def _exact_by_layer(result: Verification, settled: Settled) -> bool:
    """For a model that does not run in float64: each layer is exact there, and the model around them is unchanged."""
    worst = max((d.max_rel for d in settled.layers.values()), default=0.0)
    if worst > TOLERANCE_DOUBLE or settled.around > TOLERANCE:
        return False
    result.notes.append(
        f"the model does not run in float64, its layers do: each is exact to {worst:.1e} there, and with the old "
        f"convolutions computing in the converted model the outputs differ by {settled.around:.1e}; the rest is rounding"
    )
    return True


def settle_by_layer(
    original: Callable[[], nn.Module],
    converted: Callable[[], nn.Module],
    build: Mapping[str, Build],
    inputs: Inputs,
    seed: int,
) -> Settled:
    """Errors of every layer in float64 on random input, and of the model around them in its own precision."""
    model = original()
    old = {name: model.get_submodule(name) for name in build}
    expected = outputs(model, inputs, seed)
    layers: dict[str, Difference] = {}
    for name, make in build.items():
        conv = copy_model(old[name]).double()
        layer = make(conv)
        with evaluating(conv), evaluating(layer), seeded(seed):
            x = sample_input(layer if isinstance(layer, DynamicConv2d) else conv, 2, 5)
            layers[name] = compare_tensors(conv.forward(x), layer.forward(x), name)
    around = compare(expected, _computed_by(old, converted(), inputs, seed))
    return Settled(around, layers, 0.0, around.max_rel)


def _failed(output: Difference, layers: Mapping[str, Difference], told: str) -> str:
    worst = sorted(layers.items(), key=lambda item: -item[1].max_rel)[:3]
    names = ". Worst layers: " + ", ".join(f"{name} {d.max_rel:.1e}" for name, d in worst) if worst else ""
    notes = "; ".join(("", *output.notes))
    return (
        f"the converted model is not equivalent to the original: relative error {output.max_rel:.1e} "
        f"(allowed {TOLERANCE:.0e}; {told}){names}{notes}"
    )


def settle_in_double(model: nn.Module, build: Mapping[str, Build], inputs: Inputs, seed: int) -> Settled:
    """Errors of the same conversion of a float64 copy of the original. Raises `InputError` if that does not run."""
    double = copy_model(model).double()
    wide = inputs.to_dtype(torch.float64)
    layers = {name: make(double.get_submodule(name)) for name, make in build.items()}
    expected, errors = measure(double, layers, wide, seed)
    old = {name: double.get_submodule(name) for name in layers}
    own = compare(expected, _disturbed(double, {name: d.max_rel for name, d in errors.items()}, wide, seed)).max_rel
    converted = Rewrite(double, layers).apply()
    output = compare(expected, outputs(converted, wide, seed))
    around = compare(expected, _computed_by(old, converted, wide, seed)).max_rel
    return Settled(output, errors, own, around)


def _computed_by(old: Mapping[str, nn.Module], model: nn.Module, inputs: Inputs, seed: int) -> Any:
    """Output of the model with the given modules substituted by name."""

    def hook(conv: nn.Module) -> Callable[..., Any]:
        return lambda _, args, kwargs, out: conv.forward(*args, **kwargs)

    handles = [
        model.get_submodule(name).register_forward_hook(hook(conv), with_kwargs=True, prepend=True)
        for name, conv in old.items()
    ]
    try:
        return outputs(model, inputs, seed)
    finally:
        for handle in handles:
            handle.remove()


def _disturbed(model: nn.Module, errors: Mapping[str, float], inputs: Inputs, seed: int) -> Any:
    """Output of a float64 model with these modules' outputs perturbed by this fraction of their maximum, with random signs."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(size: float) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: Any, out: Tensor) -> Tensor:
            sign = torch.randint(0, 2, out.shape, generator=generator).to(out) * 2 - 1
            return out + sign * max(size, torch.finfo(out.dtype).eps) * out.abs().max()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(disturb(size)) for name, size in errors.items()]
    try:
        return outputs(model, inputs, seed)
    finally:
        for handle in handles:
            handle.remove()


# --- two given models ---------------------------------------------------------------------------------------------


@eager()
def verify(
    original: nn.Module,
    converted: nn.Module,
    example_inputs: Any = None,
    *,
    input_size: Sequence[int] | int | None = None,
    seed: int = 0,
) -> Verification:
    """Check that a converted model is equivalent to its original, layer by layer; or a reverted one to the converted.

    Both run in eval mode on the same inputs. Raises `VerificationError` if they differ, `InputError` if the inputs do not fit.
    """
    check_module(original)
    raised = Raised(original, {*dynamic_layers(converted), *folded_windows(converted)})
    try:
        return _verify(original, converted, example_inputs, input_size, seed)
    finally:
        raised.undo()


def _verify(
    original: nn.Module,
    converted: nn.Module,
    example_inputs: Any,
    input_size: Sequence[int] | int | None,
    seed: int,
) -> Verification:
    inputs = observe(original, [], example_inputs, input_size).inputs
    modules = dict(original.named_modules(remove_duplicate=False))
    layers: dict[str, nn.Module] = {
        name: layer
        for name, layer in dynamic_layers(converted).items()
        if name in modules and not isinstance(modules[name], DynamicConv2d)
    }
    folded = {name: converted.get_submodule(name) for name in folded_windows(converted) if name in modules}
    layers |= {name: conv for name, conv in folded.items() if folded_window(modules[name]) is None}
    after = dict(converted.named_modules(remove_duplicate=False))
    layers |= {name: conv for name in dynamic_layers(original) if _is_plain(conv := after.get(name))}
    expected, errors = measure(original, layers, inputs, seed)
    try:
        output = compare(expected, outputs(converted, inputs, seed))
    except InputError as error:
        raise fails(error) from error
    if not output.compared:
        output = replace(output, notes=("no tensor of the output can be compared: only the layers were",))
    build = {name: _rebuild(layer, seed) for name, layer in layers.items()}
    dtype = next((p.dtype for p in original.parameters() if p.is_floating_point()), torch.float32)

    def settle() -> Settled:
        """Redo the conversion in float64, and check there the given layers and the given model around them."""
        settled = settle_in_double(original, build, inputs, seed)
        double, wide = copy_model(original).double(), inputs.to_dtype(torch.float64)
        expected, given = measure(
            double, {name: copy_model(layer).double() for name, layer in layers.items()}, wide, seed
        )
        changed = {name: found for name, found in given.items() if not found.max_rel <= _stored_rounding(layers[name])}
        if changed:
            raise VerificationError(_failed(output, changed, "layers whose weights differ by more than rounding"))
        old = {name: double.get_submodule(name) for name in layers}
        found = compare(expected, _computed_by(old, copy_model(converted).double(), wide, seed))
        return settled._replace(around=max(settled.around, found.max_rel))

    return judge(
        output,
        errors,
        dtype,
        settle,
        compressed=any(
            layer.config.may_compress(layer.geometry) for layer in layers.values() if isinstance(layer, DynamicConv2d)
        ),
    )


def _stored_rounding(layer: nn.Module) -> float:
    """Error that the rounding of a layer's stored parameters explains."""
    return _STORED_ROUNDING * max(torch.finfo(p.dtype).eps for p in layer.parameters() if p.is_floating_point())


def _rebuild(layer: nn.Module, seed: int) -> Build:
    if isinstance(layer, DynamicConv2d):
        kind, config = type(layer), layer.config
        return lambda conv: build_layer(conv, kind, config, seed)
    window = folded_window(layer)

    def plain(conv: nn.Module) -> nn.Module:
        if window is not None and not isinstance(conv, DynamicConv2d):
            return folded_from(conv, window)
        assert isinstance(conv, DynamicConv2d)
        try:
            return plain_convolution(conv)
        except UnsupportedLayerError as error:
            raise InputError(str(error)) from error

    return plain


def _is_plain(module: nn.Module | None) -> TypeGuard[nn.Module]:
    return isinstance(module, nn.Conv2d) and not isinstance(module, DynamicConv2d)
