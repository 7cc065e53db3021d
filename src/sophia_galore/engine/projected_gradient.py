"""Projected gradients, computed from the factors of a gradient without forming the gradient itself.

A weight W of shape (m, n) that maps x (T, n) to x W^T has the gradient G = d^T x, with d (T, m) the gradient
with respect to its output. If only G A or A^T G is needed, the products can be computed in a cheaper order:

    side right, A is (n, k):  G A   = d^T (x A)      k (n + m) T operations instead of m n T, and only x A is kept
    side left,  A is (m, k):  A^T G = (d A)^T x
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sophia_galore.numerics.subspace import Projector

_ALL = slice(None)


class ProjectedSum:
    """G A or A^T G of one weight: a float32 sum over micro-batches or chunks of tokens.

    Args:
        projector: A and its side.
        shape: (m, n), the weight's shape.
        dtype: Precision of the factors; A is rounded to it.
        device: Device of the factors.
    """

    def __init__(
        self, projector: Projector, shape: torch.Size, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        self._projector = projector
        self._matrix = projector.matrix.to(device=device, dtype=dtype)
        self._right = projector.side == "right"
        rank = self._matrix.shape[1]
        self._size, self._device = (shape[0], rank) if self._right else (rank, shape[1]), device
        self._sum: Tensor | None = None
        # Whether any term was added; without one the zeros are no gradient.
        self.touched = False

    @property
    def sum(self) -> Tensor:
        """The sum, float32; allocated at the first access, since forward does not need it."""
        if self._sum is None:
            self._sum = torch.zeros(self._size, dtype=torch.float32, device=self._device)
        return self._sum

    def take(self) -> Tensor:
        """Return the sum; the next one begins at zero."""
        total, self._sum, self.touched = self.sum, None, False
        return total

    def narrow(self) -> None:
        """Store the sum in bfloat16, to save memory until `widen`.

        This rounds each entry once per step, by a relative 2^-9: less than the rounding of half-precision factors.
        """
        self._sum = self.sum.to(torch.bfloat16)

    def widen(self) -> None:
        """Store the sum in float32 again, so that terms can be added."""
        self._sum = self.sum.float()

    @property
    def saves_less(self) -> bool:
        """Whether `save_input` returns a tensor smaller than the input."""
        return self._right

    def save_input(self, entering: Tensor) -> Tensor:
        """Return what `add` needs of the weight's input.

        Args:
            entering: x, (T, n).

        Returns:
            Side right: x A, (T, k). Side left: x.
        """
        return entering @ self._matrix if self._right else entering

    def add(self, out_grad: Tensor, kept: Tensor, outputs: slice = _ALL) -> None:
        """Add the term of T tokens and some of the m outputs.

        Args:
            out_grad: The columns of d for these outputs, (T, number of outputs).
            kept: From `save_input`, for the same tokens.
            outputs: The outputs, a slice of the weight's m rows.
        """
        left = out_grad if self._right else out_grad @ self._matrix[outputs]
        total = self.sum[outputs] if self._right else self.sum
        if kept.dtype == torch.float32:
            total.addmm_(left.T, kept)
        else:
            total.add_(left.T @ kept)
        self.touched = True

    def add_rows(self, rows: Tensor, grads: Tensor) -> None:
        """Add the term of a gradient with few nonzero rows, such as an embedding's.

        Args:
            rows: (U,) int64, distinct row numbers.
            grads: (U, n), these rows of the gradient, in the precision of the factors.
        """
        if self._right:
            self.sum.index_add_(0, rows, grads @ self._matrix)
        else:
            self.sum.addmm_(self._matrix[rows].T, grads)
        self.touched = True

    def add_whole(self, grad: Tensor) -> None:
        """Add the term of a full gradient.

        Args:
            grad: (m, n), any float dtype.
        """
        self.sum.add_(self._projector.of(grad.float()))
        self.touched = True


@dataclass(frozen=True)
class LazyTerms:
    """A `LazyGradient` that computes its products from the terms of the gradient, each time anew.

    Args:
        shape: (m, n), the weight's shape.
        device: Device of the factors.
        add_to: Adds all terms to an empty float32 product; may be called several times.
    """

    shape: torch.Size
    device: torch.device
    add_to: Callable[[ProjectedSum], None]

    def of(self, projector: Projector) -> Tensor:
        """Compute G A, (m, k), or A^T G, (k, n), in float32."""
        product = ProjectedSum(projector, self.shape, torch.float32, self.device)
        self.add_to(product)
        return product.sum
