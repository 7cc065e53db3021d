"""Which examples lie side by side in a row, so that short ones leave no room to padding.

Best fit decreasing: the longest example first, each into the fullest row that still has room for it. Rows come out
almost full where examples are much shorter than a row; no more than 11/9 of the fewest possible rows are ever needed
(Johnson, Demers, Ullman, Garey and Graham, SIAM J. Comput. 3(4), 1974). An example is never cut.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from sophia_galore.numerics.random import generator

Rows = tuple[tuple[int, ...], ...]
"""By number, the examples of each row."""


@lru_cache(maxsize=8)  # asked for by plan, forecast, probe and run, always alike
def pack(lengths: tuple[int, ...], capacity: int, seed: int) -> Rows:
    """Put examples into rows.

    Args:
        lengths: Tokens of each example.
        capacity: Most tokens of a row; none of the examples is longer.
        seed: Which of examples of one length goes where is drawn from it.

    Returns:
        The rows: every example is in one of them, and no two rows would fit into one.
    """
    drawn: list[int] = torch.randperm(len(lengths), generator=generator(seed, "packing")).tolist()
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # rows by the tokens that are left in them
    rooms = 0  # whose bit r says whether there are rows with r tokens left
    for number in sorted(drawn, key=lambda number: -lengths[number]):
        length = lengths[number]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1  # the least that is enough
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
