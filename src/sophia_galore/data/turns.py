"""Lists of messages: their roles, their contents, and what makes them unusable."""

from __future__ import annotations

from typing import Any

from sophia_galore.data.conversation import Message, Role, checked_string, string_field
from sophia_galore.data.record import Record
from sophia_galore.errors import DataError

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}


def turns(record: Record, field: str) -> tuple[Message, ...]:
    """Reads a field that is a list of messages.

    Args:
        record: The record.
        field: The field; its items are {"role", "content"} or {"from", "value"}.

    Returns:
        The messages, roles in their standard names. A field ``system`` of
        the record goes in front.

    Raises:
        DataError: The field, a role or a content is missing, unknown or of a wrong type; or
            the record calls tools, which is not supported and must not be dropped in silence.
    """
    items = record.fields.get(field)
    if items is None:
        raise DataError(f"{record.where}: the field `{field}` is missing.", "Add the list of messages.")
    if not isinstance(items, list):
        raise DataError(
            f"{record.where}: the field `{field}` is of type {type(items).__name__} where a list of messages is "
            "expected.",
            "Write a list of objects there.",
        )
    if record.fields.get("tools"):
        raise DataError(
            f"{record.where}: the field `tools` defines tools, which is not supported.", "Remove the field or record."
        )
    messages = tuple(_turn(item, record.where, f"{field}[{index}]") for index, item in enumerate(items))
    system = string_field(record, "system", required=False)
    if not system:
        return messages
    if messages and messages[0].role == "system":
        raise DataError(
            f"{record.where}: there is a field `system`, and `{field}[0]` is a system message too.", "Keep one of them."
        )
    return (Message("system", system), *messages)


def require_answer(messages: tuple[Message, ...], where: str, field: str) -> None:
    """Refuses a list of messages from which nothing can be learned.

    Args:
        messages: The messages.
        where: The record's place.
        field: The field that they came from.

    Raises:
        DataError: There is no assistant turn, or an empty one.
    """
    answers = [message.content for message in messages if message.role == "assistant"]
    if not answers:
        raise DataError(
            f"{where}: the field `{field}` has no assistant turn, so there is nothing to learn.",
            "Add the assistant's answer or remove the record.",
        )
    if any(not content.strip() for content in answers):
        raise DataError(
            f"{where}: the field `{field}` has an empty assistant turn.", "Fill in the answer or remove the record."
        )


def _turn(item: Any, where: str, name: str) -> Message:
    if not isinstance(item, dict):
        raise DataError(
            f"{where}: `{name}` is of type {type(item).__name__} where a message is expected.",
            'Write {"role": ..., "content": ...} there.',
        )
    role_key, content_key = ("from", "value") if item.get("from") is not None else ("role", "content")
    if item.get(role_key) is None:
        keys = "`role` (or `from`)" if "value" not in item else "`from`"
        raise DataError(f"{where}: `{name}` lacks its field {keys}.", "Say whose turn it is.")
    role = item[role_key]
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(
            f"{where}: the role {role!r} in `{name}.{role_key}` is unknown.", f"Known roles are {', '.join(ROLES)}."
        )
    if any(item.get(key) for key in ("tool_calls", "function_call")):
        raise DataError(f"{where}: `{name}` calls a tool, which is not supported.", "Remove the record.")
    if item.get(content_key) is None:
        raise DataError(f"{where}: the field `{name}.{content_key}` is missing.", "Write the message's text there.")
    return Message(ROLES[role], checked_string(item[content_key], where, f"{name}.{content_key}"))
