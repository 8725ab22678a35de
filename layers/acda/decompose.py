"""Kernels as atoms times coefficients: exact and truncated decompositions, and atoms expanded in a basis.

W (C_out, C/g, k_h, k_w) = Σ_a coeff (C_out, C/g, a) · atoms (a, k_h, k_w). All tensors created here are float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.layers.geometry import ConvGeometry
from surgeon.layers.source import ConvSource

# Number of pixels used by the activation-aware truncation, and the minimum per unknown of an output channel.
_PIXELS = 8192
_PIXELS_PER_UNKNOWN = 4
# Ridge of the refit, relative to the mean energy of a feature; it pulls toward the starting point. Measured on whole networks
# (ResNet-20, SqueezeNet at m = 4 and 6): 1.0 leaves up to 14 % more output error, 0.01 gains nothing on held-out images.
_RIDGE = 0.1
# Basis directions weaker than this share of the strongest are ignored: coefficients stay below about 20.
_WEAK_DIRECTION = 0.05


@dataclass(frozen=True)
class Decomposition:
    """Orthonormal atoms (M, k_h, k_w), strongest first, and coefficients (C_out, C/g, M)."""

    atoms: Tensor
    coeff: Tensor

    @property
    def rank(self) -> int:
        return self.atoms.shape[0]

    def weight(self) -> Tensor:
        """The kernel that they form, (C_out, C/g, k_h, k_w)."""
        return torch.einsum("oca,ahw->ochw", self.coeff, self.atoms)


def decompose(weight: Tensor, rank: int | None = None) -> Decomposition:
    """Atoms by energy: the eigenvectors of WᵀW, W as (C_out·C/g, k_h·k_w).

    Without `rank`, exact to the precision of the weight: only atoms that together hold less than that are dropped, so
    the rank is that of the kernel. With `rank`, at most that many atoms: the best approximation of the weight.
    """
    rows = weight.detach().double().flatten(2)
    _, atoms = torch.linalg.eigh(torch.einsum("oct,ocs->ts", rows, rows))
    # The basis is complete: rows @ atoms is exact however accurate the eigenvectors are.
    atoms = atoms.flip(1)
    coeff = rows @ atoms
    energy = coeff.square().sum((0, 1))
    precision = max(
        min(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps), 16 * torch.finfo(rows.dtype).eps
    )
    left_out = energy.flip(0).cumsum(0).flip(0)
    kept = int((left_out > precision**2 * energy.sum()).sum())
    kept = min(kept, rows.shape[0] * rows.shape[1], kept if rank is None else rank)
    return Decomposition(atoms[:, :kept].t().reshape(kept, *weight.shape[2:]), coeff[:, :, :kept])


# --- activation-aware truncation -------------------------------------------------------------------------------------


@torch.no_grad()
def truncate_for_inputs(source: ConvSource, rank: int, x: Tensor, x_exact: Tensor | None = None) -> Decomposition:
    """At most `rank` atoms, chosen to minimize the output error on the inputs x (N, C, H, W).

    Atoms and coefficients minimize the error of the weight, weighted by the spatial covariance of the patches of x
    ((k_h·k_w)², the mean over the channels) and by the energy of each channel; then the coefficients are refitted by least
    squares on patches of x. With `x_exact`, the input that the layer would get if nothing before it had been truncated, the
    target is the convolution's output on `x_exact`, so the layer corrects errors of earlier ones.
    Never worse on x than the plain truncation, which is returned if nothing beats it.
    """
    plain = decompose(source.weight, rank)
    patches = list(_sample_patches(source, x, plain.rank))
    if plain.rank == 0 or not any(bool(patch.any()) for patch in patches):
        return plain
    wanted = patches if x_exact is None else list(_sample_patches(source, x_exact, plain.rank))
    weighted = _weighted(source.weight, patches, plain.rank)
    candidates = [plain, weighted, *(_refit(source, start, patches, wanted) for start in (plain, weighted))]
    errors = [output_error(source, candidate.weight(), x, x_exact) for candidate in candidates]
    return candidates[errors.index(min(errors))]


@torch.no_grad()
def output_error(source: ConvSource, weight: Tensor, x: Tensor, x_exact: Tensor | None = None) -> float:
    """‖y − ŷ‖ / ‖y‖: y is the convolution's output on `x_exact` (default: x), ŷ the output on x with `weight`; without bias."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    right = replace(source, weight=source.weight.to(dtype), bias=None)
    other = replace(source, weight=weight.to(dtype), bias=None)
    wrong = replace(source, weight=(source.weight.double() - weight).to(dtype), bias=None)
    error = total = 0.0
    for i in range(len(x)):
        image = x[i : i + 1].detach().to(dtype)
        y = right.conv2d(image if x_exact is None else x_exact[i : i + 1].detach().to(dtype))
        difference = wrong.conv2d(image) if x_exact is None else y - other.conv2d(image)
        error += float(difference.double().square().sum())
        total += float(y.double().square().sum())
    return (error / total) ** 0.5 if total > 0 else 0.0


def _sample_patches(source: ConvSource, x: Tensor, rank: int) -> Iterator[Tensor]:
    """Evenly spread patches of each image of x, (C, k_h·k_w, pixels)."""
    g = source.geometry
    wanted = max(_PIXELS, _PIXELS_PER_UNKNOWN * rank * source.weight.shape[1])
    if len(x) == 0:
        return
    out_h, out_w = g.output_size(x.shape[-2], x.shape[-1])
    count = min(out_h * out_w, -(-wanted // len(x)))
    at = torch.arange(count, device=x.device) * (out_h * out_w) // count
    for image in x.detach():
        windows = _windows(g, image, (out_h, out_w))
        chosen = windows[..., at // out_w, at % out_w]
        yield chosen.to(torch.float64).flatten(1, 2)


def _windows(g: ConvGeometry, image: Tensor, out: tuple[int, int]) -> Tensor:
    """View (C, k_h, k_w, H', W') of the padded image (C, H, W)."""
    mode = "constant" if g.padding_mode == "zeros" else g.padding_mode
    padded = F.pad(image[None], g.explicit_padding(image.shape[-2], image.shape[-1]), mode=mode)[0].contiguous()
    channel, row, column = padded.stride()
    return padded.as_strided(
        (len(image), *g.kernel_size, *out),
        (channel, g.dilation[0] * row, g.dilation[1] * column, g.stride[0] * row, g.stride[1] * column),
    )


def _weighted(weight: Tensor, patches: list[Tensor], rank: int) -> Decomposition:
    """Best approximation by `rank` atoms if the error is weighted by the patches' covariance and the channels' energy."""
    rows = weight.detach().double().flatten(2)
    zero = rows.new_zeros(())
    covariance = sum((torch.einsum("ctp,csp->ts", p, p) for p in patches), zero)
    energy = sum((p.square().sum((1, 2)) for p in patches), zero).sqrt()
    values, vectors = torch.linalg.eigh(covariance)
    root = values.clamp(min=float(values[-1]) * 1e-10).sqrt()
    c_group = rows.shape[1]
    groups = len(energy) // c_group
    whitened = rows @ (vectors * root)
    scaled = (whitened.view(groups, -1, c_group, len(root)) * energy.view(groups, 1, c_group, 1)).flatten(0, 2)
    _, directions = torch.linalg.eigh(scaled.t() @ scaled)
    directions = directions.flip(1)[:, :rank]
    span, triangle = torch.linalg.qr((vectors / root) @ directions)
    coeff = whitened @ directions @ triangle.t()
    return Decomposition(span.t().reshape(rank, *weight.shape[2:]), coeff)


def _refit(source: ConvSource, start: Decomposition, patches: list[Tensor], wanted: list[Tensor]) -> Decomposition:
    """Coefficients of the starting atoms by ridge regression on their residual, group by group.

    The target is the convolution's output for `wanted`, patches at the same positions.
    """
    c_out, c_group, rank = start.coeff.shape
    groups = source.geometry.groups
    right = source.weight.detach().double().flatten(2).reshape(groups, c_out // groups, -1)
    given = start.weight().flatten(2).reshape(groups, c_out // groups, -1)
    features = c_group * rank
    gram = right.new_zeros(groups, features, features)
    target = right.new_zeros(groups, features, c_out // groups)
    for patch, exact in zip(patches, wanted, strict=True):
        z = (start.atoms.flatten(1) @ patch).reshape(groups, features, -1)
        columns = patch.reshape(groups, -1, patch.shape[2])
        residual = right @ exact.reshape(columns.shape) - given @ columns
        gram.baddbmm_(z, z.transpose(1, 2))
        target.baddbmm_(z, residual.transpose(1, 2))
    energy = gram.diagonal(dim1=1, dim2=2).mean(1)
    ridge = _RIDGE * torch.maximum(energy, 1e-9 * energy.max())
    gram.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    change = torch.cholesky_solve(target, torch.linalg.cholesky(gram))
    change = change.transpose(1, 2).reshape(c_out, c_group, rank)
    return Decomposition(start.atoms, start.coeff + change)


# --- atoms in a basis --------------------------------------------------------------------------------------------------


def expand_in_basis(atoms: Tensor, basis: Tensor, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Expand atoms (m, …) in basis elements (K, …) plus as many extra, orthonormal ones as exactness requires.

    Returns the extra elements (e, …) and alpha (m, K + e). With `limit`, at most that many extra elements, those that
    contribute most; the rest is lost.
    """
    shape, atoms, basis = atoms.shape[1:], atoms.flatten(1), basis.flatten(1)
    left, strength, right = torch.linalg.svd(basis, full_matrices=False)
    strong = strength > _WEAK_DIRECTION * strength.max() if len(basis) else strength > 0
    left, strength, right = left[:, strong], strength[strong], right[strong]
    inside = atoms @ right.t()
    alpha = (inside / strength) @ left.t()
    rest = atoms - inside @ right
    _, size, directions = torch.linalg.svd(rest, full_matrices=False)
    extra = directions[size > 1e-12][:limit]
    return extra.reshape(-1, *shape), torch.cat([alpha, rest @ extra.t()], 1)
