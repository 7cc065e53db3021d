"""Process large tensors one block of rows at a time, so that temporaries stay small."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

ROW_ALIGNMENT = 128
"""Blocks of rows begin at multiples of this, so that they contain whole blocks of eight-bit state and of noise."""

# Number of elements that are processed at once: 16 MiB of float32.
_BLOCK_ELEMENTS = 1 << 22
_most_blocks: ContextVar[int | None] = ContextVar("most_blocks", default=None)


def row_blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Yield slices over the first dimension of a shape, each of about `_BLOCK_ELEMENTS` elements at most.

    They begin at multiples of `ROW_ALIGNMENT`, so the smallest one has that many rows.
    """
    num_rows = shape[0]
    columns = max(1, math.prod(shape[1:]))
    step = max(1, _BLOCK_ELEMENTS // columns // ROW_ALIGNMENT) * ROW_ALIGNMENT
    for start in first_few(range(0, num_rows, step)):
        yield slice(start, min(start + step, num_rows))


def first_few(starts: range) -> range:
    """Return all start indices of equal blocks; inside `two_blocks_of_each` only the first two."""
    return starts[: _most_blocks.get()]


@contextmanager
def two_blocks_of_each() -> Iterator[None]:
    """Process only the first two blocks inside the context, to measure memory faster; results are wrong.

    Two blocks are enough: each frees its memory at the end, but tensors of one block may still exist when the next
    begins.
    """
    token = _most_blocks.set(2)
    try:
        yield
    finally:
        _most_blocks.reset(token)
