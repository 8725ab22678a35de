"""The blocks of ADFNet (Shen et al., "Adaptive Dynamic Filtering Network for Image Denoising", Figures 3 and 4).

CB and MCB extract features in the encoder, DCB and MDCB in the decoder; each maps (N, C, H, W) to the same shape and adds its
input. Where the paper is silent, the authors' code decides: LeakyReLU of slope 0.2, 8 offset groups, 32 offset features.
N images, C channels of the block, M of its branches (a 1×1 convolution reduces where M < C).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from surgeon.errors import GeometryError
from surgeon.layers.geometry import ConvGeometry
from surgeon.layers.sekg.dconv import SEKG, DConv2d
from surgeon.layers.sekg.operator import dconv

SLOPE = 0.2
DILATIONS = (1, 3, 5)
OFFSET_GROUPS = 8
OFFSET_FEATURES = 32


def leaky(x: Tensor) -> Tensor:
    """The activation of every block."""
    return F.leaky_relu(x, SLOPE)


class CB(nn.Module):
    """Convolution block: x + three 3×3 convolutions with one activation, after the second."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv3(channels, channels)
        self.conv2 = _conv3(channels, channels)
        self.conv3 = _conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv3(leaky(self.conv2(self.conv1(x))))
        return x + y


class DCB(nn.Module):
    """Dynamic convolution block (Figure 3 b): x + (3×3 convolution, DConv, activation, 3×3 convolution)(x)."""

    def __init__(self, channels: int, *, norm: str | None = None) -> None:
        super().__init__()
        self.conv1 = _conv3(channels, channels)
        self.dconv = DConv2d.same(channels, channel_bias=True, norm=norm)
        self.conv2 = _conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(leaky(self.dconv(self.conv1(x))))
        return x + y


class ModulatedDeformConv2d(nn.Module):
    """Modulated deformable 3×3 convolution C → C (Eq. 1-2), with offsets and mask from separate features.

    Takes x (N, C, H, W) and the offset features (N, F, H, W). `offset` maps these to two offsets and one mask logit for each
    of the 9 taps and each of the groups; it starts at zero: no offset, every tap at half its weight.
    """

    def __init__(self, channels: int, features: int = OFFSET_FEATURES, groups: int = OFFSET_GROUPS) -> None:
        super().__init__()
        if channels % groups:
            raise GeometryError(
                f"a deformable convolution with {groups} offset groups needs a multiple of {groups} channels, got {channels}"
            )
        bound = (9 * channels) ** -0.5
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))
        self.offset = _conv3(features, 3 * 9 * groups)
        nn.init.zeros_(self.offset.weight)
        assert self.offset.bias is not None
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        found = self.offset(features)
        offsets, logits = found.split((2 * found.shape[1] // 3, found.shape[1] // 3), dim=1)
        y: Tensor = deform_conv2d(x, offsets, self.weight, self.bias, padding=1, mask=torch.sigmoid(logits))
        return y


class MFI(nn.Module):
    """Multi-dimension feature integration (Eq. 4-5): attention over channels, then over rows and over columns, summed.

    Each attention is a sigmoid of an average, times 2 as in the authors' code, so that its weight is 1 where the average is 0.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = x * (2 * torch.sigmoid(x.mean(dim=(2, 3), keepdim=True)))
        rows = torch.sigmoid(x.mean(dim=(1, 3), keepdim=True))
        columns = torch.sigmoid(x.mean(dim=(1, 2), keepdim=True))
        return x * (1 + 2 * rows + 2 * columns)


class MCB(nn.Module):
    """Multi-scale convolution block (Figure 4 b): a deformable convolution, then 3×3 convolutions at dilations 1, 3 and 5.

    `attention=False` omits MFI (Table 4, "w/o MFI").
    """

    def __init__(self, channels: int, branch: int | None = None, *, attention: bool = True) -> None:
        super().__init__()
        branch = branch or channels
        self.features = _conv3(channels, OFFSET_FEATURES)
        self.deform = ModulatedDeformConv2d(channels)
        self.after = _conv3(channels, channels)
        self.reduce = _reduce(channels, branch)
        self.branches = nn.ModuleList(nn.Conv2d(branch, branch, 3, padding=d, dilation=d) for d in DILATIONS)
        self.attention = MFI() if attention else nn.Identity()
        self.fuse = nn.Conv2d((1 + len(DILATIONS)) * branch, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.reduce(self.after(leaky(self.deform(x, leaky(self.features(x))))))
        maps = torch.cat([y, *(leaky(conv(y)) for conv in self.branches)], dim=1)
        out: Tensor = self.fuse(self.attention(maps))
        return x + out


class SharedKernels(nn.Module):
    """Generates the kernels (N, M, 9, H, W) that the branches of an MDCB share, from C channels.

    SEKG and a 1×1 convolution whose bias `static` (M, 1, 3, 3) starts at the identity and whose weight starts at zero.
    """

    def __init__(self, channels: int, branch: int, *, norm: str | None = None) -> None:
        super().__init__()
        geometry = ConvGeometry(in_channels=channels, out_channels=channels, kernel_size=(3, 3), padding=(1, 1, 1, 1))
        self.generator = SEKG(geometry, 9 * branch, channel_bias=True, norm=norm)
        self.static = nn.Parameter(torch.zeros(branch, 1, 3, 3))
        with torch.no_grad():
            self.static[:, :, 1, 1] = 1

    def forward(self, x: Tensor) -> Tensor:
        features = self.generator.features(x)
        kernels = F.conv2d(features, self.generator.weight[:, :, None, None], self.static.flatten())
        return kernels.view(x.shape[0], self.static.shape[0], 9, x.shape[2], x.shape[3])


class MDCB(nn.Module):
    """Multi-scale dynamic convolution block (Figure 4 a, Eq. 1-5).

    Kernels generated by a deformable convolution and SEKG filter the reduced input at dilations 1, 3 and 5; each result goes
    through its own 3×3 convolution; the four maps are integrated (MFI), fused and added to the input. `attention=False`
    omits MFI. `backend` names the implementation of the dynamic filtering, for comparisons; None is the fastest.
    """

    backend: str | None = None

    def __init__(
        self, channels: int, branch: int | None = None, *, attention: bool = True, norm: str | None = None
    ) -> None:
        super().__init__()
        branch = branch or channels
        self.features = _conv3(channels, OFFSET_FEATURES)
        self.deform = ModulatedDeformConv2d(channels)
        self.kernels = SharedKernels(channels, branch, norm=norm)
        self.reduce = _reduce(channels, branch)
        self.branches = nn.ModuleList(_conv3(branch, branch) for _ in DILATIONS)
        self.attention = MFI() if attention else nn.Identity()
        self.fuse = nn.Conv2d((1 + len(DILATIONS)) * branch, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        kernels = self.kernels(leaky(self.deform(x, leaky(self.features(x)))))
        y = self.reduce(x)
        maps = [y]
        for dilation, conv in zip(DILATIONS, self.branches, strict=True):
            d = (dilation, dilation)
            filtered = dconv(y, kernels, (3, 3), padding=d, dilation=d, backend=self.backend)
            maps.append(leaky(conv(filtered)))
        out: Tensor = self.fuse(self.attention(torch.cat(maps, dim=1)))
        return x + out


def use_backend(model: nn.Module, backend: str | None) -> None:
    """Run every dynamic filtering in these blocks of a model on the named backend ("reference" is the unfold formulation)."""
    for module in model.modules():
        if isinstance(module, MDCB | DConv2d):
            module.backend = backend


def _conv3(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def _reduce(channels: int, branch: int) -> nn.Module:
    return nn.Identity() if branch == channels else nn.Conv2d(channels, branch, 1)
