"""Numbers as people read them."""

from __future__ import annotations


def bytes_in_words(num_bytes: float) -> str:
    """Bytes as "1.42 GiB" or "310 MiB"."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.0f} KiB"


def time_in_words(seconds: float) -> str:
    """Seconds as "1:02:03" or "2:03"."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
