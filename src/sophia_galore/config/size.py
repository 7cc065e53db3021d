"""Parse and format amounts of memory."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated

from pydantic import BeforeValidator

from sophia_galore.config.problems import show
from sophia_galore.errors import ArgumentError

LEAST_BYTES = 2**20
"""The smallest size; a smaller number lacks its unit."""

# More than any machine has, and still a whole number that every file format can hold.
_MOST_BYTES = 2**63 - 1
_LONGEST_TEXT = 40
_TEXT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)")
_PREFIXES = "kmgtp"
# As GNU programs read them: a prefix alone, or with "iB", counts in 1024, with "B" in 1000.
_UNITS = {
    **dict.fromkeys(("", "b", "byte", "bytes"), 1),
    **{prefix: 1024**power for power, prefix in enumerate(_PREFIXES, 1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate(_PREFIXES, 1)},
    **{f"{prefix}b": 1000**power for power, prefix in enumerate(_PREFIXES, 1)},
}
_EXAMPLE = "Write a number and a unit, such as 4GiB, 3.5GiB or 512MiB"


def parse_size(text: str | int, *, name: str = "The size", zero: bool = False) -> int:
    """Read an amount of memory.

    Args:
        text: A whole number of bytes, or a number and a unit in any case: "4GiB" and "4G" are 4 x 2^30 bytes, "4GB"
            is 4 x 10^9. A fraction of a byte is left out.
        name: What it is the size of, for the message.
        zero: Whether 0 is a size too.

    Returns:
        Bytes.

    Raises:
        ArgumentError: It is not understood, is below 1 MiB (and not the 0 that is allowed), or above 2^63 - 1 bytes.
    """
    num_bytes = _bytes(text)
    or_zero = ", or 0" if zero else ""
    if num_bytes is None:
        raise ArgumentError(f"{name} is no size: {show(text)}", f"{_EXAMPLE}{or_zero}.")
    if num_bytes == 0 and zero:
        return 0
    if num_bytes > _MOST_BYTES:
        raise ArgumentError(f"{name} is more than any machine has", f"{_EXAMPLE}{or_zero}.")
    if num_bytes < LEAST_BYTES:
        words = "1 byte" if num_bytes == 1 else f"{num_bytes} bytes"
        hint = "Write a unit, such as 4GiB" if 0 < num_bytes < 1024 else "The least is 1MiB; a unit helps, as in 4GiB"
        raise ArgumentError(f"{name} is {words}", f"{hint}{or_zero}.")
    return num_bytes


Size = Annotated[int, BeforeValidator(parse_size)]
"""A field that takes sizes, for the schema."""

SizeOrZero = Annotated[int, BeforeValidator(lambda text: parse_size(text, zero=True))]
"""A field that takes sizes and 0."""


def _bytes(text: object) -> int | None:
    """Parse bytes without checking limits; None if not understood."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text if text >= 0 else None
    if not isinstance(text, str) or len(text) > _LONGEST_TEXT:
        return None
    found = _TEXT.fullmatch(text.strip().lower())
    if found is None or found[2] not in _UNITS:
        return None
    if "." in found[1] and _UNITS[found[2]] == 1:
        return None
    # Decimal, since a float is not 3.3; its 28 digits are more than the limit above has.
    return int(Decimal(found[1]) * _UNITS[found[2]])


def bytes_in_words(num_bytes: float) -> str:
    """Format bytes as "1.42 GiB", "310 MiB" or "96 bytes"."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    if num_bytes >= 2**20:
        return f"{num_bytes / 2**20:.0f} MiB"
    return f"{num_bytes / 2**10:.0f} KiB" if num_bytes >= 2**10 else f"{num_bytes:.0f} bytes"
