"""Geometry and effective weight of a convolution module, observed in one call.

Subclasses of `nn.Conv2d` may standardize their weight (timm's `StdConv2d`), pad by the size of the input (`Conv2dSame`) or be
parametrized (`torch.nn.utils.parametrize`). Instead of listing such classes, the call to `conv2d` is observed.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgeon.errors import UnsupportedLayerError
from surgeon.layers.geometry import ConvGeometry, Quad

# of a new convolution, without drawing random numbers
CONV_ATTRIBUTES = frozenset(vars(nn.Conv2d(1, 1, 1, device="meta")))


@dataclass(frozen=True, kw_only=True)
class ConvSource:
    """A convolution to be replaced: geometry, effective weight (C_out, C_in/g, k_h, k_w) and bias (C_out)."""

    geometry: ConvGeometry
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def read(cls, conv: nn.Module) -> "ConvSource":
        """Read a convolution; raises `UnsupportedLayerError` with reasons if it cannot be read."""
        if type(conv) is nn.Conv2d and not ({"forward", "_conv_forward"} & vars(conv).keys()):
            if conv.weight.dim() != 4 or len(conv.weight) % conv.groups:
                raise _unsupported(conv, f"its weight has shape {tuple(conv.weight.shape)} for {conv.groups} groups")
            return cls(geometry=_plain_geometry(conv), weight=conv.weight.detach(), bias=_detached(conv.bias))
        if not isinstance(conv, nn.Conv2d):
            raise _unsupported(conv, f"it is a {type(conv).__name__}, not a 2-D convolution")
        return _read_subclass(conv)

    def conv2d(self, x: Tensor) -> Tensor:
        """Plain convolution of x with this weight, for checks."""
        left_right_top_bottom = self.geometry.explicit_padding(x.shape[-2], x.shape[-1])
        mode = "constant" if self.geometry.padding_mode == "zeros" else self.geometry.padding_mode
        x = F.pad(x, left_right_top_bottom, mode=mode)
        g = self.geometry
        return F.conv2d(x, self.weight, self.bias, g.stride, 0, g.dilation, g.groups)


class PlainConvolution(nn.Module):
    """Just the convolution that was read, for checks."""

    def __init__(self, source: ConvSource) -> None:
        super().__init__()
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        return self.source.conv2d(x)


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def _unsupported(conv: nn.Module, reason: str) -> UnsupportedLayerError:
    return UnsupportedLayerError(f"{type(conv).__name__} cannot be read as a convolution: {reason}", (reason,))


def _plain_geometry(conv: nn.Conv2d) -> ConvGeometry:
    """As torch computes it: for padding modes other than zeros, by amounts fixed when the convolution was created."""
    padding: Quad
    if conv.padding_mode != "zeros":
        left, right, top, bottom = (int(p) for p in conv._reversed_padding_repeated_twice)
        padding = (left, right, top, bottom)
    elif conv.padding == "valid":
        padding = (0, 0, 0, 0)
    elif conv.padding == "same":
        if _pair(conv.stride) != (1, 1):
            raise _unsupported(conv, f"padding 'same' requires stride 1, and its stride is {conv.stride}")
        down, across = (d * (k - 1) for d, k in zip(_pair(conv.dilation), conv.weight.shape[2:], strict=True))
        padding = (across // 2, across - across // 2, down // 2, down - down // 2)
    else:
        vertical, horizontal = _pair(conv.padding)
        padding = (horizontal, horizontal, vertical, vertical)
    return _geometry(conv, padding, conv.bias is not None)


def _geometry(conv: nn.Conv2d, padding: Any, bias: bool) -> ConvGeometry:
    """Channels and kernel size are taken from the weight: the attributes for them may be stale."""
    outputs, inputs, height, width = conv.weight.shape
    return ConvGeometry(
        in_channels=inputs * conv.groups,
        out_channels=outputs,
        kernel_size=(height, width),
        stride=_pair(conv.stride),
        dilation=_pair(conv.dilation),
        groups=conv.groups,
        padding=padding,
        padding_mode=conv.padding_mode,
        bias=bias,
    )


class _WatchConv2d(TorchFunctionMode):
    """Records every call of `conv2d` with its bound arguments and result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[dict[str, Any], Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.conv2d:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
            self.calls.append((defaults | dict(zip(names, args, strict=False)) | (kwargs or {}), out))
        return out


def _read_subclass(conv: nn.Conv2d) -> ConvSource:
    """Observe two calls on inputs of different sizes; accept a single convolution of the (padded) input."""
    like = conv.weight
    seen: list[tuple[dict[str, Any], Tensor]] = []
    given: list[tuple[Tensor, Tensor]] = []
    was_training = conv.training
    state = {name: buffer.clone() for name, buffer in conv.named_buffers()}
    try:
        conv.eval()
        for extra in (5, 6):
            size = [
                d * (k - 1) + 1 + s + extra
                for k, d, s in zip(like.shape[2:], _pair(conv.dilation), _pair(conv.stride), strict=True)
            ]
            x = torch.testing.make_tensor(
                (1, like.shape[1] * conv.groups, *size), dtype=like.dtype, device=like.device, low=-1, high=1
            )
            with torch.no_grad(), _WatchConv2d() as watch:
                out = conv.forward(x.clone())
            if len(watch.calls) != 1 or watch.calls[0][1] is not out:
                raise _unsupported(conv, f"its forward is not one conv2d ({len(watch.calls)} calls seen)")
            seen.append((watch.calls[0][0], x))
            given.append((x, out))
    except UnsupportedLayerError:
        raise
    except Exception as error:
        raise _unsupported(conv, f"its forward fails on a small input ({type(error).__name__}: {error})") from error
    finally:
        conv.train(was_training)
        for name, buffer in conv.named_buffers():
            buffer.copy_(state[name])
    (first, x_first), (second, x_second) = seen
    if not torch.equal(first["weight"], second["weight"]):
        raise _unsupported(conv, "its effective weight depends on the input")
    geometry = _captured_geometry(conv, first, x_first)
    if geometry != _captured_geometry(conv, second, x_second):
        raise _unsupported(conv, "its padding depends on the input in an unknown way")
    source = ConvSource(geometry=geometry, weight=first["weight"].detach().clone(), bias=_detached(first["bias"]))
    if any(not _is_close(out, source.conv2d(x)) for x, out in given):
        raise _unsupported(conv, "its output is not that of the conv2d it calls: its forward does more")
    return source


@torch.no_grad()
def _is_close(found: Tensor, expected: Tensor) -> bool:
    limit = 32 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    return found.shape == expected.shape and bool(((found - expected).abs() <= limit).all())


def _captured_geometry(conv: nn.Conv2d, call: dict[str, Any], x: Tensor) -> ConvGeometry:
    settings = (_pair(call["stride"]), _pair(call["dilation"]), call["groups"], tuple(call["weight"].shape))
    expected = (_pair(conv.stride), _pair(conv.dilation), conv.groups, tuple(conv.weight.shape))
    if settings != expected:
        raise _unsupported(conv, f"its call of conv2d uses other settings than its attributes ({settings}, {expected})")
    has_bias = call["bias"] is not None
    given: Tensor = call["input"]
    if given.shape == x.shape and torch.equal(given, x):
        if isinstance(call["padding"], str):
            return _plain_geometry(conv)
        vertical, horizontal = _pair(call["padding"])
        return _geometry(conv, (horizontal, horizontal, vertical, vertical), has_bias)
    if conv.padding_mode != "zeros":
        plain = _plain_geometry(conv)
        own = plain.explicit_padding(x.shape[-2], x.shape[-1])
        if _matches(given, F.pad(x, own, mode=conv.padding_mode)) and _pair(call["padding"]) == (0, 0):
            return plain
    same = _geometry(conv, "tf_same", has_bias)
    if _pair(call["padding"]) == (0, 0) and _matches(given, F.pad(x, same.explicit_padding(x.shape[-2], x.shape[-1]))):
        return same
    raise _unsupported(conv, "it changes its input before the convolution by more than padding")


def _matches(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _pair(value: Any) -> tuple[int, int]:
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) == 1:
        values *= 2
    if len(values) != 2:
        raise ValueError(f"expected one number or two, got {value}")
    return int(values[0]), int(values[1])


def written_by_call(conv: nn.Conv2d) -> list[str]:
    """Attributes used by a convolution's forward that its hooks write when it is called; a copy is called."""
    if not (conv._forward_pre_hooks or conv._forward_hooks):
        return []
    try:
        twin = copy.deepcopy(conv)
        before = {name: (value, _version(value)) for name, value in _computing(twin).items()}
        size = [d * (k - 1) + 6 for k, d in zip(twin.weight.shape[2:], _pair(twin.dilation), strict=True)]
        with torch.no_grad(), torch.random.fork_rng():
            twin(torch.zeros((1, twin.weight.shape[1] * twin.groups, *size)).to(twin.weight))
    except Exception:
        return []  # the input that a hook expects is not known here
    after = _computing(twin)
    return [name for name, (value, version) in before.items() if after[name] is not value or _version(value) != version]


_COMPUTING = (
    "weight",
    "bias",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "_reversed_padding_repeated_twice",
)


def _computing(conv: nn.Conv2d) -> dict[str, Any]:
    """Attributes that a convolution computes with; a computed weight (a parametrization) is not followed."""
    return {name: conv._parameters.get(name, vars(conv).get(name)) for name in _COMPUTING}


def _version(value: Any) -> Any:
    """A value that changes when a tensor is written to, also via its `data`."""
    return (
        (value._version, value.data_ptr(), float(value.detach().double().sum())) if isinstance(value, Tensor) else None
    )
