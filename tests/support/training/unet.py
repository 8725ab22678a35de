"""A small U-Net, which runs where the sides of an image are multiples of 4 pixels."""

import torch
from torch import Tensor, nn


class UNet(nn.Module):
    """Two halvings, and the sum with the features of before."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.down = nn.ModuleList([nn.Conv2d(4, 4, 3, stride=2, padding=1) for _ in range(2)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(4, 4, 2, stride=2) for _ in range(2)])
        self.last = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.first(x)]
        for down in self.down:
            features.append(torch.relu(down(features[-1])))
        y = features.pop()
        for up in self.up:
            y = torch.relu(up(y)) + features.pop()
        out: Tensor = self.last(y)
        return out


def make_unet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet().eval()
