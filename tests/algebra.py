"""Algebra that only tests need: the source adds what comes back from a subspace in place."""

from __future__ import annotations

from torch import Tensor

from sophia_galore.numerics.subspace import Side


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
