"""Times as people read them."""

from __future__ import annotations


def time_in_words(seconds: float) -> str:
    """Seconds as "1:02:03" or "2:03"."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
