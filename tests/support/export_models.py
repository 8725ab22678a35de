"""Models that the tests of exports share, and how their files are run."""

from pathlib import Path

import torch
from torch import Tensor, nn

from tests.support.layers.contract import awaken, make, plain_conv


def mixed() -> nn.Module:
    """All three layer types, with dynamic parts that do something."""
    layers = [awaken(make(kind, plain_conv(in_channels=c)), 0.1) for kind, c in (("acda", 6), ("pafu", 8), ("sekg", 8))]
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


class Fixed(nn.Module):
    """Takes images of one size only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.conv(x).flatten(1))
        return y


class Eights(nn.Module):
    """Takes only sides that are multiples of 8, and gives two outputs."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if x.shape[2] % 8 or x.shape[3] % 8:
            raise ValueError("sides must be multiples of 8")
        return {"half": x[:, :, ::2, ::2], "mean": x.mean((2, 3))}


class Patches(nn.Module):
    """Takes only sides that are multiples of 14, as DINOv2."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 14, 14)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 14 or x.shape[3] % 14:
            raise ValueError("sides must be multiples of 14")
        return self.embed(x).mean((2, 3))


class Dense(nn.Module):
    """Concatenates what a layer was given and what it made, as DenseNet does."""

    def __init__(self, kind: str, groups: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 2))
        self.layer = awaken(make(kind, plain_conv(in_channels=8, groups=groups)), 0.1)
        self.after = nn.Sequential(nn.BatchNorm2d(16), nn.Conv2d(16, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y: Tensor = self.after(torch.cat([x, self.layer(x)], 1))
        return y


class Attention(nn.Module):
    """Attention with a bias, as in BEiT: fused kernels lay out its result as ONNX's formula does not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 64, 4, 4)
        self.qkv = nn.Linear(64, 192)
        self.bias = nn.Parameter(torch.randn(4, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        n, length, width = tokens.shape
        q, k, v = self.qkv(tokens).view(n, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind()
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[None].expand(n, -1, -1, -1))
        return y.transpose(1, 2).reshape(n, length, width)


class Windows(nn.Module):
    """Attention within windows, as in Hiera: its tensors have five dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        n, length, width = tokens.shape
        q, k, v = self.qkv(tokens).view(n, 4, length // 4, 3, 2, width // 2).permute(3, 0, 4, 1, 2, 5).unbind()
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return y.permute(0, 2, 3, 1, 4).reshape(n, length, width)


class PerImage(nn.Module):
    """A kernel of its own for each image, as in CondConv: a convolution with as many groups as there are images."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        kernels = x.mean((2, 3)).view(n * c, 1, 1, 1).expand(-1, -1, 3, 3)
        return nn.functional.conv2d(x.reshape(1, n * c, h, w), kernels, groups=n * c).view(n, c, h - 2, w - 2)


class Untraceable(nn.Module):
    """Decides by the data."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


class Wrong(nn.Module):
    """Computes something else while it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.01 if torch.compiler.is_exporting() else 1.0)


def onnx_run(path: Path, x: Tensor) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {"images": x.numpy()})]
