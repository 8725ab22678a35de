"""The small network that generates a dynamic layer's code at every output pixel."""

import torch
from torch import Tensor, nn

from surgeon.errors import ConfigError
from surgeon.layers.aligned import AlignedConv2d
from surgeon.layers.geometry import ConvGeometry
from surgeon.layers.norm import SignalNorm, check_norm

WINDOW = (3, 3)
FORMS = ("full", "separable", "lowrank")
RANK = 16  # of the low-rank form


class PixelGenerator(nn.Module):
    """1×1 convolution C → `hidden`, tanh, 3×3 convolution `hidden` → `outputs`, aligned with the replaced convolution.

    Maps the layer's input (N, C, H, W) to (N, outputs, H', W') with (H', W') the output size of the replaced convolution,
    which also sets the stride and dilation of the 3×3 convolution; its window is centered on the kernel. The last
    convolution's weight starts at zero: at initialization the output is its bias everywhere. tanh bounds the hidden map: with an
    unbounded activation, joint training diverges. `depth` - 1 additional 3×3 convolutions, each followed by a tanh, may be
    inserted between the two: each widens the generator's receptive field by one pixel on every side.

    The 3×3 convolution takes 9·hidden·outputs multiply-accumulates per pixel, often more than the convolution that is replaced.
    `form` factorizes it, without an activation in between: "separable" into a 3×3 depthwise convolution and a 1×1 one,
    hidden·(9 + outputs); "lowrank" into a 3×3 convolution to `rank` maps and a 1×1 one, rank·(9·hidden + outputs).

    `norm` "batch" normalizes the map before each tanh. Without it, small features leave little in the hidden map but its bias.
    """

    def __init__(
        self,
        geometry: ConvGeometry,
        hidden: int,
        outputs: int,
        depth: int = 1,
        form: str = "full",
        rank: int = RANK,
        norm: str | None = None,
    ) -> None:
        super().__init__()
        check_norm("PixelGenerator", norm)
        if form not in FORMS:
            raise ConfigError(f"the form of a generator must be one of {', '.join(FORMS)}, got {form!r}")
        self.geometry = geometry
        self.reduce = nn.Conv2d(geometry.in_channels, hidden, 1)
        self.between = nn.ModuleList(nn.Conv2d(hidden, hidden, 3, padding=1) for _ in range(depth - 1))
        self.norms = nn.ModuleList(SignalNorm(hidden) for _ in range(depth) if norm is not None)
        self.around: nn.Conv2d | None = None
        self.expand: nn.Conv2d
        if form == "full":
            self.expand = AlignedConv2d(geometry, hidden, outputs, WINDOW)
        elif form == "separable":
            self.around = AlignedConv2d(geometry, hidden, hidden, WINDOW, groups=hidden, bias=False)
            self.expand = nn.Conv2d(hidden, outputs, 1)
        else:
            self.around = AlignedConv2d(geometry, hidden, rank, WINDOW, bias=False)
            self.expand = nn.Conv2d(rank, outputs, 1)
        nn.init.zeros_(self.expand.weight)
        self.set_static_output(torch.zeros(outputs))

    def forward(self, x: Tensor, geometry: ConvGeometry | None = None) -> Tensor:
        """`geometry` overrides the layer's own if x is a band of the image (`ConvGeometry.band`); depth 1 only."""
        hidden = self.hidden(x)
        band = () if geometry is None or geometry is self.geometry else (geometry,)
        out: Tensor = self.expand(hidden, *band) if self.around is None else self.expand(self.around(hidden, *band))
        return out

    def hidden(self, x: Tensor) -> Tensor:
        """The last hidden map, (N, hidden, H, W), within [-1, 1]: all the information the generator has about its input."""
        y: Tensor = x
        for index, conv in enumerate((self.reduce, *self.between)):
            y = conv(y)
            y = torch.tanh(self.norms[index](y) if self.norms else y)
        return y

    @property
    def static_output(self) -> Tensor:
        """The generator's output at every pixel while its last weight is zero, (outputs,). Differentiable."""
        assert self.expand.bias is not None
        return self.expand.bias

    @torch.no_grad()
    def set_static_output(self, values: Tensor) -> None:
        """Set the bias of the last convolution, (outputs,)."""
        assert self.expand.bias is not None
        self.expand.bias.copy_(values)

    def macs(self, height: int, width: int) -> int:
        """Multiply-accumulates for one image of this input size."""
        out_h, out_w = self.geometry.output_size(height, width)
        kernels = (p for p in (self.reduce.weight, *self.between.parameters()) if p.dim() == 4)
        per_input = sum(p.numel() for p in kernels)
        seeing = 0 if self.around is None else self.around.weight.numel()
        return per_input * height * width + (seeing + self.expand.weight.numel()) * out_h * out_w
