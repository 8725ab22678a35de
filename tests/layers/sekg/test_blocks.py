"""ADFNet's blocks: equal to a plain reference, right gradients, the same on every backend; foreign weights load."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

import surgeon.zoo as zoo
from surgeon.errors import ConfigError, GeometryError, ModelError
from surgeon.layers.sekg.blocks import CB, DCB, MCB, MDCB, MFI, ModulatedDeformConv2d, use_backend


def shaken(module: nn.Module) -> nn.Module:
    """Nothing at zero or at the identity, so that every part matters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.double().eval()


# --- a second, plain formulation: unfold, multiply, sum ----------------------------------------------------------------


def conv(x: Tensor, layer: nn.Module, dilation: int = 1) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return F.conv2d(x, weight, layer.bias, padding=dilation * (weight.shape[-1] // 2), dilation=dilation)


def act(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def filtered(x: Tensor, kernels: Tensor, dilation: int) -> Tensor:
    n, c, h, w = x.shape
    patches = F.unfold(x, 3, dilation, dilation).view(n, c, 9, h, w)
    return (patches * kernels.reshape(n, c, 9, h, w)).sum(2)


def sekg(x: Tensor, generator: nn.Module, static: Tensor) -> Tensor:
    around = F.conv2d(x, generator.spatial.weight, generator.spatial.bias, padding=1, groups=x.shape[1])
    average = x.mean((2, 3))[:, None]
    channel = F.conv1d(average, generator.channel.weight, generator.channel.bias, padding=1)[:, 0, :, None, None]
    return F.conv2d(around + channel, generator.weight[:, :, None, None], static.flatten())


def integrated(x: Tensor) -> Tensor:
    """Equation 4, an attention at a time."""
    channel = 2 * torch.sigmoid(x.mean((2, 3)))[:, :, None, None] * x
    rows = 2 * torch.sigmoid(channel.mean((1, 3)))[:, None, :, None] * channel
    columns = 2 * torch.sigmoid(channel.mean((1, 2)))[:, None, None, :] * channel
    return channel + rows + columns


def deformed(x: Tensor, block: nn.Module) -> Tensor:
    found = conv(act(conv(x, block.features)), block.deform.offset)
    vertical, horizontal, mask = found.chunk(3, 1)
    offsets = torch.cat([vertical, horizontal], 1)
    return act(deform_conv2d(x, offsets, block.deform.weight, block.deform.bias, padding=1, mask=torch.sigmoid(mask)))


def plain(block: nn.Module, x: Tensor) -> Tensor:
    if isinstance(block, CB):
        return x + conv(act(conv(conv(x, block.conv1), block.conv2)), block.conv3)
    if isinstance(block, DCB):
        y = conv(x, block.conv1)
        y = filtered(y, sekg(y, block.dconv.generator, block.dconv.static), 1)
        return x + conv(act(y), block.conv2)
    reduced = (lambda y: y) if isinstance(block.reduce, nn.Identity) else (lambda y: conv(y, block.reduce))
    if isinstance(block, MCB):
        y = reduced(conv(deformed(x, block), block.after))
        maps = [act(conv(y, layer, d)) for layer, d in zip(block.branches, (1, 3, 5), strict=True)]
    else:
        y = reduced(x)
        kernels = sekg(deformed(x, block), block.kernels.generator, block.kernels.static)
        maps = [act(conv(filtered(y, kernels, d), layer)) for layer, d in zip(block.branches, (1, 3, 5), strict=True)]
    both = torch.cat([y, *maps], 1)
    return x + conv(integrated(both) if isinstance(block.attention, MFI) else both, block.fuse)


BLOCKS = [
    CB(8),
    DCB(8),
    MCB(8),
    MCB(16, 8),
    MCB(8, attention=False),
    MDCB(8),
    MDCB(16, 8),
    MDCB(8, attention=False),
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: type(block).__name__)
def test_blocks_equal_the_plain_formulation(block: nn.Module) -> None:
    block = shaken(block)
    channels = next(block.parameters()).shape[1]
    x = torch.randn(2, channels, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(block(x), plain(block, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [DCB, MDCB])
def test_gradients(kind: type[nn.Module]) -> None:
    block = shaken(kind(8))
    x = torch.randn(1, 8, 3, 4, dtype=torch.float64, requires_grad=True)
    parameters = {
        name: p for name, p in block.named_parameters() if name.endswith(("generator.weight", "static", "conv1.bias"))
    }

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (x,)).tanh()

    assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True)


def test_the_backends_agree() -> None:
    block = shaken(nn.Sequential(DCB(8), MDCB(8))).float()
    x = torch.randn(2, 8, 17, 12)
    fast = block(x)
    use_backend(block, "reference")
    torch.testing.assert_close(block(x), fast, rtol=1e-4, atol=1e-5)


def test_dynamic_blocks_start_without_a_dynamic_part() -> None:
    """DConv is the identity at birth, so that a DCB is two convolutions."""
    block = DCB(8).eval()
    x = torch.randn(1, 8, 6, 6)
    expected = x + block.conv2(F.leaky_relu(block.conv1(x), 0.2))
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


def test_offset_groups_must_divide() -> None:
    with pytest.raises(GeometryError, match="multiple of 8 channels, got 12"):
        ModulatedDeformConv2d(12)


# --- ADFNet ------------------------------------------------------------------------------------------------------------


def numbers(model: nn.Module, without: str = "^$") -> int:
    return sum(p.numel() for name, p in model.named_parameters() if not re.search(without, name))


def test_parameters_of_the_authors_code() -> None:
    assert numbers(zoo.create("adfnet")) == 8_628_579
    assert numbers(zoo.create("adfnet"), zoo.entry("adfnet").uncounted) == 7_650_979


def test_blocks_of_the_ablations() -> None:
    """Where Table 4's variants are dynamic."""

    def kinds(name: str) -> tuple[list[str], list[str]]:
        net = zoo.create(name, widths=(8, 16))
        return [type(b).__name__ for s in net.encode for b in s], [type(b).__name__ for s in net.decode for b in s]

    assert kinds("adfnet") == (["CB", "MCB"] * 2, ["DCB", "MDCB"])
    assert kinds("adfnet_wo_dcb") == (["CB", "MCB"] * 2, ["CB", "MDCB"])
    assert kinds("adfnet_wo_mdcb") == (["CB", "MCB"] * 2, ["DCB", "MCB"])
    assert kinds("adfnet_wo_dcb_mdcb") == (["CB", "MCB"] * 2, ["CB", "MCB"])
    assert kinds("adfnet_all") == (["DCB", "MDCB"] * 2, ["DCB", "MDCB"])
    assert kinds("adfnet_encoder") == (["DCB", "MDCB", "CB", "MCB"], ["CB", "MCB"])
    assert not any(isinstance(m, MFI) for m in zoo.create("adfnet_wo_mfi", widths=(8, 16)).modules())


@pytest.mark.parametrize("size", [(8, 8), (19, 30)])
def test_any_size(size: tuple[int, int]) -> None:
    net = zoo.create("adfnet", widths=(8, 16, 32, 64)).eval()
    assert net(torch.rand(1, 3, *size)).shape == (1, 3, *size)


@pytest.mark.parametrize("options", [{"single": "middle"}, {"widths": (8,)}, {"widths": (12, 24)}])
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="got "):
        zoo.create("adfnet", **options)


# --- weights of the authors' code --------------------------------------------------------------------------------------


def authors_state(channels: int = 3, n: tuple[int, int, int, int] = (32, 64, 128, 256)) -> dict[str, Tensor]:
    """Names and shapes as the authors' network has them, random values."""
    state: dict[str, Tensor] = {}

    def layer(name: str, c_in: int, c_out: int, k: int = 3) -> None:
        state[f"{name}.weight"] = torch.randn(c_out, c_in, k, k)
        state[f"{name}.bias"] = torch.randn(c_out)

    def deform(name: str, c: int) -> None:
        layer(name, c, c)
        layer(f"{name}.conv_offset_mask", 32, 216)

    def kernels(name: str, c: int) -> None:
        state[f"{name}.conv_sa.weight"] = torch.randn(c, 1, 3, 3)
        state[f"{name}.conv_sa.bias"] = torch.randn(c)
        state[f"{name}.conv_ca.weight"] = torch.randn(1, 1, 3)
        state[f"{name}.conv_ca.bias"] = torch.randn(1)

    def encoder(name: str, c: int, m: int) -> None:
        for i in (1, 2, 3):
            layer(f"{name}.fe.0.conv{i}", c, c)
            layer(f"{name}.fe.1.conv{i}", m, m)
        deform(f"{name}.fe.1.dcn.0", c)
        layer(f"{name}.fe.1.dcn.2", c, c)
        rest(f"{name}.fe.1", c, m)

    def rest(name: str, c: int, m: int) -> None:
        layer(f"{name}.offset.offset_conv1", c, 32)
        layer(f"{name}.fusion", 4 * m, c, 1)
        if c != m:
            layer(f"{name}.conv", c, m, 1)

    def decoder(name: str, c: int, m: int) -> None:
        layer(f"{name}.fe.0.conv1", c, c)
        layer(f"{name}.fe.0.conv2", c, c)
        kernels(f"{name}.fe.0.dyconv.afg.sekg", c)
        layer(f"{name}.fe.0.dyconv.afg.conv", c, 9 * c, 1)
        deform(f"{name}.fe.1.generate_kernel.0", c)
        kernels(f"{name}.fe.1.generate_kernel.2", c)
        layer(f"{name}.fe.1.generate_kernel.3", c, 9 * m, 1)
        for d in (1, 3, 5):
            layer(f"{name}.fe.1.branch_{d}.fuse", m, m)
        rest(f"{name}.fe.1", c, m)

    branches = (n[0], n[1], n[2] // 2, n[3] // 2)
    layer("head", channels, n[0])
    layer("tail", n[0], channels)
    for i, name in enumerate(("fe1", "fe2", "fe3", "cfe")):
        encoder(name, n[i], branches[i])
    for i in (1, 2, 3):
        layer(f"down{i}", n[i - 1], n[i])
        state[f"up{i}.weight"] = torch.randn(n[i], n[i - 1], 6, 6)
        state[f"up{i}.bias"] = torch.randn(n[i - 1])
        decoder(f"dfe{i}", n[i - 1], branches[i - 1])
    return state


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_of_the_authors_code_load(tmp_path: Path, prefix: str) -> None:
    state = authors_state()
    assert sum(t.numel() for t in state.values()) == 8_628_579
    path = tmp_path / "model_best.pt"
    torch.save({f"{prefix}{key}": value for key, value in state.items()}, path)
    net = zoo.load_foreign(zoo.create("adfnet"), path, network="adfnet")
    own = net.state_dict()
    assert len(own) == len(state)
    sources = {
        "encode.3.1.branches.2.weight": "cfe.fe.1.conv3.weight",
        "encode.0.1.after.bias": "fe1.fe.1.dcn.2.bias",
        "encode.2.1.reduce.weight": "fe3.fe.1.conv.weight",
        "encode.1.0.conv3.weight": "fe2.fe.0.conv3.weight",
        "decode.0.0.dconv.static": "dfe3.fe.0.dyconv.afg.conv.bias",
        "decode.2.0.dconv.generator.weight": "dfe1.fe.0.dyconv.afg.conv.weight",
        "decode.0.1.kernels.generator.weight": "dfe3.fe.1.generate_kernel.3.weight",
        "decode.1.1.deform.offset.bias": "dfe2.fe.1.generate_kernel.0.conv_offset_mask.bias",
        "decode.1.1.branches.1.weight": "dfe2.fe.1.branch_3.fuse.weight",
        "up.0.weight": "up3.weight",
    }
    for ours, theirs in sources.items():
        assert torch.equal(own[ours].flatten(), state[theirs].flatten())
    # every tensor is somewhere, none twice
    sums = sorted(float(t.double().sum()) for t in own.values())
    assert sums == sorted(float(t.double().sum()) for t in state.values())


def test_weights_of_another_width_do_not_load(tmp_path: Path) -> None:
    path = tmp_path / "narrow.pt"
    torch.save(authors_state(n=(16, 32, 64, 128)), path)
    with pytest.raises(ModelError, match="another model"):
        zoo.load_foreign(zoo.create("adfnet"), path, network="adfnet")
