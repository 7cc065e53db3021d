"""Values out of JSON objects, checked where they are read."""

from __future__ import annotations

from math import isfinite
from typing import Any

from sophia_galore.errors import UserError

FOREIGN = "The file was changed, or is not of this program."


def optional_number(record: dict[str, Any], name: str, where: str) -> float | None:
    """A number, or None if it is null or not there.

    Args:
        record: A JSON object.
        name: The field.
        where: "metrics.jsonl:12", for the message.

    Raises:
        UserError: If the field holds something else.
    """
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: '{name}' is {value!r}, not a number", FOREIGN)
    return value


def number(record: dict[str, Any], name: str, where: str) -> float:
    """A number that must be there.

    Raises:
        UserError: If it is missing or no number.
    """
    value = optional_number(record, name, where)
    if value is None:
        raise UserError(f"{where}: '{name}' is missing", FOREIGN)
    return value


def whole_number(record: dict[str, Any], name: str, where: str) -> int:
    """A count that must be there, such as a step.

    Raises:
        UserError: If it is missing or not a whole number.
    """
    value = number(record, name, where)
    if not float(value).is_integer():
        raise UserError(f"{where}: '{name}' is {value!r}, not a whole number", FOREIGN)
    return int(value)


def optional_bytes(record: dict[str, Any], name: str, where: str) -> int | None:
    """A size in bytes, or None if it was not measured."""
    value = optional_number(record, name, where)
    return int(value) if value is not None and isfinite(value) else None


def sizes(record: dict[str, Any], name: str, where: str) -> dict[str, int]:
    """A table of sizes in bytes, in the file's order; what was not measured is left out.

    Raises:
        UserError: If the field is no table of numbers.
    """
    table = record.get(name) or {}
    if not isinstance(table, dict):
        raise UserError(f"{where}: '{name}' is not a table", FOREIGN)
    measured = {str(key): optional_bytes(table, key, f"{where}: {name}") for key in table}
    return {key: value for key, value in measured.items() if value is not None}
