"""DnCNN: Zhang et al., "Beyond a Gaussian Denoiser: Residual Learning of Deep CNN for Image Denoising" (2017), section III.

A chain of 3x3 convolutions with ReLU between them, batch norm after all but the first and the last. The chain estimates the
noise; the network subtracts it from the image. The noise level is the one it was trained on.

The variant of Shen et al., "Adaptive Dynamic Filtering Network for Image Denoising" (Figure 7), has one DConv in place of the
middle convolution; there `depth` is 5, 10 or 15 and `width` 32 or 64.
"""

from torch import Tensor, nn

from surgeon.errors import ConfigError
from surgeon.layers.sekg.dconv import DConv2d
from surgeon.zoo.comparators import start_at_zero
from surgeon.zoo.registry import register


class DnCNN(nn.Module):
    """Noisy image (N, C, H, W) in [0, 1] -> denoised image of the same shape, not clipped. Starts at the identity.

    Without `batch_norm` the convolutions have biases: the form with batch norm folded in after training. With `dconv`
    the middle convolution is dynamic, and `norm` normalizes the features of its kernels ("batch"; None as in the paper).
    """

    def __init__(
        self,
        channels: int = 1,
        depth: int = 17,
        width: int = 64,
        batch_norm: bool = True,
        dconv: bool = False,
        norm: str | None = None,
    ) -> None:
        super().__init__()
        if depth < 3:
            raise ConfigError(f"DnCNN has at least 3 convolutions, got depth {depth}")
        bias = not batch_norm
        body: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=bias), nn.ReLU()]
        for layer in range(1, depth - 1):
            dynamic = dconv and layer == depth // 2
            body.append(DConv2d.same(width, norm=norm) if dynamic else nn.Conv2d(width, width, 3, padding=1, bias=bias))
            if batch_norm:
                body.append(nn.BatchNorm2d(width))
            body.append(nn.ReLU())
        last = nn.Conv2d(width, channels, 3, padding=1, bias=bias)
        start_at_zero(last)
        body.append(last)
        self.body = nn.Sequential(*body)

    def noise(self, x: Tensor) -> Tensor:
        """The noise that the network estimates in x."""
        noise: Tensor = self.body(x)
        return noise

    def forward(self, x: Tensor) -> Tensor:
        return x - self.noise(x)


# Public weights: the bare chain with its position as the key ("0.weight"), or the chain in an attribute "dncnn" or "model" (KAIR).
_LAYOUT = ((r"^(\d+)\.", r"body.\1."), (r"^(dncnn|model)\.", "body."))


@register("dncnn", input_size=(1, 64, 64), layout=_LAYOUT)
def dncnn(channels: int = 1, depth: int = 17, width: int = 64, batch_norm: bool = True) -> nn.Module:
    """DnCNN-S for gray images: 17 layers, batch norm, 0.56 M parameters."""
    return DnCNN(channels, depth, width, batch_norm)


@register("dncnn_color", input_size=(3, 64, 64), layout=_LAYOUT)
def dncnn_color(channels: int = 3, depth: int = 20, width: int = 64, batch_norm: bool = False) -> nn.Module:
    """CDnCNN for color images: 20 layers, batch norm folded into the convolutions, 0.67 M parameters."""
    return DnCNN(channels, depth, width, batch_norm)


@register(
    "dncnn_dconv",
    input_size=(3, 64, 64),
    plain="dncnn",
    by_hand="the DConv replaces a convolution, which surgery cannot do without losing its function: its sekg "
    "layer keeps the convolution and adds the DConv after it",
)
def dncnn_dconv(
    channels: int = 3, depth: int = 15, width: int = 64, batch_norm: bool = True, norm: str | None = None
) -> nn.Module:
    """DnCNN for color images with a DConv in the middle (ADFNet Figure 7: depth=5, 10, 15 and width=32, 64)."""
    return DnCNN(channels, depth, width, batch_norm, dconv=True, norm=norm)
