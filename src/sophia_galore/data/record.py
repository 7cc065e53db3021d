"""A record of the data, with its location for error messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Record:
    """One record as it was read, before it is interpreted.

    Attributes:
        fields: The record's fields by name.
        where: Its location, for error messages: ``data/x.jsonl:17`` (file and line) or ``data/x.json, record 17``
            (formats without useful line numbers; counted from 1).
    """

    fields: dict[str, Any]
    where: str


@dataclass(frozen=True)
class Content:
    """The content of a file.

    Attributes:
        records: The readable records, in file order.
        note: How the file was read if that differs from its extension, such as "semicolons between the columns"; else
            "".
    """

    records: list[Record]
    note: str = ""
