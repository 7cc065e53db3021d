"""The subspace on which a gradient is projected.

For a gradient G of shape (m, n) the basis P holds the r leading singular vectors of the shorter
side as orthonormal columns (GaLore, arXiv 2403.03507, section 3 and algorithm 1):

    m >= n: side "right", P is (n, r), the projected gradient is R = G P, of shape (m, r)
    m <  n: side "left",  P is (m, r), the projected gradient is R = P^T G, of shape (r, n)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Side = Literal["left", "right"]


def projection_side(shape: tuple[int, int] | torch.Size) -> Side:
    """Return the side on which a matrix of this shape is projected: the shorter one."""
    return "right" if shape[0] >= shape[1] else "left"


def basis_shape(shape: tuple[int, int] | torch.Size, rank: int) -> tuple[int, int]:
    """Return the shape of the basis for a gradient: (shorter side, rank)."""
    return (min(shape), rank)


def projected_shape(shape: tuple[int, int] | torch.Size, rank: int) -> tuple[int, int]:
    """Return the shape of the projected gradient."""
    return (shape[0], rank) if projection_side(shape) == "right" else (rank, shape[1])


class LazyGradient(Protocol):
    """A gradient G of shape (m, n) that is not formed; only products with it can be computed."""

    @property
    def shape(self) -> torch.Size:
        """(m, n)."""

    @property
    def device(self) -> torch.device:
        """Device of the products."""

    def of(self, projector: Projector) -> Tensor:
        """Return the product with a known matrix, float32.

        Args:
            projector: A and its side.

        Returns:
            G A, (m, k), or A^T G, (k, n).
        """


@dataclass(frozen=True, eq=False)
class MultipliedBy:
    """A `LazyGradient` like another one, whose products a function computes.

    Args:
        gradient: The other one.
        of: Returns the product with a projector, as `LazyGradient.of` does.
    """

    gradient: LazyGradient
    of: Callable[[Projector], Tensor]

    @property
    def shape(self) -> torch.Size:
        """(m, n)."""
        return self.gradient.shape

    @property
    def device(self) -> torch.device:
        """Device of the products."""
        return self.gradient.device


Grad = Tensor | LazyGradient
"""A gradient with which products are computed: formed or not."""


@dataclass(frozen=True, eq=False)
class Projector:
    """A matrix whose product with a gradient G of shape (m, n) is needed instead of G.

    Args:
        matrix: A. Side right: (n, k), the product is G A, (m, k). Side left: (m, k), the product is A^T G, (k, n).
        side: The side.
    """

    matrix: Tensor
    side: Side

    def of(self, grad: Grad) -> Tensor:
        """Return the product for a gradient: G A or A^T G."""
        if not isinstance(grad, Tensor):
            return grad.of(self)
        return grad @ self.matrix if self.side == "right" else self.matrix.T @ grad


@dataclass(frozen=True, eq=False)
class ProjectedGradient:
    """A gradient of which only a product was formed.

    Args:
        product: G A or A^T G, float32, where the first columns of A are the basis.
        norm: The Euclidean norm of G, float32 without dimensions; None: the norm of the product estimates it.
    """

    product: Tensor
    norm: Tensor | None = None


Gradient = Tensor | ProjectedGradient
"""A finished gradient: the whole one, or its product with the requested projector."""


def tensor_of(gradient: Gradient) -> Tensor:
    """Return the tensor of a gradient."""
    return gradient.product if isinstance(gradient, ProjectedGradient) else gradient


def norm_of(gradient: Gradient) -> Tensor:
    """Return the Euclidean norm of a gradient, float32 without dimensions; an estimate if only a product is known."""
    if isinstance(gradient, ProjectedGradient) and gradient.norm is not None:
        return gradient.norm
    norm: Tensor = torch.linalg.vector_norm(tensor_of(gradient), dtype=torch.float32)
    return norm


def project(grad: Tensor, basis: Tensor) -> Tensor:
    """Project a gradient: R = G P (side right) or P^T G (side left).

    Args:
        grad: (m, n), float32.
        basis: (min(m, n), r), float32.

    Returns:
        (m, r) or (r, n), float32.
    """
    return grad @ basis if projection_side(grad.shape) == "right" else basis.T @ grad
