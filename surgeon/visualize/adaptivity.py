"""How much a dynamic layer adapts: what its generator sees of the content, and how far its code varies within one image."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.layers import SEKGConv2d
from surgeon.layers.base import CodedConv2d, batch_of
from surgeon.visualize.measures import code_distance, content_share

BLIND = 0.01  # content share below which a generator sees almost nothing of its input
SATURATED = 0.9  # share of the hidden map beyond which hardly any gradient passes tanh
FLAT = 0.97  # |tanh| above which its slope is below 6 %
IMAGES = 4  # number of images used per batch


@dataclass(frozen=True, kw_only=True)
class Adaptivity:
    """One layer on one batch of images.

    content: fraction of the energy of the generator's last map that varies over the pixels of an image, 0 to 1.
    saturated: fraction of that map at the flat ends of tanh; None if nothing bounds it (SEKG).
    distance: 1 - cos of the codes of two pixels, averaged over all pairs in an image (ACDA, A.5); None if codes are zero.
    """

    name: str
    type: str
    content: float
    saturated: float | None
    distance: float | None
    normalized: bool = False  # by the batch norm of its generator

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {name: value for name, value in asdict(self).items() if name != "normalized"}

    def complaint(self) -> tuple[str, str, str] | None:
        """The problem with the generator, how large it is, and a remedy; None if there is none."""
        if self.saturated is not None and self.saturated > SATURATED:
            remedy = "lower the learning rate (--lr; that of new parameters alone: --new-lr-scale of finetune)"
            more = "" if self.normalized else ", or convert with --option norm=batch"
            problem = "saturated (at the ends of tanh is this part of the hidden map) and hardly learns"
            return problem, f"{self.saturated:.0%}", remedy + more
        if self.content < BLIND:
            remedy = (
                "the statistics of its batch norm may not have settled; more steps settle them"
                if self.normalized
                else "convert with --option norm=batch, the default since recipes of version 2"
            )
            return (
                "blind (only this part of the hidden map is not the same at every pixel)",
                f"{self.content:.1%}",
                remedy,
            )
        return None


def complaints(layers: Iterable[Adaptivity]) -> str | None:
    """The problems of all generators in one text, layers with the same one together; None if there are none."""
    alike: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        if (found := layer.complaint()) is not None:
            problem, size, remedy = found
            alike.setdefault((problem, remedy), []).append(f"{layer.name} {size}")
    told = [f"the generator is {what} in {', '.join(names)}: {remedy}" for (what, remedy), names in alike.items()]
    return "; ".join(told) or None


@contextmanager
def observed(model: nn.Module) -> Iterator[list[Adaptivity]]:
    """Within the context, fills the list with the first call of every dynamic layer that runs in eval mode with its code on."""
    found: list[Adaptivity] = []
    seen: set[str] = set()

    def hook(name: str) -> Any:
        def look(layer: CodedConv2d, args: Any, kwargs: dict[str, Any]) -> None:
            if name not in seen and layer.adaptive and not layer.training:
                seen.add(name)
                found.append(measure(name, layer, batch_of(args, kwargs)))

        return look

    handles = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, CodedConv2d)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure(name: str, layer: CodedConv2d, x: Tensor) -> Adaptivity:
    """Adaptivity of a layer in eval mode on the first images of an input (N, C, H, W)."""
    x = x[:IMAGES]
    signal = layer.signal(x).float()
    saturated = None if isinstance(layer, SEKGConv2d) else float((signal.abs() > FLAT).float().mean())
    distances = [d for d in (code_distance(layer, code.float()) for code in layer.code(x)) if d is not None]
    return Adaptivity(
        name=name,
        type=layer.type_name,
        content=content_share(signal),
        saturated=saturated,
        distance=sum(distances) / len(distances) if distances else None,
        normalized=getattr(layer.config, "norm", None) == "batch",
    )
