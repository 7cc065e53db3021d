"""The last step of every route: a weight moves along a direction, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from sophia_galore.numerics.int8 import Stored, materialise
from sophia_galore.numerics.rounding import write_rounded
from sophia_galore.optim.state import ROW_ALIGNMENT

# Elements of a tensor that are worked on at once: 16 MiB of float32.
_BLOCK_ELEMENTS = 1 << 22
_most_blocks: ContextVar[int | None] = ContextVar("most_blocks", default=None)


def row_blocks(tensor: Stored) -> Iterator[slice]:
    """Slices over the first dimension, each of about `_BLOCK_ELEMENTS` elements at most.

    They begin at multiples of `ROW_ALIGNMENT`, so the smallest one has that many rows.
    """
    num_rows = tensor.shape[0]
    columns = max(1, tensor.numel() // max(1, num_rows))
    step = max(1, _BLOCK_ELEMENTS // columns // ROW_ALIGNMENT) * ROW_ALIGNMENT
    starts = range(0, num_rows, step)
    for start in starts[: _most_blocks.get()]:
        yield slice(start, min(start + step, num_rows))


@contextmanager
def two_blocks_of_each() -> Iterator[None]:
    """Inside the context the third block of rows and all later ones are left out.

    For who watches memory alone: each block leaves it as it found it, and what is left over from one may still be
    there while the next begins. Numbers are wrong.
    """
    token = _most_blocks.set(2)
    try:
        yield
    finally:
        _most_blocks.reset(token)


def opened(weight: Stored, rate: float, weight_decay: float) -> Tensor:
    """Rows of a weight in float32, or float64, decayed: (1 - rate * weight_decay) weight. To be changed, then `store`d.

    Args:
        weight: Rows of the stored weight.
        rate: Learning rate.
        weight_decay: Decoupled decay.

    Returns:
        float32, of a float64 weight float64; in these formats the stored rows themselves.
    """
    is_double = isinstance(weight, Tensor) and weight.dtype == torch.float64
    values = materialise(weight, torch.float64 if is_double else torch.float32)
    return values.mul_(1 - rate * weight_decay) if weight_decay else values


def store(weight: Stored, values: Tensor, rounding: torch.Generator) -> None:
    """Write back what `opened` gave, rounded without bias where the format is narrower than float32.

    Args:
        weight: Rows of the stored weight, changed in place.
        values: As they came from there; used up.
        rounding: Where the bits of the rounding come from.
    """
    if isinstance(weight, Tensor):
        if values is not weight:
            write_rounded(weight, values, rounding)
    else:
        weight.write(values, rounding)


def move(weight: Stored, direction: Tensor, rate: float, weight_decay: float, rounding: torch.Generator) -> None:
    """weight <- round((1 - rate * weight_decay) weight - rate * direction), in place.

    Args:
        weight: Rows of the stored weight.
        direction: float32, of the same shape.
        rate: Learning rate.
        weight_decay: Decoupled decay.
        rounding: Where the bits of the rounding come from.
    """
    store(weight, opened(weight, rate, weight_decay).sub_(direction, alpha=rate), rounding)
