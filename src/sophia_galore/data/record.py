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


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        records: Those that could be read, in their order.
        note: How the file was understood where it is not what its ending says, such as "semicolons between the
            columns"; "" otherwise.
    """

    records: list[Record]
    note: str = ""
