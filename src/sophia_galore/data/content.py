"""Read the text of a field, which may be a string, a number or a list of parts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sophia_galore.data.fields import absent, is_null, listed, one_of, parsed, present, shown
from sophia_galore.data.meanings import REASONING
from sophia_galore.data.record import Record
from sophia_galore.errors import DataError

_TEXT = ("text", "input_text", "output_text")
_THOUGHT = ("thinking", "reasoning", "thought")


@dataclass(frozen=True)
class FieldText:
    """The text of a field.

    Attributes:
        text: The text.
        reasoning: The reasoning among its parts, as in Anthropic's format.
    """

    text: str
    reasoning: str = ""


def read_text(value: Any, where: str, name: str) -> FieldText:
    """Read a value that is text or can be read as text without ambiguity.

    Args:
        value: A string; a number or truth value, which is taken as JSON writes it (42, 0.5, true); or a list of parts
            ``{"type": "text", "text": ...}``, whose texts are joined as they are.
        where: Location of the record, for error messages.
        name: The field's name, for error messages.

    Returns:
        The text.

    Raises:
        DataError: It is of another type, holds something other than text, or half of a surrogate pair.
    """
    if isinstance(value, str):
        return FieldText(_require_unicode(value, where, name))
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return FieldText(json.dumps(value))
    parts = [value] if isinstance(value, Mapping) and _is_part(value) else value
    if is_parts(parts):
        return _joined(parts, where, name)
    raise DataError(
        f"{where}: the field `{name}` is of type {type(value).__name__} where text is expected.",
        "Write a string there.",
    )


def is_parts(value: Any) -> bool:
    """Return whether a value is a list of parts of one message, not a list of messages.

    Args:
        value: Any value of a field.
    """
    return isinstance(value, list | tuple) and bool(value) and all(_is_part(part) for part in value)


def text_field(record: Record, name: str, *, required: bool = True) -> str:
    """Return a record's field that is text.

    Args:
        record: The record.
        name: The field.
        required: Whether a missing or null field is an error; else it counts as empty.

    Returns:
        The text.

    Raises:
        DataError: It is missing though required, or no text.
    """
    return field_text(record, name, required=required).text


def field_text(record: Record, name: str, *, required: bool = True) -> FieldText:
    """Return what `text_field` returns, with the reasoning among its parts.

    Args:
        record: The record.
        name: The field.
        required: Whether a missing or null field is an error; else it counts as empty.
    """
    value = record.fields.get(name)
    if is_null(value):
        if not required:
            return FieldText("")
        raise DataError(
            f"{record.where}: the field `{name}` is missing.",
            f"Add it; the record has {listed(present(record))}.",
        )
    if not required and absent(value) and not isinstance(value, str):
        return FieldText("")
    return read_text(value, record.where, name)


def message_list(record: Record, field: str) -> list[Any]:
    """Return the items of a record's field that is a list of messages.

    Args:
        record: The record.
        field: The field: a list; a text that holds one, as JSON or as pandas writes lists; or an object of lists of
            equal length, as tables keep lists of objects.

    Returns:
        The items, unread.

    Raises:
        DataError: It is missing, or something else.
    """
    value = parsed(record.fields.get(field))
    if is_null(value):
        raise DataError(f"{record.where}: the field `{field}` is missing.", "Add the list of messages.")
    columns = list(value.values()) if isinstance(value, Mapping) else []
    if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(value, list | tuple):
        raise DataError(
            f"{record.where}: the field `{field}` is of type {type(value).__name__} where a list of messages is "
            "expected.",
            "Write a list of objects there.",
        )
    return list(value)


def reasoning_in(fields: Mapping[str, Any], where: str, within: str = "") -> str:
    """Return the reasoning that a field beside an answer holds.

    Args:
        fields: Fields of the message, or of a record with one answer.
        where: Location of the record, for error messages.
        within: The message, for error messages.

    Returns:
        The reasoning; "" if there is no such field.

    Raises:
        DataError: There are two such fields that differ, or one that is not text.
    """
    name, value = one_of(fields, REASONING, where, within)
    if not name or value is False:
        return ""
    label = f"{within}.{name}" if within else name
    if isinstance(value, bool | int | float):
        raise DataError(
            f"{where}: the field `{label}` is {shown(value)} where the reasoning itself is expected.",
            "Write the thoughts there, or remove the field.",
        )
    return read_text(value, where, label).text


def _is_part(value: Any) -> bool:
    if not isinstance(value, Mapping) or value.get("role") is not None or value.get("from") is not None:
        return False
    return isinstance(value.get("type"), str) or isinstance(value.get("text"), str)


def _joined(parts: Sequence[Mapping[str, Any]], where: str, name: str) -> FieldText:
    texts: list[str] = []
    thoughts: list[str] = []
    for index, part in enumerate(parts):
        kind = part.get("type") or "text"
        place = f"{name}[{index}]"
        if kind in _TEXT or kind in _THOUGHT:
            own = next((key for key in (kind, "text", *_THOUGHT) if isinstance(part.get(key), str)), None)
            if own is None:
                raise DataError(f"{where}: `{place}` is a part of type `{kind}` without its text.", "Write it there.")
            (texts if kind in _TEXT else thoughts).append(_require_unicode(part[own], where, f"{place}.{own}"))
            continue
        raise DataError(
            f"{where}: `{place}` is a part of type `{kind}`, but only text can be learned.",
            "Write calls and results of tools as messages of their own (`tool_calls`, role `tool`)."
            if "tool" in kind
            else "Remove the record, or the part if the text makes sense without it.",
        )
    return FieldText("".join(texts), "\n".join(thoughts))


def _require_unicode(text: str, where: str, name: str) -> str:
    try:
        text.encode()  # quicker than looking at every character
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: the field `{name}` holds half of a surrogate pair (an emoji cut in two).",
            "Remove the broken \\ud800..\\udfff escape.",
        ) from error
    return text
