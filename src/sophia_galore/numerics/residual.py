"""Scale the part of a gradient outside the subspace, or the full gradient, by the rule's effect inside it.

The rule turns the projected gradient R into a direction N. If it scales a channel of R (a row of a tall matrix, a
column of a wide one) by a factor s, the same factor is applied to that channel of the full gradient:

    Fira (arXiv 2410.01623, equations 6 to 9)      N P^T + s * (G - R P^T), growth of the second term limited
    APOLLO (arXiv 2412.05270, equation 5)          s * G, growth limited
    APOLLO-Mini (the same, section 4.2)            s * G with one s for the whole matrix
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sophia_galore.numerics.subspace import Side

Residual = Literal["none", "fira", "channel", "tensor"]


def channel_scales(direction: Tensor, projected: Tensor, side: Side) -> Tensor:
    """Return the factor by which the rule scaled each channel: |N_i| / |R_i|, 0 where R_i is 0.

    Args:
        direction: N, (m, r) for side right, (r, n) for side left.
        projected: R, of the same shape.
        side: The side of the projection.

    Returns:
        (m, 1) or (1, n).
    """
    along = 1 if side == "right" else 0
    before = torch.linalg.vector_norm(projected, dim=along, keepdim=True)
    after = torch.linalg.vector_norm(direction, dim=along, keepdim=True)
    return torch.where(before > 0, after / before, 0.0)


def residual_norm(grad: Tensor, projected: Tensor, gram: Tensor, scales: Tensor, side: Side) -> Tensor:
    """Return the norm of s * (G - R P^T) (side right) or (G - P R) * s (side left), without forming it.

    Channel by channel, |g - R P^T|^2 = |g|^2 - 2 |R|^2 + R P^T P R^T, since g P = R.

    Args:
        grad: G, (m, n).
        projected: R, (m, r) or (r, n).
        gram: P^T P, (r, r): a basis that was rounded for storage is only nearly orthonormal.
        scales: s, (m, 1) or (1, n).
        side: The side of the projection.

    Returns:
        Scalar.
    """
    along = 1 if side == "right" else 0
    seen = projected @ gram if side == "right" else gram @ projected
    whole = torch.linalg.vector_norm(grad, dim=along, keepdim=True).square()
    left = whole - 2 * projected.square().sum(along, keepdim=True) + (seen * projected).sum(along, keepdim=True)
    norm: Tensor = (left.clamp_min_(0) * scales.square()).sum().sqrt()
    return norm


def scaled_norm(grad: Tensor, scales: Tensor, side: Side) -> Tensor:
    """Return the norm of s * G (side right: by rows; left: by columns), without forming it.

    Args:
        grad: G, (m, n).
        scales: s, (m, 1), (1, n) or (1, 1).
        side: The side of the projection.

    Returns:
        Scalar.
    """
    along = 1 if side == "right" else 0
    norm: Tensor = (torch.linalg.vector_norm(grad, dim=along, keepdim=True) * scales).square().sum().sqrt()
    return norm


def growth_factor(norm: Tensor, previous: Tensor, limit: float) -> Tensor:
    """Return the factor that keeps a norm at most `limit` times the previous one (Fira, equation 9).

    Args:
        norm: Scalar, the norm now.
        previous: Scalar, the norm that was used last; 0: there was none.
        limit: gamma, such as 1.01; 0: no limit.

    Returns:
        Scalar in (0, 1].
    """
    if not limit:
        return torch.ones_like(norm)
    return torch.where((previous > 0) & (norm > limit * previous), limit * previous / norm, 1.0)
