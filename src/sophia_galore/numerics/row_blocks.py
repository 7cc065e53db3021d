"""Large tensors are worked on a block of rows at a time, so that no temporary is as large as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

ROW_ALIGNMENT = 128
"""Blocks of rows begin at multiples of this, so that they hold whole blocks of an eight-bit state and of noise."""

# Elements of a tensor that are worked on at once: 16 MiB of float32.
_BLOCK_ELEMENTS = 1 << 22
_most_blocks: ContextVar[int | None] = ContextVar("most_blocks", default=None)


def row_blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Slices over the first dimension of a shape, each of about `_BLOCK_ELEMENTS` elements at most.

    They begin at multiples of `ROW_ALIGNMENT`, so the smallest one has that many rows.
    """
    num_rows = shape[0]
    columns = max(1, math.prod(shape[1:]))
    step = max(1, _BLOCK_ELEMENTS // columns // ROW_ALIGNMENT) * ROW_ALIGNMENT
    for start in first_few(range(0, num_rows, step)):
        yield slice(start, min(start + step, num_rows))


def first_few(starts: range) -> range:
    """Return all of the starts of equal pieces of work, but inside of `two_blocks_of_each` the first two."""
    return starts[: _most_blocks.get()]


@contextmanager
def two_blocks_of_each() -> Iterator[None]:
    """Inside the context the third block of rows and all later ones are left out, and what is done alike.

    For who watches memory alone: each block leaves it as it found it, and what is left over from one may still be
    there while the next begins. Numbers are wrong.
    """
    token = _most_blocks.set(2)
    try:
        yield
    finally:
        _most_blocks.reset(token)
