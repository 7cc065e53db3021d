"""Transform moments to a new basis.

Moments in the subspace belong to the gradient's coordinates with respect to the old basis P. Without a transformation
to the new basis Q, they would be applied to other directions. With the change of basis C = P^T Q, coordinates r become
r C (side right) or C^T r (side left).
"""

from __future__ import annotations

from torch import Tensor

from sophia_galore.numerics.decompositions import pseudo_inverse
from sophia_galore.numerics.subspace import Side


def change_of_basis(old: Tensor, new: Tensor) -> Tensor:
    """Return the least-squares solution C of P C = Q, which is P^T Q for an orthonormal P.

    A basis that was rounded for storage is only nearly orthonormal. With four bits, diag(P^T P) is about 1.01 to 1.03,
    and P^T Q would make moments grow at every refresh, even if the subspace did not change; (P^T P)^-1 P^T Q does not.

    Args:
        old: P, (k, r), float32, columns independent, or all zero: there was no basis.
        new: Q, (k, r), float32.

    Returns:
        (r, r), float32; zero where P is.
    """
    return pseudo_inverse(old.T @ old) @ (old.T @ new)


def move_first_moment(moment: Tensor, change: Tensor, side: Side) -> Tensor:
    """Transform a mean of gradients to the new basis (LDAdam, arXiv 2410.16103, section 3.2): M C, or C^T M.

    Components outside the old subspace start at 0.

    Args:
        moment: (m, r) for side right, (r, n) for side left.
        change: (r, r), C from `change_of_basis`.
        side: The side of the projection.

    Returns:
        The shape of `moment`.
    """
    return moment @ change if side == "right" else change.T @ moment


def move_second_moment(moment: Tensor, change: Tensor, side: Side) -> Tensor:
    """Transform a mean of squared gradients to the new basis, V (C * C), assuming uncorrelated coordinates.

    If the old subspace contains a new direction only in part, the rest is the mean over the old directions: with 0, the
    first steps in that direction would be far too long.

    Args:
        moment: (m, r) or (1, r) for side right, (r, n) or (r, 1) for side left; not negative.
        change: (r, r), C from `change_of_basis`.
        side: The side of the projection.

    Returns:
        The shape of `moment`, not negative.
    """
    squares = change.square()
    unseen = (1 - squares.sum(0)).clamp_min_(0)
    if side == "right":
        return (moment @ squares).addcmul_(moment.mean(1, keepdim=True), unseen.unsqueeze(0))
    return (squares.T @ moment).addcmul_(unseen.unsqueeze(1), moment.mean(0, keepdim=True))
