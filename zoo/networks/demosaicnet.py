"""Demosaicking network: Gharbi et al., "Deep Joint Demosaicking and Denoising" (2016), figure 2, without the noise channel.

The mosaic's 2x2 cells become pixels with four channels; a chain of convolutions runs at that half size; its last layer outputs
features and masks that multiply them; 12 maps of the product are rearranged to full size, concatenated with the mosaic, and two
more convolutions produce the image. No convolution pads, so the image is smaller than the mosaic by `border` on each side.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from surgeon.errors import ConfigError
from surgeon.zoo.bayer import bayer_mask
from surgeon.zoo.registry import register, zero_based


class BayerDemosaic(nn.Module):
    """Mosaic (N, 3, H, W), H and W even, zero where a color was not measured (GRBG) -> image (N, 3, H - 2b, W - 2b).

    b is `border`, 2 * depth + 1 pixels.
    """

    def __init__(self, depth: int = 15, width: int = 64) -> None:
        super().__init__()
        if depth < 2:
            raise ConfigError(f"the demosaicking network has at least 2 convolutions, got depth {depth}")
        self.width = width
        self.border = 2 * depth + 1
        self.pack = nn.Conv2d(3, 4, 2, stride=2)
        widths = [4] + [width] * (depth - 1) + [2 * width]
        self.chain = nn.ModuleList(nn.Conv2d(a, b, 3) for a, b in pairwise(widths))
        self.residual = nn.Conv2d(width, 12, 1)
        self.unpack = nn.ConvTranspose2d(12, 3, 2, stride=2, groups=3)
        self.full = nn.Conv2d(6, width, 3)
        self.output = nn.Conv2d(width, 3, 1)

    def forward(self, mosaic: Tensor) -> Tensor:
        x = self.pack(mosaic)
        for conv in self.chain:
            x = torch.relu(conv(x))
        features, masks = x.split(self.width, dim=1)
        x = self.unpack(self.residual(features * masks))
        c = self.border - 1
        x = torch.cat([mosaic[:, :, c : mosaic.shape[2] - c, c : mosaic.shape[3] - c], x], dim=1)
        image: Tensor = self.output(torch.relu(self.full(x)))
        return image


def grbg_mosaic(image: Tensor) -> Tensor:
    """The GRBG mosaic of an RGB image (N, 3, H, W): the same shape, zero where a color was not measured."""
    return image * bayer_mask("GRBG", *image.shape[2:]).to(image)


_LAYOUT = (
    (r"^main_processor\.pack_mosaic\.", "pack."),
    (r"^main_processor\.conv(\d+)\.", zero_based("chain.{}.")),
    (r"^residual_predictor\.", "residual."),
    (r"^upsampler\.", "unpack."),
    (r"^fullres_processor\.post_conv\.", "full."),
    (r"^fullres_processor\.output\.", "output."),
)


@register("demosaicnet", input_size=(3, 96, 96), layout=_LAYOUT)
def demosaicnet(depth: int = 15, width: int = 64) -> nn.Module:
    """Bayer demosaicking (GRBG), 15 convolutions without padding, 0.56 M parameters."""
    return BayerDemosaic(depth, width)
