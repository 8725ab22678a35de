"""RDN for denoising, plain and with MDCBs: Zhang et al., "Residual Dense Network for Image Restoration" (2020); the variant of
Shen et al., "Adaptive Dynamic Filtering Network for Image Denoising", Figure 7.

Two convolutions, `blocks` residual dense blocks, their outputs fused, a residual to the first convolution's output, and a last
convolution that outputs the correction of the image. In Figure 7 `blocks` is 3, 6 or 9 and `width` 16 or 32. The variant replaces
the middle block by three MDCBs. Figure 7 does not give the layers of a dense block: 8 here, with a growth equal to the width.
"""

import torch
from torch import Tensor, nn

from surgeon.errors import ConfigError
from surgeon.layers.sekg.blocks import MDCB
from surgeon.zoo.comparators import start_at_zero
from surgeon.zoo.registry import register

_SIZE = (3, 64, 64)


class ResidualDenseBlock(nn.Module):
    """x + 1×1 convolution of x and of `layers` 3×3 convolutions, each of which sees all previous maps."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(width * (i + 1), width, 3, padding=1) for i in range(layers))
        self.fuse = nn.Conv2d(width * (layers + 1), width, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for conv in self.layers:
            maps.append(torch.relu(conv(torch.cat(maps, dim=1))))
        y: Tensor = self.fuse(torch.cat(maps, dim=1))
        return x + y


class RDN(nn.Module):
    """Noisy image (N, C, H, W) in [0, 1] -> denoised image of the same shape, not clipped. Starts at the identity.

    `mdcb`: MDCBs in the middle, whose generators have this `norm` ("batch"; None as in the paper).
    """

    def __init__(
        self,
        channels: int = 3,
        blocks: int = 9,
        width: int = 32,
        layers: int = 8,
        mdcb: bool = False,
        norm: str | None = None,
    ) -> None:
        super().__init__()
        if blocks < 1 or layers < 1:
            raise ConfigError(f"RDN has at least one block and one layer in it, got blocks={blocks}, layers={layers}")
        self.shallow1 = nn.Conv2d(channels, width, 3, padding=1)
        self.shallow2 = nn.Conv2d(width, width, 3, padding=1)
        dense: list[nn.Module] = [ResidualDenseBlock(width, layers) for _ in range(blocks)]
        if mdcb:
            dense[blocks // 2] = nn.Sequential(*(MDCB(width, norm=norm) for _ in range(3)))
        self.blocks = nn.ModuleList(dense)
        self.fuse = nn.Sequential(nn.Conv2d(width * blocks, width, 1), nn.Conv2d(width, width, 3, padding=1))
        self.output = nn.Conv2d(width, channels, 3, padding=1)
        start_at_zero(self.output)

    def forward(self, x: Tensor) -> Tensor:
        shallow = self.shallow1(x)
        y, maps = self.shallow2(shallow), []
        for block in self.blocks:
            y = block(y)
            maps.append(y)
        correction: Tensor = self.output(self.fuse(torch.cat(maps, dim=1)) + shallow)
        return x + correction


@register("rdn", input_size=_SIZE)
def rdn(channels: int = 3, blocks: int = 9, width: int = 32, layers: int = 8) -> nn.Module:
    """RDN for color denoising; Figure 7 of ADFNet has blocks=3, 6, 9 and width=16, 32."""
    return RDN(channels, blocks, width, layers)


@register(
    "rdn_mdcb",
    input_size=_SIZE,
    plain="rdn",
    by_hand="three MDCBs replace a dense block, which surgery cannot do without losing its function",
)
def rdn_mdcb(
    channels: int = 3, blocks: int = 9, width: int = 32, layers: int = 8, norm: str | None = None
) -> nn.Module:
    """RDN with three MDCBs in place of the middle dense block (ADFNet Figure 7)."""
    return RDN(channels, blocks, width, layers, mdcb=True, norm=norm)
