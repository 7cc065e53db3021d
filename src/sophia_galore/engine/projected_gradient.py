"""A projected gradient, added up from the gradient's factors; the gradient itself is never formed.

A weight W of shape (m, n) that maps x (T, n) to x W^T has the gradient G = d^T x, with d (T, m) the gradient
with respect to its output. Where only G A or A^T G is wanted, the order of multiplication is free:

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
        device: Where the factors are.
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
        # Zeros that nothing was added to are no gradient.
        self.touched = False

    @property
    def sum(self) -> Tensor:
        """The sum, float32; there from when it is first asked for, since in forward it is not needed yet."""
        if self._sum is None:
            self._sum = torch.zeros(self._size, dtype=torch.float32, device=self._device)
        return self._sum

    def narrow(self) -> None:
        """Nothing is added for a while: the sum takes as little memory as bfloat16 does until it is taken up again.

        One rounding by 2^-9 of each entry, once a step: less than what half-precision factors are rounded by.
        """
        self._sum = self.sum.to(torch.bfloat16)

    def widen(self) -> None:
        """More is going to be added."""
        self._sum = self.sum.float()

    @property
    def saves_less(self) -> bool:
        """Whether what `save_input` gives is smaller than the input."""
        return self._right

    def save_input(self, entering: Tensor) -> Tensor:
        """What `add` will need of the weight's input.

        Args:
            entering: x, (T, n).

        Returns:
            Side right: x A, (T, k). Side left: x.
        """
        return entering @ self._matrix if self._right else entering

    def add(self, out_grad: Tensor, kept: Tensor, outputs: slice = _ALL) -> None:
        """Add the term of some tokens, and of some of the outputs.

        Args:
            out_grad: d, (T, number of outputs), the other outputs' columns left out.
            kept: What `save_input` gave for the same tokens.
            outputs: Which of the m outputs.
        """
        left = out_grad if self._right else out_grad @ self._matrix[outputs]
        total = self.sum[outputs] if self._right else self.sum
        if kept.dtype == torch.float32:
            total.addmm_(left.T, kept)
        else:
            total.add_(left.T @ kept)
        self.touched = True

    def add_rows(self, rows: Tensor, grads: Tensor) -> None:
        """Add the term of a gradient of which only some rows are not zero, such as an embedding's.

        Args:
            rows: (U,) int64, different row numbers.
            grads: (U, n), those rows, in the precision of the factors.
        """
        if self._right:
            self.sum.index_add_(0, rows, grads @ self._matrix)
        else:
            self.sum.addmm_(self._matrix[rows].T, grads)
        self.touched = True

    def add_whole(self, grad: Tensor) -> None:
        """Add the term of a gradient that was formed after all.

        Args:
            grad: (m, n), any float dtype.
        """
        self.sum.add_(self._projector.of(grad.float()))
        self.touched = True


@dataclass(frozen=True)
class LazyTerms:
    """An `LazyGradient`: a gradient that is known by how its terms are added up in a product.

    Args:
        shape: (m, n), the weight's shape.
        device: Where the factors are.
        add_to: Adds all terms to an empty float32 product; may be asked again.
    """

    shape: torch.Size
    device: torch.device
    add_to: Callable[[ProjectedSum], None]

    def of(self, projector: Projector) -> Tensor:
        """G A, (m, k), or A^T G, (k, n), float32."""
        product = ProjectedSum(projector, self.shape, torch.float32, self.device)
        self.add_to(product)
        return product.sum
