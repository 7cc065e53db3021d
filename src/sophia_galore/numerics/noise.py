"""Noise for stochastic rounding: a pure function of seed, purpose and the index of an element.

It is counter-based: the index of an element is hashed with a key. So it does not depend on how a tensor is divided into
blocks of rows, or on their order, and it is the same on every device, since it only uses integer operations. Stateful
generators have none of these properties, and are slower on a CPU (`bench/noise.py`).

The hash is two rounds of a bijection of 32-bit words, in which each bit of the input changes each bit of the output
with a probability of 1/2 (constants: C. Wellons, "Prospecting for Hash Functions", 2018, `lowbias32`). One word gives
the noise of two elements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sophia_galore.numerics.random import key
from sophia_galore.numerics.row_blocks import ROW_ALIGNMENT, first_few

NOISE = "counted"
"""Name of this noise in a plan; versions up to 0.5 used generators and wrote no name."""

# The two elements that share a word are half a block apart: a stride of two elements is several times slower.
_BLOCK = ROW_ALIGNMENT
_HALF = _BLOCK // 2
# Number of blocks that are hashed at once, so that they stay in the processor's cache for all rounds.
_BLOCKS_AT_ONCE = 2048
_LOW = (1 << 16) - 1


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

    def integers(self, like: Tensor) -> Tensor:
        """Return integers that are uniform in [0, 2^16).

        Args:
            like: Tensor whose shape and device are used.

        Returns:
            int32 tensor of that shape.
        """
        return self._fill(like, torch.int32)

    def uniform(self, like: Tensor) -> Tensor:
        """Return numbers that are uniform in (0, 1): the midpoints of 2^16 equal parts, so the mean is exactly 1/2.

        Args:
            like: As for `integers`.

        Returns:
            float32 tensor of that shape; no number is closer to 0 or 1 than 2^-17.
        """
        return self._fill(like, torch.float32).add_(0.5).mul_(2.0**-16)

    def _fill(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        assert self.first % _BLOCK == 0, "rows begin at a multiple of ROW_ALIGNMENT"
        num_blocks = -(-like.numel() // _BLOCK)
        made = like.new_empty((num_blocks, 2, _HALF), dtype=dtype)
        at_once = min(num_blocks, _BLOCKS_AT_ONCE)
        words, shifted = (like.new_empty(at_once * _HALF, dtype=torch.int32) for _ in range(2))
        drawn = key(self.seed, *self.purpose)
        first_key, second_key = _signed(drawn), _signed(drawn >> 31)
        for start in first_few(range(0, num_blocks, _BLOCKS_AT_ONCE)):
            part = made[start : start + _BLOCKS_AT_ONCE]
            number = part.shape[0] * _HALF
            place = (self.first // _BLOCK + start) * _HALF
            word, scratch = words[:number], shifted[:number]
            torch.arange(place, place + number, out=word)
            _mix(word.bitwise_xor_(first_key), scratch)
            _mix(word.bitwise_xor_(second_key), scratch)
            halves = word.view(-1, _HALF)
            part[:, 0].copy_(torch.bitwise_and(halves, _LOW, out=scratch.view(-1, _HALF)))
            part[:, 1].copy_(halves.bitwise_right_shift_(16).bitwise_and_(_LOW))
        return made.view(-1)[: like.numel()].view(like.shape)


def _mix(words: Tensor, scratch: Tensor) -> None:
    """Apply the bijection in place; int32 shifts copy the sign bit, so these copies are masked."""
    for shift, factor in ((16, 0x7FEB352D), (15, _signed(0x846CA68B)), (16, 1)):
        torch.bitwise_right_shift(words, shift, out=scratch)
        words.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))
        if factor != 1:
            words.mul_(factor)


def _signed(number: int) -> int:
    """Return the lower 32 bits of a number, as an int32."""
    low = number & 0xFFFFFFFF
    return low - (1 << 32) if low >= 1 << 31 else low
