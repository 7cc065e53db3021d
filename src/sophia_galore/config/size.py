"""Amounts of memory as people write them."""

from __future__ import annotations


def bytes_in_words(num_bytes: float) -> str:
    """Bytes as "1.42 GiB" or "310 MiB"."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.0f} KiB"
