"""A product with a gradient, added up from the gradient's factors; the gradient itself is never formed.

A weight W of shape (m, n) that maps x (T, n) to x W^T has the gradient G = d^T x, with d (T, m) the gradient by
its output. Where only G A or A^T G is wanted, the order of multiplication is free:

    side right, A is (n, k):  G A   = d^T (x A)      k (n + m) T operations instead of m n T, and only x A is kept
    side left,  A is (m, k):  A^T G = (d A)^T x
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sophia_galore.numerics.subspace import Projector

# For a parameter's name: what its gradient is wanted times; None: the gradient itself is wanted.
Projectors = Callable[[str], Projector | None]


def whole_gradients(name: str) -> Projector | None:
    """The `Projectors` that project nothing."""
    return None


class Product:
    """G A or A^T G of one weight, a float32 sum over micro-batches or chunks of tokens.

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
        size = (shape[0], rank) if self._right else (rank, shape[1])
        self.sum = torch.zeros(size, dtype=torch.float32, device=device)
        # Zeros that nothing was added to are no gradient.
        self.touched = False

    def keep(self, entering: Tensor) -> Tensor:
        """What `add` will need of the weight's input.

        Args:
            entering: x, (T, n).

        Returns:
            Side right: x A, (T, k). Side left: x.
        """
        return entering @ self._matrix if self._right else entering

    def add(self, out_grad: Tensor, kept: Tensor) -> None:
        """Add the term of some tokens.

        Args:
            out_grad: d, (T, m).
            kept: What `keep` gave for the same tokens.
        """
        left = out_grad if self._right else out_grad @ self._matrix
        if kept.dtype == torch.float32:
            self.sum.addmm_(left.T, kept)
        else:
            self.sum.add_(left.T @ kept)
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
