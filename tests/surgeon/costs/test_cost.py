"""Memory and the whole of `cost`: known numbers, an independent count, what changes with the step, and bad input."""

import gc
import warnings
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.memory_accuracy import tracked
from surgeon.cli import main
from surgeon.costs import cost, parse_input_size, parse_quantity
from surgeon.costs.allocator import CachingAllocator, round_block
from surgeon.costs.emulate import cuda_dispatch, meta_copy
from surgeon.costs.settings import OPTIMIZERS
from surgeon.errors import ConfigError, InputError

MIB = 2**20


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_resnet50_has_its_known_numbers() -> None:
    found = cost(timm.create_model("resnet50"), batch_size=32)
    assert found.flops == 8_178_368_512
    assert found.macs * 2 == found.flops
    assert found.params == 25_557_032
    assert found.peak_bytes / MIB == pytest.approx(2849, rel=0.001)
    assert sum(v for k, v in found.breakdown.items() if k != "reserve") == found.peak_bytes
    assert sum(layer.flops for layer in found.layers) == found.flops
    assert sum(layer.params for layer in found.layers) == found.params
    assert found.unknown_ops == {}
    assert not found.estimated


def test_a_cost_prints_as_the_command_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "test_resnet", "--batch-size", "2"]) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    found = str(cost(timm.create_model("test_resnet"), batch_size=2)).splitlines()
    assert found[0] == printed[0].replace("test_resnet:", "cost:")
    assert found[1:] == printed[1:]


@pytest.mark.parametrize(("train", "amp"), [(True, False), (True, True), (False, False), (False, True)])
def test_agrees_with_an_independent_tracker(train: bool, amp: bool) -> None:
    mine = cost(timm.create_model("resnet18"), batch_size=4, mode="train" if train else "infer", amp=amp)
    with warnings.catch_warnings(), FakeTensorMode():
        warnings.simplefilter("ignore")
        peak = tracked(timm.create_model("resnet18"), torch.randn(4, 3, 224, 224), train=train, amp=amp)
    assert mine.peak_bytes == pytest.approx(peak, rel=0.005)


def test_nothing_real_is_allocated_and_the_model_stays_as_it_is() -> None:
    model = small()
    model.register_buffer("extra", torch.ones(3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.utils._python_dispatch._disable_current_modes():
        cost(model, input_size=(4096, 4096), batch_size=4096)  # petabytes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_saved_activations_are_linear_in_the_batch() -> None:
    one, two, four = (cost(small(), input_size=32, batch_size=n) for n in (16, 32, 64))
    saved = [sum(layer.saved_bytes for layer in c.layers) for c in (one, two, four)]
    assert saved[2] - saved[1] == pytest.approx(2 * (saved[1] - saved[0]), rel=0.01)
    assert one.flops == two.flops


def test_optimizers_hold_what_they_hold() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 1000))  # the optimizer's step is the peak
    weights = round_block(3 * 64 * 64 * 1000 * 4) + round_block(4000)
    peaks = {name: cost(model, input_size=64, optimizer=name, weight_decay=0.0).peak_bytes for name in OPTIMIZERS}
    parts = {name: cost(model, input_size=64, optimizer=name).breakdown["optimizer"] for name in OPTIMIZERS}
    assert parts == {"sgd": weights, "sgd-plain": 0, "adam": 2 * weights, "adamw": 2 * weights}
    assert peaks["adam"] - peaks["sgd"] >= weights  # and the temporary square roots of the foreach step
    assert (
        cost(model, input_size=64, optimizer="sgd").peak_bytes > peaks["sgd"]
    )  # coupled weight decay copies gradients
    assert cost(model, input_size=64, optimizer=torch.optim.SGD).breakdown["optimizer"] == 0


def test_amp_halves_activations_and_keeps_half_weights() -> None:
    full, half = (
        cost(timm.create_model("resnet18"), batch_size=8),
        cost(timm.create_model("resnet18"), batch_size=8, amp=True),
    )
    ratio = half.breakdown["saved activations"] / full.breakdown["saved activations"]
    assert 0.5 < ratio < 0.7
    assert half.flops == full.flops
    assert half.amp == "float16"


def test_accumulation_keeps_gradients_and_checkpointing_trades_activations_for_flops() -> None:
    model = timm.create_model("resnet18")
    plain, many = cost(model, batch_size=8), cost(model, batch_size=8, accumulate=4)
    assert many.breakdown["gradients"] > plain.breakdown["gradients"]
    assert many.flops == plain.flops
    for amp in (False, True):
        less = cost(model, batch_size=8, checkpointing=True, amp=amp)
        assert not less.estimated
        assert less.peak_bytes < cost(model, batch_size=8, amp=amp).peak_bytes
        assert less.backward_flops > plain.backward_flops
    with pytest.raises(ConfigError, match="set_grad_checkpointing"):
        cost(small(), checkpointing=True)
    with pytest.raises(ConfigError, match="DLA does not support gradient checkpointing"):
        cost(timm.create_model("dla34"), checkpointing=True)


def test_channels_last_costs_the_same_tensors() -> None:
    model = timm.create_model("resnet18")
    last = cost(model, batch_size=4, channels_last=True)
    assert last.peak_bytes == pytest.approx(cost(model, batch_size=4).peak_bytes, rel=0.01)
    assert last.reserve["workspaces"] <= cost(model, batch_size=4).reserve["workspaces"]


def test_dropout_and_attention_save_what_cuda_saves() -> None:
    x = torch.empty(2, 4, 64, 32, device="meta", requires_grad=True)
    with cuda_dispatch(torch.bfloat16):
        out = F.dropout(F.scaled_dot_product_attention(x, x, x), 0.5)
    assert out.dtype is torch.bfloat16
    assert out.grad_fn is not None
    assert out.grad_fn.name() == "NativeDropoutBackward0"
    assert (
        F.conv2d(torch.empty(1, 3, 4, 4, device="meta"), torch.empty(2, 3, 1, 1, device="meta")).dtype is torch.float32
    )


def test_autocast_regions_and_questions_are_answered_for_meta() -> None:
    a = torch.empty(3, 3, device="meta")
    with cuda_dispatch(torch.float16):
        assert torch.is_autocast_enabled("meta")
        assert (a @ a).dtype is torch.float16
        with torch.autocast("meta", enabled=False):
            assert not torch.is_autocast_enabled("meta")
            assert (a @ a).dtype is torch.float32
        assert F.softmax(a.half(), 0).dtype is torch.float32
        assert F.layer_norm(a.half(), [3]).dtype is torch.float32
    assert not torch.is_autocast_enabled()
    assert (a @ a).dtype is torch.float32


def test_meta_copies_share_nothing_and_keep_ties() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    copy: Any = meta_copy(model)
    assert copy[0].weight is copy[1].weight
    assert all(p.is_meta for p in copy.parameters())
    assert not model[0].weight.is_meta


# --- the allocator ----------------------------------------------------------------------------------------------------


def test_segments_of_the_allocator() -> None:
    allocator = CachingAllocator()
    allocator.allocate(1, 100)
    assert (allocator.allocated, allocator.reserved) == (512, 2 * MIB)
    allocator.allocate(2, 3 * MIB)
    assert allocator.reserved == 22 * MIB
    allocator.allocate(3, 11 * MIB)  # from the rest of the 20 MiB segment
    assert allocator.reserved == 22 * MIB
    allocator.allocate(4, 11 * MIB)
    assert allocator.reserved == 34 * MIB
    allocator.release(3)
    allocator.release(2)
    allocator.allocate(5, 19 * MIB)  # its neighbors have merged; what is left is too small to be split off
    assert allocator.reserved == 34 * MIB
    assert allocator.allocated == 512 + 20 * MIB + 12 * MIB


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40 * MIB)), max_size=60))
@settings(max_examples=30)
def test_the_allocator_loses_nothing(requests: list[tuple[int, int]]) -> None:
    allocator, held = CachingAllocator(), {}
    for handle, size in requests:
        if handle in held:
            allocator.release(handle)
            del held[handle]
        else:
            allocator.allocate(handle, size)
            held[handle] = round_block(size)
        assert sum(held.values()) <= allocator.allocated <= allocator.pinned <= allocator.reserved
    for handle in held:
        allocator.release(handle)
    assert allocator.allocated == allocator.pinned == 0


# --- bad input, and models that cannot be traced ----------------------------------------------------------------------


class Stubborn(nn.Module):
    """Its control flow depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out * 2 if float(out.detach().abs().max()) > 0.5 else out


def test_models_that_need_values_are_estimated_and_say_so() -> None:
    found = cost(Stubborn(), input_size=32, batch_size=64)
    assert found.estimated
    assert "cannot be traced without data" in found.notes[0]
    like = cost(small(), input_size=32, batch_size=64)
    assert found.flops == like.flops
    assert found.peak_bytes == pytest.approx(like.peak_bytes, rel=0.15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion'; expected sgd"),
        ({"mode": "test"}, "mode must be 'train' or 'infer'"),
        ({"amp": "int4"}, "amp must be"),
        ({"input_size": "big"}, "input size: expected"),
        ({"input_size": (3, 0, 4)}, "input size: expected"),
        ({"accumulate": 0}, "accumulate must be"),
    ],
)
def test_bad_arguments_get_one_clear_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        cost(small(), **arguments)


def test_a_size_that_the_model_rejects() -> None:
    with pytest.raises(InputError, match="3x225x225"):
        cost(timm.create_model("vit_tiny_patch16_224"), input_size=225)


@pytest.mark.parametrize(
    ("text", "value"),
    [("4.5G", 4_500_000_000), ("8GiB", 8 * 2**30), ("512MB", 512_000_000), ("1e9", 10**9), (7, 7), ("2 Ki", 2048)],
)
def test_quantities(text: Any, value: int) -> None:
    assert parse_quantity(text) == value


@pytest.mark.parametrize("text", ["4,5G", "", "G", "-3G", "0", "8 GiGi", "inf", "1i", True, None])
def test_wrong_quantities(text: Any) -> None:
    with pytest.raises(ConfigError, match="--max-memory"):
        parse_quantity(text, "--max-memory")
    with pytest.raises(ConfigError, match=r"4\.5G"):
        parse_quantity("4,5G")


def test_input_sizes() -> None:
    assert [parse_input_size(t) for t in ("224", "224x320", "3×2×1", [5, 6])] == [(224,), (224, 320), (3, 2, 1), (5, 6)]


def test_traces_leave_nothing_behind() -> None:
    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    cost(small(), input_size=32, amp=True)
    before = tensors()
    cost(small(), input_size=32, amp=True)
    assert tensors() <= before


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_detection_models_are_estimated_with_made_up_targets(mode: Any) -> None:
    model = torchvision.models.get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None)
    found = cost(model, input_size=320, batch_size=8, mode=mode)
    assert found.estimated
    assert not found.unknown_ops
    assert found.flops > 8e8  # 0.58 GMAC published
    assert (found.backward_flops > found.flops) is (mode == "train")


def test_flow_models_are_given_two_images() -> None:
    model = torchvision.models.get_model("raft_small", weights=None)
    found = cost(model, input_size=128, batch_size=1, mode="infer")
    assert not found.estimated
    assert not found.unknown_ops
