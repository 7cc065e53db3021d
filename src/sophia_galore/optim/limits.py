"""Limits on gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

LARGEST_GRAD = 1e15
"""Gradients with larger entries are refused like infinite ones: sums of their squares leave float32."""


def is_usable(grad: Tensor) -> Tensor:
    """Whether all entries of a gradient are finite and not absurdly large.

    Args:
        grad: Any shape, with an element.

    Returns:
        Scalar, bool. The extremes are NaN if any entry is, and need no temporary of the gradient's size.
    """
    return (torch.stack(torch.aminmax(grad)).abs() <= LARGEST_GRAD).all()


def grad_norm(grads: Iterable[Tensor]) -> float:
    """The Euclidean norm of several gradients taken as one vector.

    Args:
        grads: float32 tensors of any shapes.

    Returns:
        The norm; NaN or infinite if a gradient is.
    """
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
    return float(torch.linalg.vector_norm(torch.stack(norms), dtype=torch.float64)) if norms else 0.0


def clip_(grads: Iterable[Tensor], norm: float, max_norm: float) -> None:
    """Scale gradients in place so that their common norm is at most `max_norm`.

    Args:
        grads: The gradients that `norm` was taken of.
        norm: Their norm.
        max_norm: The limit; 0: no limit.
    """
    if 0 < max_norm < norm:
        for grad in grads:
            grad.mul_(max_norm / norm)
