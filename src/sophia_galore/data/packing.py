"""Pack examples into rows, so that there is little padding.

Best fit decreasing: examples from long to short, each into the fullest row that still has room. If examples are much
shorter than a row, rows are almost full; at most 11/9 of the smallest possible number of rows is needed (Johnson,
Demers, Ullman, Garey and Graham, SIAM J. Comput. 3(4), 1974). An example is never cut.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from sophia_galore.numerics.random import generator

Rows = tuple[tuple[int, ...], ...]
"""For each row, the indices of its examples."""


@lru_cache(maxsize=8)  # plan, forecast, probe and run call it with the same arguments
def pack(lengths: tuple[int, ...], capacity: int, seed: int) -> Rows:
    """Put examples into rows.

    Args:
        lengths: Tokens of each example.
        capacity: Maximum number of tokens in a row; no example is longer.
        seed: Determines the order of examples of equal length.

    Returns:
        The rows: every example is in exactly one, and no two rows would fit into one.
    """
    drawn: list[int] = torch.randperm(len(lengths), generator=generator(seed, "packing")).tolist()
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # rows by the tokens that are left in them
    rooms = 0  # bit r: whether there are rows with r tokens left
    for number in sorted(drawn, key=lambda number: -lengths[number]):
        length = lengths[number]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1  # the smallest that is enough
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(number)
        left = room - length
        with_room.setdefault(left, []).append(row)
        rooms |= 1 << left
    return tuple(map(tuple, rows))
