"""Noise for stochastic rounding: a pure function of seed, purpose and the index of an element.

It is counter-based: it does not depend on how a tensor is divided into blocks of rows, or on their order, and it is the
same on every device, since it only uses integer operations. Stateful generators have none of these properties, and are
slower on a CPU.

A word of 64 bits gives the noise of four neighbours, sixteen bits each. Hashing every word well would take longer than
the rounding itself. So the number of a word is split into two digits, and two short tables hold a good hash of each
value of a digit (`splitmix.py`).
A word is the exclusive or of one entry of each table, times an odd constant:

    word = (lower[group % 64, lane] ^ upper[group // 64, lane]) * constant        group = index // 128

Any three words are independent, as far as the tables are random. Without the product, four words at the corners of a
rectangle of digits would cancel; the carries of the product make this a matter of chance.

Where numbers are to be odd, the lowest bit of each is set, and fifteen bits are left. Then the mean is exactly zero,
and no number times 2^-16 is closer to 1/2 or -1/2 than 2^-16, which rounding of quotients needs to keep exact values
(`weights/int8.py`, `numerics/blockwise.py`). Rounding to bfloat16 needs all sixteen bits (`numerics/rounding.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sophia_galore.numerics.random import key
from sophia_galore.numerics.row_blocks import ROW_ALIGNMENT, first_few
from sophia_galore.numerics.splitmix import hash_, signed

NOISE = "two digits"
"""Name of this noise in a plan. It was "counted" before this name; versions up to 0.5 used generators, without one."""

# Elements of a group, and groups for which the upper digit stays the same.
_GROUP = ROW_ALIGNMENT
_DIGIT = 64
_PER_WORD = 4
_LANES = _GROUP // _PER_WORD
# Number of elements whose noise exists at once: it stays in the processor's cache, and a GPU has enough to do.
_AT_ONCE = 1 << 20

_CONSTANT = 0xD6E8FEB86659FD93
_LOWEST_BITS = 0x0001000100010001


@dataclass(frozen=True)
class Noise:
    """The noise of one tensor.

    Args:
        seed: The run's seed.
        purpose: What it is for, such as a parameter's name, the step and "rounding".
        first: Index of the first element in the flattened tensor; a multiple of `ROW_ALIGNMENT`.
    """

    seed: int
    purpose: tuple[str | int, ...]
    first: int = 0

    @classmethod
    def of(cls, seed: int, *purpose: str | int) -> Noise:
        """Return the noise for a purpose."""
        return cls(seed, purpose)

    def part(self, name: str) -> Noise:
        """Return the noise for one of several tensors with the same purpose."""
        return replace(self, purpose=(*self.purpose, name))

    def rows(self, rows: slice, columns: int) -> Noise:
        """Return the noise of some rows.

        Args:
            rows: The rows; they begin at a multiple of `ROW_ALIGNMENT`.
            columns: Number of elements in a row.
        """
        return replace(self, first=self.first + (rows.start or 0) * columns)

    def pieces(
        self, like: Tensor, dtype: torch.dtype, columns: int = 1, *, odd: bool = True
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield the noise of a tensor piece by piece.

        Args:
            like: Tensor whose number of elements and device are used.
            dtype: int16, int32 or float32.
            columns: Each piece is a multiple of this number of elements, such as whole rows.
            odd: Whether the lowest bit is set, so that numbers and mean are symmetric around zero.

        Yields:
            The elements as a slice of the flattened tensor, and their noise: integers, uniform in [-2^15, 2^15), or odd
            ones, uniform in (-2^15, 2^15). The next piece overwrites it.
        """
        assert self.first % _GROUP == 0, "rows begin at a multiple of ROW_ALIGNMENT"
        num = like.numel()
        size = piece_elements(columns)
        first = self.first // _GROUP
        start_digit = first // _DIGIT
        lower, upper = self._tables(like.device, start_digit, -(-(first + -(-num // _GROUP)) // _DIGIT))
        most = -(-min(size, num) // _GROUP)
        # A piece may begin and end inside of an upper digit.
        words = like.new_empty((-(-most // _DIGIT) + 1, _DIGIT, _LANES), dtype=torch.int64)
        made = None if dtype == torch.int16 else like.new_empty(min(size, num), dtype=dtype)
        for start in first_few(range(0, num, size)):
            part = slice(start, min(start + size, num))
            begin = first + start // _GROUP
            digits = slice(begin // _DIGIT, -(-(begin + -(-(part.stop - start) // _GROUP)) // _DIGIT))
            word = words[: digits.stop - digits.start]
            torch.bitwise_xor(lower, upper[digits.start - start_digit : digits.stop - start_digit], out=word)
            # As on every machine that torch is built for, the lowest bits of a word come first.
            word.mul_(signed(_CONSTANT))
            drawn = (word.bitwise_or_(_LOWEST_BITS) if odd else word).view(torch.int16).view(-1)
            drawn = drawn[(begin - digits.start * _DIGIT) * _GROUP :][: part.stop - start]
            yield part, drawn if made is None else made[: part.stop - start].copy_(drawn)

    def integers(self, like: Tensor) -> Tensor:
        """Return all of the noise.

        Args:
            like: Tensor whose shape and device are used.

        Returns:
            int16 tensor of that shape: odd integers, uniform in (-2^15, 2^15).
        """
        made = like.new_empty(like.numel(), dtype=torch.int16)
        for part, drawn in self.pieces(like, torch.int16):
            made[part] = drawn
        return made.view(like.shape)

    def _tables(self, device: torch.device, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return the hashes of the lower digits, (1, 64, 32), and of the upper ones from start to stop, (k, 1, 32)."""
        num_lower = _DIGIT * _LANES
        words = torch.arange(num_lower + (stop - start) * _LANES, dtype=torch.int64, device=device)
        words[num_lower:].add_(start * _LANES)
        hash_(words, key(self.seed, *self.purpose))
        return words[:num_lower].view(1, _DIGIT, _LANES), words[num_lower:].view(-1, 1, _LANES)


@dataclass(frozen=True)
class ColumnNoise(Noise):
    """The noise of some columns of a tensor, the same as if all of its columns were there.

    Args:
        seed: As for `Noise`.
        purpose: As for `Noise`.
        first: Index of the first element of the whole row with which a block begins.
        start: The first column.
        width: Number of columns of the whole tensor.
    """

    start: int = 0
    width: int = 1

    def rows(self, rows: slice, columns: int) -> Noise:
        """Return the noise of some rows, of which `columns` elements are there."""
        return super().rows(rows, self.width)

    def pieces(
        self, like: Tensor, dtype: torch.dtype, columns: int = 1, *, odd: bool = True
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield the noise of a matrix of these columns; see `Noise`. Pieces are whole rows."""
        if not like.numel():
            return
        num_rows, num_columns = like.shape
        # Only its size and its device are used.
        whole = like.new_empty(1).expand(num_rows, self.width)
        for part, drawn in super().pieces(whole, dtype, self.width, odd=odd):
            there = drawn.view(-1, self.width)[:, self.start : self.start + num_columns]
            rows = slice(part.start // self.width, part.stop // self.width)
            yield slice(rows.start * num_columns, rows.stop * num_columns), there.reshape(-1)


def piece_elements(columns: int) -> int:
    """Return the number of elements of a piece: whole rows and whole groups of noise, about a million.

    Args:
        columns: Number of elements in a row.
    """
    aligned = math.lcm(columns, _GROUP)
    return max(1, _AT_ONCE // aligned) * aligned
