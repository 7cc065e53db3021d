"""One record of the data, and the place that an error message should name for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Record:
    """One record as it was read, before anybody asked what it means.

    Attributes:
        fields: The record's fields by name.
        where: Where it stands, for messages: ``data/x.jsonl:17`` (file and line) or
            ``data/x.json, record 17`` (formats without useful line numbers; the first is 1).
    """

    fields: dict[str, Any]
    where: str
