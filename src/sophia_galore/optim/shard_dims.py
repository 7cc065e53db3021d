"""Which dimension of a matrix `fully_shard` (FSDP2) should cut, so that little is sent at a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from sophia_galore.errors import ArgumentError
from sophia_galore.numerics.subspace import projection_side

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard


def shard_placement(num_processes: int) -> Callable[[nn.Parameter], Shard | None]:
    """Return a `shard_placement_fn` for `fully_shard` that cuts the longer dimension of each matrix.

    A matrix is projected on its shorter side. If the longer dimension is cut, each process projects its own part of the
    gradient, and moves its own part of the weight: between two refreshes of the basis, nothing is sent but the basis
    itself. If the shorter one is cut, as `fully_shard` does by itself with wide matrices, products and directions of
    `rank` rows are sent too. Both give the same weights, but for rounding. torch needs extra copies in forward and
    backward for matrices that are cut by columns.

    Args:
        num_processes: Number of processes that share a parameter.

    Returns:
        A function of a parameter, for `fully_shard(..., shard_placement_fn=...)`.

    Raises:
        ArgumentError: `num_processes` is not a positive whole number.
    """
    if not isinstance(num_processes, int) or num_processes < 1:
        raise ArgumentError(
            f"shard_placement got num_processes={num_processes!r}.",
            "Give the number of processes that share a parameter, such as mesh.size().",
        )

    def place(param: nn.Parameter) -> Shard | None:
        from torch.distributed.tensor import Shard

        # torch cuts columns only into equal parts.
        is_wide = param.ndim == 2 and projection_side(param.shape) == "left"
        return Shard(1) if is_wide and param.shape[1] % num_processes == 0 else None

    return place
