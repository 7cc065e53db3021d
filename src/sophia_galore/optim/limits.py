"""Limits on gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sophia_galore.numerics.subspace import Gradient, norm_of

LARGEST_GRAD = 1e15
"""Gradients with larger entries are refused like infinite ones: sums of their squares overflow float32."""


def is_usable(grad: Tensor) -> Tensor:
    """Return whether all entries of a gradient are finite and at most `LARGEST_GRAD`.

    Args:
        grad: Any shape, not empty.

    Returns:
        A bool tensor without dimensions.
    """
    # The minimum and maximum are NaN if any entry is, and need no temporary of the gradient's size.
    return (torch.stack(torch.aminmax(grad)).abs() <= LARGEST_GRAD).all()


def grad_norm(grads: Iterable[Gradient]) -> float:
    """Compute the Euclidean norm of several gradients as one vector.

    Args:
        grads: float32, of any shapes; the norm of a projected one is exact if it is known, else an estimate.

    Returns:
        The norm; NaN or infinite if an entry is.
    """
    norms = [norm_of(grad) for grad in grads]
    return float(torch.linalg.vector_norm(torch.stack(norms), dtype=torch.float64)) if norms else 0.0


def clip_(grads: Iterable[Tensor], norm: float, max_norm: float) -> None:
    """Scale gradients in place so that their common norm is at most `max_norm`.

    Args:
        grads: The gradients.
        norm: Their common norm.
        max_norm: The limit; 0: no limit.
    """
    if 0 < max_norm < norm:
        for grad in grads:
            grad.mul_(max_norm / norm)
