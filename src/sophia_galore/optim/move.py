"""The last step of every route: a weight moves along a direction, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sophia_galore.numerics.rounding import write_rounded
from sophia_galore.optim.state import ROW_ALIGNMENT

# Elements of a tensor that are worked on at once: 16 MiB of float32.
_BLOCK_ELEMENTS = 1 << 22


def row_blocks(tensor: Tensor) -> Iterator[slice]:
    """Slices over the first dimension, each of about `_BLOCK_ELEMENTS` elements at most.

    They begin at multiples of `ROW_ALIGNMENT`, so the smallest one has that many rows.
    """
    num_rows = tensor.shape[0]
    columns = max(1, tensor.numel() // max(1, num_rows))
    step = max(1, _BLOCK_ELEMENTS // columns // ROW_ALIGNMENT) * ROW_ALIGNMENT
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def move(weight: Tensor, direction: Tensor, rate: float, weight_decay: float, rounding: torch.Generator) -> None:
    """weight <- round((1 - rate * weight_decay) weight - rate * direction), in place.

    Args:
        weight: Rows of the stored weight, float32 or bfloat16.
        direction: float32, of the same shape.
        rate: Learning rate.
        weight_decay: Decoupled decay.
        rounding: Where the bits of the rounding come from.
    """
    values = weight if weight.dtype == torch.float32 else weight.float()
    if weight_decay:
        values.mul_(1 - rate * weight_decay)
    values.sub_(direction, alpha=rate)
    if values is not weight:
        write_rounded(weight, values, rounding)
