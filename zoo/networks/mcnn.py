"""MCNN: Zhang et al., "Single-Image Crowd Counting via Multi-Column Convolutional Neural Network" (2016), figure 3.

Three columns with large, medium and small kernels see the same gray image and are concatenated; a 1x1 convolution turns them
into the density map at a quarter of the size. Its sum is the number of people.
"""

import torch
from torch import Tensor, nn

from surgeon.zoo.registry import register

# (kernel of the first layer, kernel of the others, channels of the four layers)
_COLUMNS = {
    "small": (5, 3, (24, 48, 24, 12)),
    "medium": (7, 5, (20, 40, 20, 10)),
    "large": (9, 7, (16, 32, 16, 8)),
}


class MCNN(nn.Module):
    """Gray image (N, 1, H, W), (gray value - 127.5) / 128 -> density map (N, 1, ceil(H/4), ceil(W/4))."""

    def __init__(self, in_chans: int = 1) -> None:
        super().__init__()
        self.small, self.medium, self.large = (_column(in_chans, *spec) for spec in _COLUMNS.values())
        self.fuse = nn.Conv2d(sum(spec[2][-1] for spec in _COLUMNS.values()), 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.cat([self.small(x), self.medium(x), self.large(x)], dim=1)
        density: Tensor = self.fuse(maps)
        return density


def _column(c_in: int, first: int, other: int, widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index, width in enumerate(widths):
        k = first if index == 0 else other
        layers += [nn.Conv2d(c_in, width, k, padding=k // 2), nn.ReLU()]
        if index < 2:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        c_in = width
    return nn.Sequential(*layers)


_LAYOUT = ((r"^col1\.", "small."), (r"^col2\.", "medium."), (r"^col3\.", "large."))


@register("mcnn", input_size=(1, 128, 128), layout=_LAYOUT)
def mcnn(in_chans: int = 1) -> nn.Module:
    """MCNN crowd counting, three columns, 0.13 M parameters."""
    return MCNN(in_chans)
