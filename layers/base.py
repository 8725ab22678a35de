"""Base class of dynamic convolutions: config, static part, and the contract of an exact initialization."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self, cast

import torch.nn.functional as F
from torch import Tensor, fx, nn

from surgeon.errors import ConfigError, GeometryError, ReadOnlyError, UnsupportedLayerError
from surgeon.layers.geometry import ConvGeometry, Pair, pad_for_window
from surgeon.layers.ops.dispatch import tracing
from surgeon.layers.source import ConvSource
from surgeon.layers.static_weight import READ_ONLY, StaticWeight, read_only
from surgeon.util.limits import check_choice
from surgeon.util.near import did_you_mean


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Options of a dynamic layer. Subclasses are frozen, keyword-only, and validate themselves in `__post_init__`.

    The class attributes state what the rest of the program needs to know of the type:

    paper: the options whose default departs from the paper, with the values that follow it. Recipes of version 1, which do not
        name them, mean these.
    symbols: the options that tables show, each with the letter of the paper.
    search_defaults: the options with which a search tries the type, one mapping per try.
    search_axes: the options whose values a search combines.
    compressed: the options that make the layer smaller than exactness allows; empty if there are none.
    least: the least values of options that are integers, or may be None by default; read from the source, too.
    choices: the words that an option may be; read from the source, too.
    """

    paper: ClassVar[Mapping[str, Any]] = {}
    symbols: ClassVar[Mapping[str, str]] = {}
    search_defaults: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    search_axes: ClassVar[tuple[str, ...]] = ()
    compressed: ClassVar[Mapping[str, Any]] = {}
    least: ClassVar[Mapping[str, int]] = {}
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    layer_type: ClassVar[str] = ""  # the type that was registered with these options

    @classmethod
    def symbols_of(cls, options: Mapping[str, Any]) -> Mapping[str, str]:
        """The `symbols` that mean something with these options."""
        return cls.symbols

    @classmethod
    def told(cls) -> str:
        """Whose options these are, for messages: the layer type, by the name that users give."""
        return cls.layer_type or cls.__name__

    def check_values(self) -> None:
        """Raise `ConfigError` for a word that an option may not be, and for numbers below their least or beyond their limit."""
        for name, known in self.choices.items():
            check_choice(f"{self.told()}: {name}", getattr(self, name), known)
        optional = {field.name for field in fields(self) if field.default is None}
        for name, least in self.least.items():
            if name not in optional or getattr(self, name) is not None:
                check_at_least(self, name, least)

    def may_compress(self, geometry: ConvGeometry) -> bool:
        """Whether these options allow a layer to be smaller than exactness needs; its errors are then stated, not judged."""
        return False

    def asks_to_compress(self) -> bool:
        """Whether the options for smaller layers were given, even if no layer can be smaller with them."""
        return any(getattr(self, key) is not None for key in self.compressed)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`; an unknown option is a `ConfigError` that names the known ones."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(
                f"layer type {cls.told()} has no option {', '.join(map(repr, unknown))}; it has {', '.join(known)}."
                f"{did_you_mean(unknown[0], known)}".rstrip(".")
            )
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


# Upper limits of options: far beyond any paper's values, yet built within seconds.
_MOST = {
    "atoms": 256,
    "scales": 16,
    "basis_size": 64,
    "group_size": 1024,
    "supports": 127,
    "selector_depth": 64,
    "kernel_size": 127,
}
_MOST_OF_ANY = 65536


def check_at_least(config: LayerConfig, name: str, least: int) -> None:
    """Raise `ConfigError` unless the named option is an integer between `least` and the option's upper limit."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{config.told()}: {name} must be an integer >= {least}, got {value!r}")
    check_at_most(config, name, value)


def check_at_most(config: LayerConfig, name: str, value: int) -> None:
    """Raise `ConfigError` if the named option is beyond its upper limit."""
    most = _MOST.get(name, _MOST_OF_ANY)
    if value > most:
        told = value if value < 2**63 else f"a number of {value.bit_length()} bits"
        raise ConfigError(f"{config.told()}: {name} must be at most {most}, got {told}")


class DynamicConv2d(nn.Module):
    """A content-adaptive layer that replaces a convolution.

    It maps (N, C_in, H, W) to (N, C_out, H', W') like the replaced convolution, or one image without N. With `adaptive`
    off it computes the plain convolution with `static_weight()`, regardless of what its generator has learned.
    """

    type_name: ClassVar[str]
    fewer_parameters: ClassVar[str] = ""  # the option that makes the layer smaller, for hints
    tasks: ClassVar[tuple[str, ...]] = ()  # the tasks of the layer's paper, on which `surgeon try` tries it first
    placed: ClassVar[str] = ""  # where its paper has it: "last stage", "first of stages"; a search tries that early
    patterns: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # block patterns (surgery/blocks.py) and their options
    new_lr_scale: ClassVar[float] = 0.1  # rate of its new parameters in fine-tuning, as a multiple of that of others
    selects: ClassVar[bool] = False  # whether the largest of several numbers decides: rounding breaks ties
    Config: ClassVar[type[LayerConfig]]

    geometry: ConvGeometry
    config: LayerConfig
    adaptive: bool
    bias: nn.Parameter | None

    def __init__(self, geometry: ConvGeometry, config: LayerConfig) -> None:
        """Leave uninitialized what `from_conv` or a state dict will fill; `geometry` is that of the replaced convolution."""
        super().__init__()
        reasons = self.why_not(geometry, config)
        if reasons:
            raise UnsupportedLayerError(
                f"{type(self).__name__} cannot replace this convolution: {'; '.join(reasons)}", tuple(reasons)
            )
        self.geometry = geometry
        self.config = config
        self.adaptive = True

    # --- defined by each layer type -------------------------------------------------------------------------------

    @classmethod
    def why_not(cls, geometry: ConvGeometry, config: LayerConfig) -> list[str]:
        """Reasons why a convolution of this geometry cannot become this layer; empty if it can."""
        return []

    @classmethod
    @abstractmethod
    def from_conv(cls, conv: nn.Module | ConvSource, config: LayerConfig | None = None, **context: Any) -> Self:
        """Build the layer that computes the same as `conv` in eval mode.

        It takes over the device, dtype, training flag, and `requires_grad` of the convolution's parameters. The layer's
        `config` has every open choice (`None`) resolved, so `type(layer)(layer.geometry, layer.config)` has the same
        parameters and buffers and can load its state dict.
        """

    @abstractmethod
    def adapt(self, x: Tensor) -> Tensor:
        """Forward pass with `adaptive` on; the input has been checked."""

    @abstractmethod
    def static_weight(self) -> Tensor:
        """Weight (C_out, C_in/g, h, w) of the plain convolution that remains when the dynamic part is off.

        Differentiable. May be larger than the replaced kernel (h >= k_h, w >= k_w); it is centered on that kernel.
        """

    def static_bias(self) -> Tensor | None:
        """Bias (C_out) of that convolution."""
        return self.bias

    def static_is_exact(self) -> bool:
        """Whether that convolution equals `static_conv2d` at every pixel, including the borders."""
        return True

    @abstractmethod
    def new_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that the replaced convolution did not have (generators, selectors, extra kernels), by local name."""

    def selector_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The new parameters that only select, for alternating training (PAFU, §4.1); none if the layer does not select."""
        return iter(())

    def no_weight_decay(self) -> set[str]:
        """Local names of parameters to exclude from weight decay in addition to biases and norms (timm's convention)."""
        return set()

    def output_weights(self) -> set[str]:
        """Local names of weights with which a generator of values ends; fine-tuning slows them in proportion to their inputs."""
        return set()

    @abstractmethod
    def macs(self, height: int, width: int) -> int:
        """Multiply-accumulates for one image of this input size, including the generator (1 MAC = 2 FLOPs)."""

    def regularization(self) -> Tensor | None:
        """The layer's own loss term, a scalar, or None if its paper has none."""
        return None

    def anneal(self, factor: float) -> bool:
        """Set the layer's temperature to `factor` times that of its config; False if it has none."""
        return False

    def start_untrained(self) -> None:
        """Draw the start of the paper for a network that is trained from scratch, if the layer cannot hold the kernel anyway."""
        return

    def scale_output(self, scale: Tensor, shift: Tensor) -> None:
        """Change the parameters so that the layer returns scale · y + shift, both (C_out,), instead of y, adaptive or not.

        Raises `UnsupportedLayerError`, with nothing changed, if no parameters can express that.
        """
        reason = f"{type(self).__name__} does not support it"
        raise UnsupportedLayerError(f"a scale and a shift cannot be folded into this layer: {reason}", (reason,))

    # --- shared by all layer types --------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        """(N, C_in, H, W) → (N, C_out, H', W'), or both without N. A leaf to every tracer of torch.fx."""
        traced: Any = input
        if isinstance(traced, fx.Proxy):
            return cast(Tensor, _leaf(self, traced))
        if input.dim() == 3:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        self.check_input(input)
        return self.adapt(input) if self.adaptive else self.static_conv2d(input)

    @property
    def weight(self) -> Tensor:
        """The static weight, read-only, under the name that code written for `nn.Conv2d` looks for.

        It is computed, so writing to it raises `ReadOnlyError`. `static_weight` returns an ordinary tensor.
        """
        return read_only(self.static_weight())

    @weight.setter
    def weight(self, value: Any) -> None:
        raise ReadOnlyError(READ_ONLY)

    @weight.deleter
    def weight(self) -> None:
        raise ReadOnlyError(READ_ONLY)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As for any module, except that `weight` and names derived from it are ignored."""
        if name == "weight" or isinstance(param, StaticWeight):
            raise ReadOnlyError(READ_ONLY)
        super().register_parameter(name, param)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "padding" or name in _CONV_ATTRIBUTES:
            raise ReadOnlyError(
                f"{name} of a dynamic layer is read-only, as the layer is built for it: set it on the convolution, before "
                "converting or after surgeon.revert(model)"
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        # in_channels, out_channels, kernel_size, stride, dilation, groups, padding_mode: as on the convolution.
        if name in _CONV_ATTRIBUTES:
            return getattr(self.geometry, name)
        return super().__getattr__(name)

    @property
    def padding(self) -> Pair | str:
        """As `nn.Conv2d.padding` if it can be expressed that way: (vertical, horizontal), or "same"."""
        if self.geometry.padding == "tf_same":
            return "same"
        left, right, top, bottom = self.geometry.padding
        return (top, left) if (left, top) == (right, bottom) else "same"

    def static_conv2d(self, x: Tensor) -> Tensor:
        """The plain convolution that remains when the dynamic part is off."""
        weight = self.static_weight()
        x, padding = pad_for_window(x, self.geometry, (weight.shape[-2], weight.shape[-1]))
        g = self.geometry
        return F.conv2d(x, weight, self.static_bias(), g.stride, padding, g.dilation, g.groups)

    def check_input(self, x: Tensor) -> None:
        """Raise `GeometryError` if the batch is not (N, C_in, H, W) or is too small."""
        if tracing():  # sizes are traced values
            return
        if x.dim() != 4 or x.shape[1] != self.geometry.in_channels:
            raise GeometryError(
                f"{type(self).__name__} expects an input (N, {self.geometry.in_channels}, H, W), got {tuple(x.shape)}"
            )
        self.geometry.output_size(x.shape[-2], x.shape[-1])

    def extra_repr(self) -> str:
        g = self.geometry
        options = ", ".join(f"{k}={v}" for k, v in self.config.to_dict().items() if v is not None)
        return f"{g.in_channels}, {g.out_channels}, kernel_size={g.kernel_size}, stride={g.stride}, groups={g.groups}, {options}"


def batch_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The batch (N, C_in, H, W) in the arguments of a layer's call, as its hooks get them; one image without N becomes a batch."""
    return as_batch(args[0] if args else next(iter(kwargs.values())))


def as_batch(x: Tensor) -> Tensor:
    """(N, C, H, W), of one image (C, H, W) too."""
    return x.unsqueeze(0) if x.dim() == 3 else x


def scaled_bias(bias: nn.Parameter | None, scale: Tensor, shift: Tensor, like: nn.Parameter) -> nn.Parameter:
    """The bias of scale · y + shift, in the dtype of `like`."""
    new = shift if bias is None else bias.detach() * scale + shift
    return nn.Parameter(new.to(like.dtype), requires_grad=(like if bias is None else bias).requires_grad)


def _leaf(layer: nn.Module, input: fx.Proxy) -> fx.Proxy:
    """The call of a module as one node, for tracers that would trace into it."""
    tracer: Any = input.tracer
    found: fx.Proxy = tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), {})
    return found


class CodedConv2d(DynamicConv2d):
    """A dynamic convolution that exposes its code, the part that varies, so that it can be collapsed and visualized."""

    @abstractmethod
    def code(self, x: Tensor) -> Tensor:
        """The values that determine the filter at each output pixel in eval mode, (N, V, H', W'); the filter is affine in them."""

    @abstractmethod
    def signal(self, x: Tensor) -> Tensor:
        """The generator's last feature map, (N, features, H', W'): all the information it has about its input."""

    @abstractmethod
    def energy_of(self, difference: Tensor) -> Tensor:
        """Squared norm of the filter's change for changes (..., V) of the code, (...)."""

    @abstractmethod
    def fix(self, code: Tensor) -> None:
        """Make the filter for this code (V,) the static one."""

    @abstractmethod
    def constant_code(self) -> Tensor | None:
        """The code (V,) if the parameters alone make it the same at every pixel of every input, else None."""

    def nearest_constant(self, mean: Tensor) -> Tensor:
        """The code (V,) to fold at, given the mean over pixels: one that the layer can take everywhere."""
        return mean

    def code_text(self, mean: Tensor) -> str:
        """Description of the mean code for reports; may be empty."""
        return ""

    def static_energy(self) -> Tensor:
        """Squared norm of the static filter, a scalar in the units of `energy_of`."""
        return self.static_weight().detach().square().sum()


_CONV_ATTRIBUTES = frozenset(
    {"in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups", "padding_mode"}
)
