"""Example inputs, on which a model is observed and verified."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy as is_lazy_tensor

from surgeon.errors import ConfigError, InputError
from surgeon.layers.base import DynamicConv2d
from surgeon.util.files import told
from surgeon.util.held import walk
from surgeon.util.machine import check_memory
from surgeon.util.parse import parse_input_size

BATCH = 2  # one image would hide operations across images


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The arguments of one call of a model, and where they came from."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    given: bool = True  # given by the caller, not chosen here

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """The same arguments with every tensor changed."""
        args = tuple(map_tensors(arg, change) for arg in self.args)
        return Inputs(args=args, kwargs=map_tensors(self.kwargs, change), given=self.given)

    def fresh(self) -> "Inputs":
        """A copy for one run, so that in-place changes by the model stay there."""
        memo: dict[int, Any] = {}
        for value in walk(self.args, self.kwargs):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        try:
            args, kwargs = copy.deepcopy((self.args, self.kwargs), memo)
        except Exception:  # something cannot be copied: copy at least the tensors
            return self.map(lambda t: t.clone())
        return Inputs(args=args, kwargs=kwargs, given=self.given)

    def to_dtype(self, dtype: torch.dtype) -> "Inputs":
        """The same arguments with floating-point tensors in another dtype."""
        return self.map(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def twice(self) -> "Inputs | None":
        """The batch repeated twice, one copy after the other; None if there is no batch to double."""
        if self.kwargs or not all(isinstance(arg, Tensor | list) for arg in self.args[:1]):
            return None
        args = tuple(
            torch.cat([arg, arg])
            if isinstance(arg, Tensor) and arg.dim() > 3
            else arg * 2
            if isinstance(arg, list)
            else arg
            for arg in self.args
        )
        return Inputs(args=args, given=self.given)

    @property
    def _first(self) -> Any:
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    @property
    def image_size(self) -> tuple[int, ...] | None:
        """(C, H, W) of the first image, in a batch or a list; None if the first argument is neither."""
        first = self._first[0] if isinstance(self._first, Sequence) and self._first else self._first
        listed = first is not self._first
        return tuple(first.shape[-3:]) if isinstance(first, Tensor) and first.dim() == 4 - listed else None

    @property
    def batch(self) -> int:
        """Number of images: the length of the first list, or the first dimension of the first tensor."""
        first = self._first
        if isinstance(first, Tensor):
            return int(first.shape[0]) if first.dim() > 3 else 1
        if isinstance(first, Sequence) and first:
            return len(first)
        return 1

    def shapes(self) -> str:
        """The shapes of all tensors, for messages."""
        parts = [*map(_shape_of, self.args), *(f"{key}={_shape_of(value)}" for key, value in self.kwargs.items())]
        return ", ".join(parts)


def map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor in nested lists, tuples and dictionaries."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(value, change) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(value, change) for value in tree)
    return tree


def _shape_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"({', '.join(map(str, value.shape))})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shape_of(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_shape_of, value)) + "]"
    return "None" if value is None else told(value)


def given_inputs(example_inputs: Any) -> Inputs:
    """Inputs from a caller's value: a tensor or list is one argument, a tuple all of them, a dict keyword arguments.

    Raises `InputError` for anything else, and for a batch without images.
    """
    if isinstance(example_inputs, Inputs):
        return example_inputs
    if isinstance(example_inputs, Tensor | list):
        inputs = Inputs(args=(example_inputs,))
    elif isinstance(example_inputs, tuple):
        inputs = Inputs(args=example_inputs)
    elif isinstance(example_inputs, Mapping):
        inputs = Inputs(kwargs=dict(example_inputs))
    else:
        raise InputError(
            f"example_inputs must be a tensor, a tuple of arguments, a list (one argument) or a dict of keyword arguments, "
            f"got {type(example_inputs).__name__}"
        )
    if inputs.batch == 0:
        raise InputError(f"example_inputs {inputs.shapes()} is an empty batch: nothing can be observed on it")
    return inputs


def check_input_size(input_size: Any) -> tuple[int, ...]:
    """An input size given as (C, H, W), (H, W) or one side, as two or three numbers; raises `InputError` for anything else."""
    try:
        values = parse_input_size(input_size)
    except ConfigError as error:
        raise InputError(
            f"input_size must be (C, H, W), (H, W) or one positive integer, got {told(input_size)}"
        ) from error
    return values * 2 if len(values) == 1 else values


def candidate_inputs(model: nn.Module, input_size: Sequence[int] | int | None = None) -> Iterator[Inputs]:
    """Inputs to try, most likely first. Random images, the same at every call."""
    wanted = None if input_size is None else check_input_size(input_size)
    traced = None if wanted is not None else _traced_inputs(model)
    if traced is not None:
        yield traced
        return
    convs = _convolutions(model)
    channels = first_channels(model) or 3
    known = _known_sizes(model, convs)
    sizes: list[tuple[int, ...]]
    if wanted is not None and len(wanted) == 3:
        sizes = [wanted]
    elif wanted is not None:
        sizes = [(size[0], *wanted) for size in known] or [(channels, *wanted)]
    else:
        sizes = known or [(channels, *size) for size in _usual_sizes(model, convs)]
    like = next((p for p in model.parameters() if not is_lazy_tensor(p) and p.is_floating_point()), torch.empty(0))
    for size in sizes:
        check_memory(
            BATCH * like.element_size() * math.prod(size), f"an input of {BATCH} x {' x '.join(map(str, size))}"
        )
        yield Inputs(args=_arguments(model, size), given=False).map(lambda t: t.to(like.device, like.dtype))


def _traced_inputs(model: nn.Module) -> Inputs | None:
    """Random inputs with the shapes that an exported graph was traced with; None for other models."""
    graph: Any = getattr(model, "graph", None)
    if not isinstance(graph, fx.Graph):
        return None
    values = [node.meta.get("val") for node in graph.nodes if node.op == "placeholder"]
    spec = _in_spec(model)
    if not values or spec is None or not all(isinstance(value, Tensor) for value in values):
        return None
    generator = torch.Generator().manual_seed(0)
    args, kwargs = pytree.tree_unflatten([_like(value, generator) for value in values], spec)
    return Inputs(args=tuple(args), kwargs=dict(kwargs), given=False)


def exported_size(model: nn.Module | None) -> tuple[int, int, int] | None:
    """(C, H, W) of an exported graph's images if these are its only input and their size is fixed; otherwise None."""
    graph: Any = getattr(model, "graph", None)
    nodes = [node for node in graph.nodes if node.op == "placeholder"] if isinstance(graph, fx.Graph) else []
    shapes = [node.meta["val"].shape for node in nodes if isinstance(node.meta.get("val"), Tensor)]
    if len(nodes) != 1 or len(shapes) != 1 or len(shapes[0]) != 4 or not all(type(n) is int for n in shapes[0][1:]):
        return None
    channels, height, width = shapes[0][1:]
    return channels, height, width


def _in_spec(model: Any) -> Any:
    """The input spec of an exported graph: `ExportedProgram.module()`, or an unflattened one."""
    if isinstance(model, fx.GraphModule):
        return getattr(model, "_in_spec", None)
    calls = getattr(model, "module_call_graph", None)
    return calls[0].signature.in_spec if calls else None


def _like(traced: Any, generator: torch.Generator) -> Tensor:
    shape = [int(n) if isinstance(n, int) else int(n.node.hint) for n in traced.shape]
    check_memory(traced.dtype.itemsize * math.prod(shape), f"an input of {' x '.join(map(str, shape))}")
    if not traced.dtype.is_floating_point:
        return torch.zeros(shape, dtype=traced.dtype, device=traced.device)
    return torch.randn(shape, generator=generator).to(traced.device, traced.dtype)


def _convolutions(model: nn.Module) -> list[Any]:
    """Convolutions in definition order; a dynamic layer comes before the convolutions inside it."""
    return [module for module in model.modules() if isinstance(module, _ConvNd | DynamicConv2d)]


def first_channels(model: nn.Module) -> int | None:
    """Input channels of the first convolution, None if there is none."""
    return next((int(conv.in_channels) for conv in _convolutions(model)), None)


def _known_sizes(model: nn.Module, convs: Sequence[Any]) -> list[tuple[int, ...]]:
    """The input size in the model's own configuration (timm), first with the input channels of its first convolution.

    The configuration ignores `in_chans`, and the first convolution may not be the one that sees the images (CSATv2).
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
    if not isinstance(size, list | tuple) or len(size) != 3:
        return []
    channels = dict.fromkeys([int(convs[0].in_channels if convs else size[0]), int(size[0])])
    return [(c, int(size[1]), int(size[2])) for c in channels]


def _usual_sizes(model: nn.Module, convs: list[Any]) -> list[tuple[int, ...]]:
    if convs and isinstance(convs[0], nn.Conv3d):
        return [(16, 112, 112), (16, 224, 224)]
    if convs and isinstance(convs[0], nn.Conv1d):
        return [(1024,), (16000,)]
    if _family(model) == "optical_flow":
        return [(128, 128)]
    return [(224, 224), (256, 256), (64, 64), (32, 32)]


def _arguments(model: nn.Module, size: tuple[int, ...]) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    family = _family(model)
    if family == "detection":  # takes a list of images with values in [0, 1]
        return ([torch.rand(size, generator=generator) for _ in range(BATCH)],)
    if family == "optical_flow":  # two images with values in [-1, 1]
        first, second = (torch.rand((1, *size), generator=generator) * 2 - 1 for _ in range(2))
        return (first, second)
    return (torch.randn((BATCH, *size), generator=generator),)


def call_arguments(model: nn.Module, images: Tensor, *, train: bool) -> tuple[Any, ...]:
    """Arguments for calling the model on a batch (N, C, H, W); a detection model in training gets made-up targets.

    They have one object per image, half its size: the cost of a step hardly depends on the objects.
    """
    family = _family(model)
    if family == "optical_flow":
        return (images, images.flip(-1))
    if family != "detection":
        return (images,)
    if not train:
        return (list(images.unbind()),)
    n, _, height, width = images.shape
    mask = torch.zeros(1, height, width, dtype=torch.uint8, device=images.device)
    mask[:, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 1
    # COCO's number of keypoints
    points = torch.tensor([width / 2, height / 2, 1.0], device=images.device).expand(1, 17, 3)
    target = {
        "boxes": torch.tensor([[width / 4, height / 4, 3 * width / 4, 3 * height / 4]], device=images.device),
        "labels": torch.ones(1, dtype=torch.long, device=images.device),
        "masks": mask,
        "keypoints": points,
    }
    return (list(images.unbind()), [target] * n)


def _family(model: nn.Module) -> str | None:
    """`detection` or `optical_flow` for torchvision models whose input is not one batch of images."""
    path = type(model).__module__
    for family in ("detection", "optical_flow"):
        if path.startswith(f"torchvision.models.{family}"):
            return family
    return None
