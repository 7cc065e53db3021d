"""Sums in a fixed order: neighbours first, then pairs of neighbours, and so on.

Floating-point sums depend on their order. Here the order is that of a binary tree over the numbers of the blocks that
the terms come from. Half of the blocks, or a quarter, is a subtree of its own. So several processes that each add up
such a part, and then pair by pair their sums, get the bits that one process gets.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class PairwiseSum:
    """Sums tensors over numbered blocks.

    A block may lack a tensor that others have, or be left out. At most as many sums wait as the tree has levels.
    """

    def __init__(self) -> None:
        # Of the complete subtrees to the left: the number of their first block, and their sums.
        self._waiting: list[tuple[int, dict[str, Tensor]]] = []

    def add(self, block: int, terms: Mapping[str, Tensor]) -> None:
        """Add the terms of a block.

        Args:
            block: Its number; larger than all before.
            terms: Tensors by name, which are changed from now on.
        """
        self._join_before(block)  # some that were left out
        self._waiting.append((block, dict(terms)))
        self._join_before(block + 1)

    def total(self) -> dict[str, Tensor]:
        """Return the sums; afterwards there are none."""
        while len(self._waiting) > 1:
            self._join()
        return self._waiting.pop()[1] if self._waiting else {}

    def _join_before(self, end: int) -> None:
        """Join all subtrees that no block from `end` on belongs to."""
        while len(self._waiting) > 1 and _end_of_common(self._waiting[-2][0], self._waiting[-1][0]) <= end:
            self._join()

    def _join(self) -> None:
        """Add the last sums to those before them."""
        _, right = self._waiting.pop()
        left = self._waiting[-1][1]
        for name in list(right):
            term = right.pop(name)
            left[name] = left[name].add_(term) if name in left else term


def _end_of_common(left: int, right: int) -> int:
    """Return the end of the smallest subtree with two blocks: the number after its last block."""
    level = (left ^ right).bit_length()
    return ((left >> level) + 1) << level
