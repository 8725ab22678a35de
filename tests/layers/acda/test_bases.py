"""Fourier-Bessel elements: order, support, norm, independence, and where a box has too few dimensions."""

import pytest
import torch
from scipy.special import jn_zeros, jv

from surgeon.layers.acda.bases import (
    basis_elements,
    centered,
    fitting_elements,
    fourier_bessel,
    scale_boxes,
    window_size,
)

KERNELS = [(3, 3), (5, 5), (7, 7), (11, 11), (2, 2), (4, 4), (1, 5), (3, 1), (1, 1), (3, 4), (3, 5), (1, 2)]


@pytest.mark.parametrize(
    ("kernel", "boxes"),
    [
        ((3, 3), [(3, 3), (5, 5), (7, 7)]),
        ((7, 7), [(3, 3), (5, 5), (7, 7)]),
        ((1, 1), [(3, 3), (5, 5), (7, 7)]),
        ((4, 4), [(2, 2), (4, 4), (6, 6)]),
        ((1, 5), [(1, 3), (1, 5), (1, 7)]),
        ((2, 1), [(2, 1), (4, 1), (6, 1)]),
        ((3, 4), [(3, 2), (5, 4), (7, 6)]),
    ],
)
def test_scales_keep_the_parity_of_each_axis(kernel: tuple[int, int], boxes: list[tuple[int, int]]) -> None:
    assert scale_boxes(kernel, 3) == boxes


def test_the_window_holds_kernel_and_scales() -> None:
    assert window_size((11, 3), 3) == (11, 7)
    assert window_size((3, 3), 1) == (3, 3)


def test_the_papers_first_six_elements_of_a_5x5_box() -> None:
    # Appendix A.2: J_0, J_1 twice, J_2 twice, J_0 again, by their zeros 2.40, 3.83, 5.14, 5.52.
    y, x = torch.meshgrid(torch.arange(-2, 3), torch.arange(-2, 3), indexing="ij")
    radius, angle = (y**2 + x**2).double().sqrt() / 2.5, torch.atan2(y.double(), x.double())
    orders = [
        (0, 1, torch.cos),
        (1, 1, torch.cos),
        (1, 1, torch.sin),
        (2, 1, torch.cos),
        (2, 1, torch.sin),
        (0, 2, torch.cos),
    ]
    for got, (order, index, wave) in zip(fourier_bessel((5, 5), 6), orders, strict=True):
        radial = torch.from_numpy(jv(order, (jn_zeros(order, index)[-1] * radius).numpy()))
        expected = radial * wave(order * angle) * (radius <= 1)
        torch.testing.assert_close(got, expected / expected.norm())


@pytest.mark.parametrize("box", [(3, 3), (5, 5), (7, 7), (4, 4), (6, 6), (1, 7), (5, 3)])
def test_elements_are_independent_unit_vectors_inside_the_disc(box: tuple[int, int]) -> None:
    elements = fourier_bessel(box, 6).flatten(1)
    torch.testing.assert_close(elements.norm(dim=1), torch.ones(len(elements), dtype=torch.float64))
    assert torch.linalg.matrix_rank(elements, rtol=1e-3) == len(elements)
    y, x = torch.meshgrid(*((torch.arange(n) - (n - 1) / 2) / (n / 2) for n in box), indexing="ij")
    assert torch.all(elements[:, (y**2 + x**2).flatten() > 1] == 0)


@pytest.mark.parametrize(
    ("box", "dimensions"), [((3, 3), 9), ((2, 2), 4), ((1, 3), 3), ((1, 5), 5), ((5, 5), 21), ((7, 7), 37)]
)
def test_a_box_gives_as_many_elements_as_its_disc_has_points(box: tuple[int, int], dimensions: int) -> None:
    assert len(fourier_bessel(box, 1000)) == dimensions


def test_passed_over_elements_leave_room_for_the_next() -> None:
    # On a 2×2 box cos 2θ vanishes and every J_0 is constant: three of the first six are no use, only four dimensions exist.
    assert len(fourier_bessel((2, 2), 6)) == 4
    assert len(fourier_bessel((1, 5), 4)) == 4


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_basis_is_centred_in_its_window(kernel: tuple[int, int]) -> None:
    psi = basis_elements(kernel, 3, 6)
    assert tuple(psi.shape[1:]) == window_size(kernel, 3)
    assert torch.equal(psi, basis_elements(kernel, 3, 6))
    # Fourier-Bessel elements are even or odd about the center.
    turned = psi.flip(1, 2)
    assert all(torch.allclose(a, b) or torch.allclose(a, -b) for a, b in zip(psi, turned, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_fitting_elements_vanish_outside_the_kernel(kernel: tuple[int, int]) -> None:
    psi, count = basis_elements(kernel, 3, 6), fitting_elements(kernel, 3, 6)
    inside = centered(centered(psi, kernel), window_size(kernel, 3))
    assert torch.equal(inside[:count], psi[:count])
    assert all(not torch.equal(a, b) for a, b in zip(inside[count:], psi[count:], strict=True))
