"""Compute the basis P of a subspace: r orthonormal columns on the shorter side of a gradient.

svd         the leading singular vectors: GaLore's choice, and the reference
randomized  nearly the same from a random sketch, without a decomposition of the shorter side
tracked     one power iteration that starts from the last basis: three products and two QRs
random      a function of the seed: it needs no gradient and no storage

randomized and tracked only use products with the gradient, which need not be formed.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sophia_galore.numerics.decompositions import leading_eigenvectors, orthonormal
from sophia_galore.numerics.subspace import Grad, Projector, Side, projection_side

BasisKind = Literal["svd", "randomized", "tracked", "random", "gaussian"]

# Number of rows converted to float64 at once: limits the temporary of `_gram` to 32 MiB at 1024 columns.
_GRAM_ROWS = 4096

# Sketch columns beyond the rank: Halko, Martinsson & Tropp (arXiv 0909.4061, section 4.2) find 5 to 10 enough.
_OVERSAMPLING = 8


def svd_basis(grad: Tensor, rank: int) -> Tensor:
    """Return the `rank` leading singular vectors of the shorter side of `grad`.

    They are the leading eigenvectors of G^T G (or G G^T), computed in float64: the product squares the condition
    number, and float64 keeps the precision of a float32 SVD. This takes a fraction of the time of an SVD, without the
    singular vectors of the long side. The largest entry of each vector is positive, so that the same gradient gives the
    same basis.

    Args:
        grad: (m, n), any float dtype, finite.
        rank: Number of vectors, at most min(m, n).

    Returns:
        (min(m, n), rank), float32, orthonormal columns.
    """
    vectors = leading_eigenvectors(_gram(_tall(grad)), rank)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    basis: Tensor = (vectors * largest.sign()).to(torch.float32)
    return basis


def randomized_basis(grad: Grad, rank: int, generator: torch.Generator) -> Tensor:
    """Approximate the leading singular vectors by a random sketch (Halko et al., arXiv 0909.4061, algorithms 4.1, 5.1).

    It captures at least 99.5% of the part of |G|^2 that the leading singular vectors capture if singular values fall
    like 1 / k, and 89% if they fall slowly (like k^-0.5, rank 4).

    Args:
        grad: (m, n), float32, finite; two products with it are computed.
        rank: Number of vectors, at most min(m, n).
        generator: Draws the sketch; on the device of `grad`.

    Returns:
        (min(m, n), rank), float32, orthonormal columns.
    """
    short = min(grad.shape)
    sketch = torch.randn(short, min(short, rank + _OVERSAMPLING), generator=generator, device=grad.device)
    small = _short_product(grad, _left_factor(grad, sketch))  # (rank + p, short)
    # In float64, since squares overflow float32 from 1e19 on.
    vectors = leading_eigenvectors(_gram(small.T), rank)
    return orthonormal(small.T @ vectors.to(torch.float32))


def tracked_basis(grad: Grad, basis: Tensor) -> Tensor:
    """Update the basis by one step of subspace iteration (Golub & Van Loan, section 8.2.4).

    U = orth(G P), new P = orth(G^T U); for a wide G the same with G^T.

    Args:
        grad: (m, n), float32, finite; two products with it are computed.
        basis: (min(m, n), r), the current basis.

    Returns:
        (min(m, n), r), float32, orthonormal columns.
    """
    left = _left_factor(grad, basis)
    if isinstance(grad, Tensor):
        return orthonormal(_tall(grad).T @ left)
    return orthonormal(_short_product(grad, left).T)


def random_basis(short: int, rank: int, generator: torch.Generator) -> Tensor:
    """Draw a uniformly random subspace.

    Args:
        short: Rows.
        rank: Columns, at most `short`.
        generator: Draws it.

    Returns:
        (short, rank), float32, orthonormal columns, on the generator's device.
    """
    return orthonormal(torch.randn(short, rank, generator=generator, device=generator.device))


def gaussian_basis(short: int, rank: int, generator: torch.Generator) -> Tensor:
    """Draw APOLLO's random projection (arXiv 2412.05270, section 4.1): entries of variance 1 / rank, not orthonormal.

    Args:
        short: Rows.
        rank: Columns.
        generator: Draws it.

    Returns:
        (short, rank), float32, on the generator's device.
    """
    return torch.randn(short, rank, generator=generator, device=generator.device).div_(rank**0.5)


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Return the overlap of two subspaces: the mean squared cosine of their principal angles.

    Args:
        one: (k, r), orthonormal columns.
        other: (k, r), orthonormal columns.

    Returns:
        Scalar: 1 for the same subspace whatever its basis, 0 for orthogonal ones, about r / k for random ones.
    """
    return (one.T @ other).square().sum() / one.shape[1]


def _left_factor(grad: Grad, columns: Tensor) -> Tensor:
    """U = orth(G A) for a tall G, and for a wide one orth(G^T A): (longer side, k)."""
    if isinstance(grad, Tensor):
        return orthonormal(_tall(grad) @ columns)
    side = projection_side(grad.shape)
    product = grad.of(Projector(columns, side))
    return orthonormal(product if side == "right" else product.T)


def _short_product(grad: Grad, left: Tensor) -> Tensor:
    """U^T G for a tall G, and for a wide one (G U)^T: (k, shorter side)."""
    if isinstance(grad, Tensor):
        return left.T @ _tall(grad)
    other: Side = "left" if projection_side(grad.shape) == "right" else "right"
    product = grad.of(Projector(left, other))
    return product if other == "left" else product.T


def _tall(grad: Tensor) -> Tensor:
    return grad if projection_side(grad.shape) == "right" else grad.T


def _gram(tall: Tensor) -> Tensor:
    """Return a^T A of a tall matrix in float64, by blocks of rows, so that no full-size float64 copy exists."""
    columns = tall.shape[1]
    gram = torch.zeros(columns, columns, dtype=torch.float64, device=tall.device)
    for block in tall.split(_GRAM_ROWS):
        wide = block.to(torch.float64)
        gram.addmm_(wide.T, wide)
    return gram
