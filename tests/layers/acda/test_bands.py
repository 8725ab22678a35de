"""ACDA without gradients works in bands, with any generator; the cheap generators cost what they say."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import surgeon
from surgeon.errors import ConfigError
from surgeon.layers import ACDAConfig
from surgeon.layers.acda import ACDAConv2d
from surgeon.layers.acda import layer as acda
from tests.support.layers.contract import (
    awaken,
    geometries,
    make,
    plain_conv,
    random_input,
    random_source,
    relative_error,
)

FORMS = ("full", "separable", "lowrank")


@settings(max_examples=40)
@given(case=geometries(), form=st.sampled_from(FORMS), limit=st.sampled_from([1, 5_000, 50_000]))
def test_bands_compute_what_the_whole_computes(case: Any, form: str, limit: int) -> None:
    geometry, size = case
    source = random_source(geometry)
    layer, x = awaken(make("acda", source, generator=form)).eval(), random_input(source, 3, *size)
    expected = layer(x).detach()  # with gradients: whole
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(acda, "BAND_BYTES", limit)
        assert relative_error(layer(x), expected) <= 1e-5


def test_the_generators_maps_never_exist_whole_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make("acda", plain_conv()).eval()
    assert isinstance(layer, ACDAConv2d)
    sizes: list[int] = []
    layer.generator.register_forward_hook(lambda module, args, out: sizes.append(out.numel() * out.element_size()))
    x = torch.randn(2, 6, 40, 20)
    limit = 6 * 21 * 20 * 8 * 4  # some eight rows
    monkeypatch.setattr(acda, "BAND_BYTES", limit)
    with torch.no_grad():
        layer(x)
    assert len(sizes) > 4
    assert max(sizes) <= limit
    sizes.clear()
    layer(x)
    assert len(sizes) == 1


def test_bands_follow_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = awaken(make("acda", plain_conv())).eval(), torch.randn(1, 6, 30, 20)
    monkeypatch.setattr(acda, "BAND_BYTES", 60_000)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y.float(), layer(x)) <= 6e-2


@pytest.mark.parametrize("form", ["separable", "lowrank"])
def test_a_cheap_generator_is_cheaper_by_its_formula_and_by_the_cost_model(form: str) -> None:
    conv = nn.Conv2d(64, 64, 3, padding=1)
    layers = [ACDAConv2d.from_conv(conv, ACDAConfig(generator=g)) for g in ("full", form)]
    full, cheap = (layer.generator.macs(8, 8) for layer in layers)
    outputs = 6 * 21
    per_pixel = {"separable": 64 * 9 + 64 * outputs, "lowrank": 64 * 9 * 16 + 16 * outputs}[form]
    assert full == 64 * (64 * 64 + 64 * 9 * outputs)
    assert cheap == 64 * (64 * 64 + per_pixel)
    counted = [surgeon.cost(layer, input_size=(64, 8, 8), mode="infer").macs for layer in layers]
    # The coefficient of the difference is exact: everything else of the two layers is the same.
    assert counted[0] - counted[1] == full - cheap


def test_every_part_of_a_cheap_generator_learns_by_the_second_step() -> None:
    for form in ("separable", "lowrank"):
        layer = make("acda", plain_conv(), generator=form).train()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        x, target = torch.randn(2, 6, 9, 8), torch.randn(2, 8, 9, 8)
        for _ in range(2):
            optimizer.zero_grad()
            (layer(x) - target).square().mean().backward()
            optimizer.step()
        silent = [name for name, p in layer.new_parameters() if p.grad is None or not p.grad.any()]
        assert not silent, form


def test_wrong_options_are_one_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"generator must be one of full, separable, lowrank, got 'cheap'"):
        ACDAConfig(generator="cheap")
    with pytest.raises(ConfigError, match=r"generator_rank belongs to generator 'lowrank', got generator 'full'"):
        ACDAConfig(generator_rank=4)
    with pytest.raises(ConfigError, match="generator_rank must be an integer >= 1, got 0"):
        ACDAConfig(generator="lowrank", generator_rank=0)
