"""Check that a converted model's new layers run instead of their convolutions: counts calls, watches old weights."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgeon.errors import InputError, VerificationError
from surgeon.layers.base import DynamicConv2d
from surgeon.sites.inputs import Inputs
from surgeon.surgery.compare import Leaves, leaves
from surgeon.surgery.running import fails, outputs


@dataclass(kw_only=True)
class LayerCalls:
    """Calls by name in one run, and the old convolutions that ran in it."""

    calls: Counter[str] = field(default_factory=Counter)
    old: set[str] = field(default_factory=set)


@contextmanager
def counting(model: nn.Module, names: Mapping[str, nn.Module], seen: LayerCalls) -> Iterator[None]:
    """Count the calls of the modules with these names; the values of `names` should not run: their weights are watched."""

    def hook(name: str, old: nn.Module) -> Callable[..., None]:
        def look(module: nn.Module, args: Any) -> None:
            if module is old:  # it has the same hooks as its layer
                seen.old.add(name)
            else:
                seen.calls[name] += 1

        return look

    new = {name: model.get_submodule(name) for name in names}
    kept = {id(p) for module in new.values() for p in module.parameters()}
    owners = {id(p): name for name, old in names.items() for p in old.parameters() if id(p) not in kept}
    handles = [module.register_forward_pre_hook(hook(name, names[name])) for name, module in new.items()]
    try:
        with _WatchOld(owners, seen):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _WatchOld(TorchFunctionMode):
    def __init__(self, owners: Mapping[int, str], seen: LayerCalls) -> None:
        super().__init__()
        self.owners, self.seen = owners, seen

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "").startswith("conv"):
            self.seen.old |= {self.owners[id(x)] for x in (*args, *kwargs.values()) if id(x) in self.owners}
        return func(*args, **kwargs)


def run_converted(
    model: nn.Module, old: Mapping[str, nn.Module], calls: Mapping[str, int], inputs: Inputs, seed: int
) -> Leaves:
    """Output of the converted model. Raises `VerificationError` unless each new layer runs as often as its convolution did."""
    seen = LayerCalls()
    try:
        with counting(model, old, seen):
            output = outputs(model, inputs, seed)
    except InputError as error:
        raise fails(error) from error
    told = [f"{name}: its old convolution still runs" for name in old if name in seen.old]
    told += [
        f"{name}: the layer runs {seen.calls[name]} times, its convolution ran {calls[name]} times"
        for name in old
        if seen.calls[name] != calls[name]
    ]
    if told:
        raise VerificationError(
            f"the new layers do not replace their convolutions: {'; '.join(told[:3])}. Leave these out of the selection"
        )
    return output


def inside(model: nn.Module, inputs: Inputs, seed: int) -> dict[str, Leaves]:
    """Output of each module outside dynamic layers, for models whose own output cannot be compared."""
    found: dict[str, Leaves] = {}
    modules = dict(model.named_modules())
    inner = [f"{name}." for name, module in modules.items() if isinstance(module, DynamicConv2d)]

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found[name] = leaves(output)

        return look

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in modules.items()
        if not name.startswith(tuple(inner))
    ]
    try:
        outputs(model, inputs, seed)
    finally:
        for handle in handles:
            handle.remove()
    return found
