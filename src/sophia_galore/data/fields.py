"""Read the fields of a record: absent values, unsupported fields, flags, and lists written as text."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from sophia_galore.data.meanings import ASKS_FOR_INPUT, KNOWN, LABELS, RECORD_COUNTS, REFUSALS
from sophia_galore.data.record import Record
from sophia_galore.errors import DataError


def is_null(value: Any) -> bool:
    """Return whether a value is null or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def absent(value: Any) -> bool:
    """Return whether a value counts as absent: null, NaN, an empty or blank text, an empty list or object."""
    if isinstance(value, str):
        return not value.strip()
    return is_null(value) or (isinstance(value, list | tuple | Mapping) and not value)


def normalised(record: Record) -> Record:
    """Return a record with nulls for NaNs and with standard field names: ``Instruction`` becomes ``instruction``.

    Args:
        record: As it was read.
    """
    names = renamed(record)
    fields = {names.get(name, name): None if is_null(value) else value for name, value in record.fields.items()}
    return Record(fields, record.where)


def renamed(record: Record) -> dict[str, str]:
    """Return the fields with another spelling than the standard one, such as ``Instruction``, and their standard names.

    Args:
        record: As it was read.
    """
    names: dict[str, str] = {}
    for name in record.fields:
        known = str(name).strip().lower().replace(" ", "_")
        if name not in KNOWN and known in KNOWN and known not in record.fields and known not in names.values():
            names[name] = known
    return names


def refuse_by_name(record: Record) -> None:
    """Refuse fields of any format that would change what is learned and are not supported.

    Args:
        record: The normalised record.

    Raises:
        DataError: It holds preference data or something other than text, or asks for other targets.
    """
    refuse_fields(record.fields, "record", record.where)
    for name in (*RECORD_COUNTS, "loss"):
        value = record.fields.get(name)
        said = value if name == "loss" else flag(value, record.where, name)
        if said is False:
            raise DataError(
                f"{record.where}: the field `{name}` is {shown(value)}: this record must not be trained on.",
                "Remove the record, or the field.",
            )
    for name in ASKS_FOR_INPUT:
        if flag(record.fields.get(name), record.where, name):
            raise DataError(
                f"{record.where}: the field `{name}` asks to learn the question too, but only answers are learned.",
                "Remove the field; raw text of the format `text` counts as a whole.",
            )


def refuse_label(record: Record, *, of_answer: bool) -> None:
    """Refuse an answer that is labelled as bad. Answers labelled as good, and class names, are accepted.

    Args:
        record: The normalised record.
        of_answer: Whether the record has an answer: then 0 means a bad one. With raw text, 0 is a class.

    Raises:
        DataError: The label is false.
    """
    for name in LABELS:
        value = record.fields.get(name)
        said = value.strip().lower() if isinstance(value, str) else value
        is_bad = said in ("false", "0") or (isinstance(said, int | float) and said == 0) if of_answer else said is False
        if is_bad:
            raise DataError(
                f"{record.where}: the field `{name}` is {shown(value)}: preference data, an answer that must not be "
                "learned.",
                "Remove the record, or the field if it says something else; records labelled true are learned.",
            )


def refuse_fields(fields: Mapping[str, Any], place: str, where: str, within: str = "") -> None:
    """Refuse the fields that `meanings.TABLE` marks as refused.

    Args:
        fields: Fields by name.
        place: ``record`` or ``turn``.
        where: Location of the record, for error messages.
        within: The turn, for error messages.

    Raises:
        DataError: There is such a field, and it is not absent.
    """
    for name, value in fields.items():
        row = REFUSALS[place].get(name)
        if row is not None and not absent(value) and value is not False and value != "[]":
            label = f"{within}.{name}" if within else name
            raise DataError(f"{where}: the field `{label}` {row.what}.", row.remedy)


def flag(value: Any, where: str, name: str) -> bool | None:
    """Read a field that says whether something counts in the loss.

    Args:
        value: The field's value.
        where: Location of the record, for error messages.
        name: The field's name, for error messages.

    Returns:
        The truth value; None if the field is absent.

    Raises:
        DataError: It is not a truth value, or a weight between 0 and 1.
    """
    if absent(value):
        return None
    words = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    said = words.get(value.strip().lower()) if isinstance(value, str) else value
    if isinstance(said, bool | int | float) and said in (0, 1):
        return bool(said)
    raise DataError(
        f"{where}: the field `{name}` is {shown(value)}, but what is learned counts fully or not at all.",
        "Write 1 or true where it is learned, 0 or false where it is not.",
    )


def one_of(fields: Mapping[str, Any], names: Iterable[str], where: str, within: str = "") -> tuple[str, Any]:
    """Return the value of a field that has several names.

    Args:
        fields: Fields by name.
        names: Names that mean the same.
        where: Location of the record, for error messages.
        within: The turn, for error messages.

    Returns:
        The name in use and its value; ("", None) if all are absent.

    Raises:
        DataError: Two of them have different values.
    """
    given = [(name, fields[name]) for name in names if name in fields and not absent(fields[name])]
    if not given:
        return "", None
    first, value = given[0]
    for name, other in given[1:]:
        if other != value:
            prefix = f"{within}." if within else ""
            raise DataError(
                f"{where}: the fields `{prefix}{first}` and `{prefix}{name}` mean the same and differ.",
                "Keep one of them.",
            )
    return first, value


def parsed(value: Any) -> Any:
    """Parse a text that is a list or an object in the syntax of JSON or Python; return other values unchanged.

    Args:
        value: Any value of a field.
    """
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        # As pandas writes lists into CSV files.
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return value


def shown(value: Any) -> str:
    """Return a value as JSON writes it, cut to a length that fits into a sentence."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def present(record: Record) -> list[str]:
    """Return the names of a record's fields that are not null (tables fill absent fields with null)."""
    return [str(name) for name, value in record.fields.items() if value is not None]


def listed(names: list[str]) -> str:
    """Format field names for a message.

    Args:
        names: The names; long lists are shortened.

    Returns:
        Such as "`a`, `b`", or "no field at all".
    """
    if not names:
        return "no field at all"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(f"`{name}`" for name in names[:8]) + more
