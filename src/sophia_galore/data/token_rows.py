"""Examples that are cut from one file of tokens when they are asked for, so that a corpus may be larger than memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray

from sophia_galore.data.example import Example


class TokenRows(Sequence[Example]):
    """Rows of a text corpus: equally long pieces of its tokens, in which every token but the first counts.

    Args:
        tokens: All tokens of the corpus, (N,); a memory-mapped file.
        length: Tokens of a row T.
        rows: Which rows, and in which order, (R,): row i is ``tokens[i * T : (i + 1) * T]``.
        digest: SHA-256 of the tokens, 64 hex digits.
        name: Of the corpus, for messages.
    """

    def __init__(
        self, tokens: NDArray[np.integer], length: int, rows: NDArray[np.int64], digest: str, name: str
    ) -> None:
        self._tokens, self._length, self._rows, self._digest, self._name = tokens, length, rows, digest, name

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> TokenRows: ...
    def __getitem__(self, index: int | slice) -> Example | TokenRows:
        if isinstance(index, slice):
            return TokenRows(self._tokens, self._length, self._rows[index], self._digest, self._name)
        row = int(self._rows[index])
        piece = self._tokens[row * self._length : (row + 1) * self._length]
        counted = torch.ones(self._length, dtype=torch.bool)
        counted[0] = False
        return Example(torch.from_numpy(piece.astype(np.int32)), counted, f"{self._name}, row {row + 1}")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row, without reading them."""
        return (self._length,) * len(self._rows)

    @property
    def largest_token(self) -> int:
        """Largest token id of the whole corpus."""
        return int(self._tokens.max())

    @property
    def content(self) -> bytes:
        """What decides about these rows and their tokens, without reading them."""
        head = f"{self._digest} {self._length} {len(self._rows)} ".encode()
        return head + self._rows.astype("<i8").tobytes()


def lengths_of(examples: Sequence[Example]) -> tuple[int, ...]:
    """Return the tokens of each example.

    Args:
        examples: Examples in memory, or rows of a corpus.
    """
    if isinstance(examples, TokenRows):
        return examples.lengths
    return tuple(example.num_tokens for example in examples)
