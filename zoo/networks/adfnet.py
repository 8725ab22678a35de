"""ADFNet: Shen et al., "Adaptive Dynamic Filtering Network for Image Denoising" (AAAI 2023), Figure 2.

An encoder and a decoder at four scales. The encoder has a CB and an MCB at each scale, the decoder a DCB and an MDCB at all but
the coarsest; 3×3 convolutions of stride 2 with an activation downsample, 6×6 transposed convolutions upsample, where the encoder's
features of that scale are added. The last convolution outputs the correction that is added to the image.
"""

from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.errors import ConfigError
from surgeon.layers.sekg.blocks import CB, DCB, MCB, MDCB, leaky
from surgeon.zoo.comparators import start_at_zero
from surgeon.zoo.registry import Published, register, zero_based

WIDTHS = (32, 64, 128, 256)


class ADFNet(nn.Module):
    """Noisy image (N, C, H, W) in [0, 1] -> denoised image of the same shape, not clipped.

    The sides may have any length of at least 8: the image is reflected at its border to a multiple of 8. `single` and `multi`
    select where the blocks are dynamic, DCB instead of CB and MDCB instead of MCB: "none", "encoder", "decoder" or "all" (of
    Table 4; the coarsest scale, between the two sides, is dynamic in "all" only). `attention=False` omits MFI everywhere.
    """

    def __init__(
        self,
        channels: int = 3,
        widths: tuple[int, ...] = WIDTHS,
        *,
        single: str = "decoder",
        multi: str = "decoder",
        attention: bool = True,
    ) -> None:
        super().__init__()
        if len(widths) < 2 or any(width % 8 for width in widths):
            raise ConfigError(f"ADFNet has at least two scales with multiples of 8 channels, got widths={widths!r}")
        self.multiple = 2 ** (len(widths) - 1)
        branches = [width if width <= 2 * widths[0] else width // 2 for width in widths]  # 32, 64, 64, 128

        def stage(scale: int, side: str) -> nn.Sequential:
            one = DCB if _covers(single, side) else CB
            many = MDCB if _covers(multi, side) else MCB
            return nn.Sequential(one(widths[scale]), many(widths[scale], branches[scale], attention=attention))

        finest_last = list(reversed(range(len(widths) - 1)))
        self.head = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.encode = nn.ModuleList(stage(scale, "encoder") for scale in range(len(widths) - 1))
        self.encode.append(stage(len(widths) - 1, "coarsest"))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(widths[i + 1], widths[i], 6, 2, 2) for i in finest_last)
        self.decode = nn.ModuleList(stage(scale, "decoder") for scale in finest_last)
        self.tail = nn.Conv2d(widths[0], channels, 3, padding=1)
        start_at_zero(self.tail)

    def correction(self, x: Tensor) -> Tensor:
        """The residual added to x, whose sides are multiples of 8."""
        x = self.head(x)
        kept = []
        for encode, down in zip(list(self.encode)[:-1], self.down, strict=True):
            kept.append(encode(x))
            x = leaky(down(kept[-1]))
        x = self.encode[-1](x)
        for up, decode in zip(self.up, self.decode, strict=True):
            x = decode(up(x) + kept.pop())
        correction: Tensor = self.tail(x)
        return correction

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        down, right = -height % self.multiple, -width % self.multiple
        padded = F.pad(x, (0, right, 0, down), mode="reflect") if down or right else x
        return x + self.correction(padded)[..., :height, :width]


_SIDES = {"none": (), "encoder": ("encoder",), "decoder": ("decoder",), "all": ("encoder", "coarsest", "decoder")}


def _covers(where: str, side: str) -> bool:
    if where not in _SIDES:
        raise ConfigError(f"ADFNet's blocks are dynamic in {', '.join(_SIDES)}, got {where!r}")
    return side in _SIDES[where]


# The authors' code: fe1..fe3 and cfe are the encoder, dfe3..dfe1 the decoder; AFG generates and DepthDC applies kernels.
_LAYOUT = (
    (r"^fe(\d)\.fe\.", zero_based("encode.{}.")),
    (r"^cfe\.fe\.", "encode.3."),
    (r"^dfe(\d)\.fe\.", lambda match: f"decode.{3 - int(match[1])}."),
    (r"^down(\d)\.", zero_based("down.{}.")),
    (r"^up(\d)\.", lambda match: f"up.{3 - int(match[1])}."),
    (r"\.offset\.offset_conv1\.", ".features."),
    (r"\.(dcn|generate_kernel)\.0\.conv_offset_mask\.", ".deform.offset."),
    (r"\.(dcn|generate_kernel)\.0\.", ".deform."),
    (r"\.dcn\.2\.", ".after."),
    (r"\.generate_kernel\.2\.conv_sa\.", ".kernels.generator.spatial."),
    (r"\.generate_kernel\.2\.conv_ca\.", ".kernels.generator.channel."),
    (r"\.generate_kernel\.3\.weight$", ".kernels.generator.weight"),
    (r"\.generate_kernel\.3\.bias$", ".kernels.static"),
    (r"\.dyconv\.afg\.sekg\.conv_sa\.", ".dconv.generator.spatial."),
    (r"\.dyconv\.afg\.sekg\.conv_ca\.", ".dconv.generator.channel."),
    (r"\.dyconv\.afg\.conv\.weight$", ".dconv.generator.weight"),
    (r"\.dyconv\.afg\.conv\.bias$", ".dconv.static"),
    (r"\.branch_(\d)\.fuse\.", lambda match: f".branches.{int(match[1]) // 2}."),
    (r"\.1\.conv(\d)\.", zero_based(".1.branches.{}.")),
    (r"\.1\.conv\.", ".1.reduce."),
    (r"\.fusion\.", ".fuse."),
)
_RESHAPED = r"\.generator\.weight$|\.static$"
_DEFORM = r"\.deform\.(weight|bias)$"
_LEFT_OUT = (
    "the published numbers come from a module counter: it omits the weights of the seven deformable convolutions "
    "({deform} parameters, which belong to no module, {deform_macs} G of the multiply-accumulates) and counts the transposed "
    "convolutions at their output size, 4 times too much (+{up_macs} G): {sum}"
)
_BY_HAND: dict[str, Any] = {
    "plain": "adfnet_wo_dcb_mdcb",
    "by_hand": "a DCB has other convolutions than a CB, and an MDCB than an MCB: neither is the other with a layer "
    "replaced, so surgery on the static network yields a different one",
}
_PAPER: dict[str, Any] = {"layout": _LAYOUT, "reshaped": _RESHAPED, "uncounted": _DEFORM}
_COLOUR = _LEFT_OUT.format(deform="977,600", deform_macs="1.06", up_macs="2.72", sum="12.29 - 1.06 + 2.72 = 13.95 G")
_AT = (3, 128, 128)


@register(
    "adfnet",
    input_size=_AT,
    published=Published(where="Table 4 (parameters), Table 2 (FLOPs)", params=7.65e6, macs=13.9e9, at=_AT),
    difference=_COLOUR,
    **_PAPER,
    **_BY_HAND,
)
def adfnet(
    channels: int = 3,
    widths: tuple[int, ...] = WIDTHS,
    single: str = "decoder",
    multi: str = "decoder",
    attention: bool = True,
) -> nn.Module:
    """ADFNet for color images, 32 to 256 channels, 8.63 M parameters."""
    return ADFNet(channels, tuple(widths), single=single, multi=multi, attention=attention)


@register("adfnet_gray", input_size=(1, 128, 128), **_PAPER)
def adfnet_gray(channels: int = 1, widths: tuple[int, ...] = WIDTHS) -> nn.Module:
    """ADFNet for gray images, 8.63 M parameters."""
    return ADFNet(channels, tuple(widths))


@register("adfnet_real", input_size=_AT, **_PAPER)
def adfnet_real(channels: int = 3, widths: tuple[int, ...] = WIDTHS) -> nn.Module:
    """ADFNet for real noise (SIDD, DND): the color network, trained with the Charbonnier loss on 256×256 patches."""
    return ADFNet(channels, tuple(widths))


@register(
    "adfnet_l",
    input_size=_AT,
    published=Published(where="Table 2", macs=46.2e9, at=_AT),
    difference=_LEFT_OUT.format(
        deform="3,908,992", deform_macs="4.23", up_macs="10.87", sum="39.66 - 4.23 + 10.87 = 46.30 G"
    ),
    **_PAPER,
)
def adfnet_l(channels: int = 3, widths: tuple[int, ...] = (64, 128, 256, 512)) -> nn.Module:
    """ADFNet*, 64 to 512 channels, 32.8 M parameters."""
    return ADFNet(channels, tuple(widths))


def _ablation(name: str, params: float, **options: Any) -> None:
    """One row of Table 4."""
    published = Published(where="Table 4", params=params)

    def build(channels: int = 3, widths: tuple[int, ...] = WIDTHS) -> nn.Module:
        return ADFNet(channels, tuple(widths), **options)

    told = ", ".join(f"{key}={value!r}" for key, value in options.items())
    build.__doc__ = f"ADFNet of the ablation in Table 4: {told}."
    register(name, input_size=_AT, published=published, difference=_COLOUR, uncounted=_DEFORM)(build)


_ablation("adfnet_wo_dcb_mdcb", 7.71e6, single="none", multi="none")
_ablation("adfnet_wo_dcb", 7.64e6, single="none")
_ablation("adfnet_wo_mdcb", 7.72e6, multi="none")
_ablation("adfnet_wo_mfi", 7.65e6, attention=False)
_ablation("adfnet_all", 7.30e6, single="all", multi="all")
_ablation("adfnet_encoder", 7.65e6, single="encoder", multi="encoder")
