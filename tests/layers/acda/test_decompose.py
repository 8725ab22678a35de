"""Kernel decompositions: exactness, rank, truncation in weights and for inputs, and atoms written in a basis."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.layers.acda.bases import basis_elements, centered, fitting_elements
from surgeon.layers.acda.decompose import decompose, expand_in_basis, output_error, truncate_for_inputs
from surgeon.layers.source import ConvSource


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (3, 1, 5, 5), (1, 1, 7, 7), (16, 16, 1, 1), (4, 2, 1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decomposition_is_exact_and_its_atoms_orthonormal(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(*shape, dtype=dtype)
    parts = decompose(weight)
    assert parts.rank == min(shape[0] * shape[1], shape[2] * shape[3])
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    assert (parts.weight() - weight).norm() <= tolerance * weight.norm()
    flat = parts.atoms.flatten(1)
    torch.testing.assert_close(flat @ flat.t(), torch.eye(parts.rank, dtype=torch.float64))
    energy = parts.coeff.square().sum((0, 1))
    assert torch.all(energy[:-1] >= energy[1:])


def test_low_rank_kernels_have_low_rank() -> None:
    weight = torch.einsum("oca,ahw->ochw", torch.randn(8, 4, 2), torch.randn(2, 5, 5))
    assert decompose(weight).rank == 2
    assert decompose(torch.zeros(4, 4, 3, 3)).rank == 0


def test_truncation_is_the_best_in_weights() -> None:
    weight = torch.randn(8, 4, 3, 3, dtype=torch.float64)
    error = (decompose(weight, 4).weight() - weight).norm()
    expected = torch.linalg.svdvals(weight.reshape(32, 9))[4:].norm()
    torch.testing.assert_close(error, expected)


def smooth_inputs(channels: int, seed: int) -> Tensor:
    """Images with correlated neighbors and channels, as feature maps have."""
    generator = torch.Generator().manual_seed(seed)
    x = F.avg_pool2d(torch.randn(6, channels, 20, 20, generator=generator), 3, 1, 1)
    return torch.relu(x + 0.1 * torch.randn(6, channels, 20, 20, generator=generator))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(12, 16, 3, padding=1),
        nn.Conv2d(12, 12, 3, padding=1, groups=12, stride=2),
        nn.Conv2d(12, 16, 5, padding=2, groups=2, padding_mode="reflect"),
        nn.Conv2d(12, 16, 3, dilation=2),
    ],
    ids=["dense", "depthwise", "grouped", "dilated"],
)
def test_knowing_the_inputs_halves_the_error_on_other_inputs(conv: nn.Conv2d) -> None:
    torch.manual_seed(0)
    nn.init.normal_(conv.weight)
    source, seen, unseen = ConvSource.read(conv), smooth_inputs(12, 1), smooth_inputs(12, 2)
    plain, aware = decompose(source.weight, 4), truncate_for_inputs(source, 4, seen)
    assert aware.rank == 4
    for x in (seen, unseen):
        assert output_error(source, aware.weight(), x) < 0.8 * output_error(source, plain.weight(), x)


def test_knowing_the_inputs_is_never_worse_than_not() -> None:
    for seed in range(6):
        torch.manual_seed(seed)
        source = ConvSource.read(nn.Conv2d(3, 2, 3))
        x = torch.randn(1, 3, 4, 4)  # few patches: everything that is fitted to them is overfitted
        plain, aware = decompose(source.weight, 2), truncate_for_inputs(source, 2, x)
        assert output_error(source, aware.weight(), x) <= output_error(source, plain.weight(), x)


def test_inputs_that_say_nothing_leave_the_plain_truncation() -> None:
    source = ConvSource.read(nn.Conv2d(3, 4, 3))
    for x in (torch.zeros(2, 3, 8, 8), torch.zeros(0, 3, 8, 8)):
        assert torch.equal(truncate_for_inputs(source, 3, x).weight(), decompose(source.weight, 3).weight())


def test_output_error_is_relative() -> None:
    source = ConvSource.read(nn.Conv2d(3, 4, 3))
    x = torch.randn(2, 3, 8, 8)
    assert output_error(source, source.weight.double(), x) == 0
    assert output_error(source, torch.zeros_like(source.weight), x) == pytest.approx(1)


@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (7, 7), (4, 4), (1, 1), (1, 5)])
def test_atoms_are_exact_in_the_basis_and_its_extra_elements(kernel: tuple[int, int]) -> None:
    psi = centered(basis_elements(kernel, 3, 6)[: fitting_elements(kernel, 3, 6)], kernel)
    atoms = torch.linalg.qr(torch.randn(kernel[0] * kernel[1], kernel[0] * kernel[1], dtype=torch.float64)).Q
    atoms = atoms[:6].view(-1, *kernel)
    extra, alpha = expand_in_basis(atoms, psi)
    torch.testing.assert_close(torch.einsum("mk,khw->mhw", alpha, torch.cat([psi, extra])), atoms)
    assert alpha.abs().max() < 20
    flat = extra.flatten(1)
    torch.testing.assert_close(flat @ flat.t(), torch.eye(len(extra), dtype=torch.float64))
    if kernel == (3, 3):
        assert len(extra) == 3


def test_a_limit_keeps_the_extra_elements_that_carry_most() -> None:
    psi = centered(basis_elements((3, 3), 3, 6)[:6], (3, 3))
    atoms = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q[:6].view(-1, 3, 3)
    errors = []
    for limit in range(4):
        extra, alpha = expand_in_basis(atoms, psi, limit)
        assert len(extra) == limit
        errors.append(float((torch.einsum("mk,khw->mhw", alpha, torch.cat([psi, extra])) - atoms).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12 < errors[-2]


def test_a_layer_makes_good_what_earlier_ones_lost() -> None:
    torch.manual_seed(0)
    source = ConvSource.read(nn.Conv2d(12, 16, 3, padding=1))
    for make in (smooth_inputs, lambda channels, seed: smooth_inputs(channels, seed)[:, :, ::2, ::2]):
        exact, unseen = make(12, 1), make(12, 2)
        lossy, lossy_unseen = (0.8 * x + 0.3 * x.roll(1, 1) for x in (exact, unseen))
        plain = decompose(source.weight, 6)
        unaware, aware = truncate_for_inputs(source, 6, lossy), truncate_for_inputs(source, 6, lossy, exact)
        for x, x_exact in ((lossy, exact), (lossy_unseen, unseen)):
            errors = [output_error(source, d.weight(), x, x_exact) for d in (plain, unaware, aware)]
            assert errors[2] < 0.9 * min(errors[:2])
