"""The subspace that a gradient is projected on.

For a gradient G of shape (m, n) the basis P holds the r leading singular vectors of the shorter
side as orthonormal columns (GaLore, arXiv 2403.03507, section 3 and algorithm 1):

    m >= n: side "right", P is (n, r), the projected gradient is R = G P, of shape (m, r)
    m <  n: side "left",  P is (m, r), the projected gradient is R = P^T G, of shape (r, n)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Side = Literal["left", "right"]

# Rows that are turned to float64 at once: bounds the temporary of `_gram` to 32 MiB at 1024 columns.
_GRAM_ROWS = 4096


def projection_side(shape: tuple[int, int] | torch.Size) -> Side:
    """The side on which a matrix of this shape is projected: the shorter one."""
    return "right" if shape[0] >= shape[1] else "left"


def basis_shape(shape: tuple[int, int] | torch.Size, rank: int) -> tuple[int, int]:
    """Shape of the basis for a gradient of `shape`: (shorter side, rank)."""
    return (min(shape), rank)


def projected_shape(shape: tuple[int, int] | torch.Size, rank: int) -> tuple[int, int]:
    """Shape of the projected gradient for a gradient of `shape`."""
    return (shape[0], rank) if projection_side(shape) == "right" else (rank, shape[1])


def svd_basis(grad: Tensor, rank: int) -> Tensor:
    """The `rank` leading singular vectors of the shorter side of `grad`.

    They are the leading eigenvectors of G^T G (or G G^T), formed and decomposed in float64: that
    squares the condition number, so float64 keeps what a float32 SVD would give, at a fraction of its time
    and without the long side's singular vectors. The sign of each vector is fixed (its largest
    entry is positive), so that the same gradient gives the same basis.

    Args:
        grad: (m, n), any float dtype, finite.
        rank: Number of vectors, at most min(m, n).

    Returns:
        (min(m, n), rank), float32, orthonormal columns.
    """
    tall = grad if projection_side(grad.shape) == "right" else grad.T
    # eigh sorts ascending: the last columns are the leading ones.
    vectors = torch.linalg.eigh(_gram(tall)).eigenvectors[:, -rank:].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    basis: Tensor = (vectors * largest.sign()).to(torch.float32)
    return basis


@dataclass(frozen=True, eq=False)
class Projector:
    """What a gradient G of shape (m, n) is wanted times, where G itself is not wanted.

    Args:
        matrix: A. Side right: (n, k), the product is G A, (m, k). Side left: (m, k), the product is A^T G, (k, n).
        side: The side.
    """

    matrix: Tensor
    side: Side

    def of(self, grad: Tensor) -> Tensor:
        """The product for a gradient that was formed."""
        return grad @ self.matrix if self.side == "right" else self.matrix.T @ grad


def project(grad: Tensor, basis: Tensor) -> Tensor:
    """R = G P (side right) or P^T G (side left).

    Args:
        grad: (m, n), float32.
        basis: (min(m, n), r), float32.

    Returns:
        (m, r) or (r, n), float32.
    """
    return grad @ basis if projection_side(grad.shape) == "right" else basis.T @ grad


def project_back(projected: Tensor, basis: Tensor, side: Side) -> Tensor:
    """The full-size matrix R P^T (side right) or P R (side left).

    Args:
        projected: (m, r) or (r, n).
        basis: (min(m, n), r).
        side: The side of the projection.

    Returns:
        (m, n), the dtype of the arguments.
    """
    return projected @ basis.T if side == "right" else basis @ projected


def _gram(tall: Tensor) -> Tensor:
    """A^T A of a tall matrix in float64, by blocks of rows, so that no full-size float64 copy exists."""
    columns = tall.shape[1]
    gram = torch.zeros(columns, columns, dtype=torch.float64, device=tall.device)
    for block in tall.split(_GRAM_ROWS):
        wide = block.to(torch.float64)
        gram.addmm_(wide.T, wide)
    return gram
