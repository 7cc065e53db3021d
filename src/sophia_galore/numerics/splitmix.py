"""The finaliser of SplitMix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014), on tensors."""

from __future__ import annotations

from torch import Tensor

_STEP = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def hash_(numbers: Tensor, key: int) -> Tensor:
    """Replace numbers by hashes of them.

    Args:
        numbers: int64, changed in place.
        key: Chooses the hash function.

    Returns:
        The same tensor.
    """
    numbers.mul_(signed(_STEP)).add_(key)
    for shift, factor in _ROUNDS:
        numbers.bitwise_xor_(shifted(numbers, shift))
        if factor != 1:
            numbers.mul_(signed(factor))
    return numbers


def shifted(words: Tensor, shift: int) -> Tensor:
    """Return int64 words shifted to the right, with zeros from the left: torch copies the sign bit."""
    return (words >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def signed(number: int) -> int:
    """Return a number below 2^64 as an int64 with the same bits."""
    return number - (1 << 64) if number >= 1 << 63 else number
