"""Read and check lists of messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from sophia_galore.data.content import FieldText, is_parts, message_list, read_text, reasoning_in, text_field
from sophia_galore.data.conversation import Message, Role
from sophia_galore.data.fields import absent, flag, one_of, parsed, refuse_fields, shown
from sophia_galore.data.meanings import COUNTS, SYSTEM
from sophia_galore.data.record import Record
from sophia_galore.data.tools import calls_in, calls_of
from sophia_galore.errors import DataError

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "tool_result": "tool",
    "ipython": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
CALLING = ("function_call", "tool_call")
"""Roles whose content is a call, as JSON."""
_BARE = {"role", "content", "from", "value"}


def turns(record: Record, field: str, *, learned: bool = True) -> tuple[Message, ...]:
    """Read a field that is a list of messages.

    Args:
        record: The normalised record.
        field: The field; its items are {"role", "content"} or {"from", "value"}.
        learned: Whether its assistant turns count in the loss, unless a turn has a field that says so.

    Returns:
        The messages, with standard names of roles. A system prompt of the record comes first.

    Raises:
        DataError: The field, a role or a content is missing, unknown or of a wrong type.
    """
    items = message_list(record, field)
    read = [_turn(parsed(item), record.where, f"{field}[{index}]", learned) for index, item in enumerate(items)]
    messages = _with_names(_merged(read))
    system = system_of(record)
    if not system:
        return messages
    if messages and messages[0].role == "system":
        if messages[0].content.strip() == system.strip():
            return messages
        raise DataError(
            f"{record.where}: there is a field `{one_of(record.fields, SYSTEM, record.where)[0]}`, and `{field}[0]` "
            "is a system message too.",
            "Keep one of them.",
        )
    return (Message("system", system), *messages)


def system_of(record: Record) -> str:
    """Return the system prompt that a field of the record holds; "" if there is none.

    Args:
        record: The normalised record.

    Raises:
        DataError: It is not text, or there are two that differ.
    """
    name, _ = one_of(record.fields, SYSTEM, record.where)
    return text_field(record, name, required=False) if name else ""


def require_answer(messages: Iterable[Message], where: str, field: str) -> None:
    """Refuse a list of messages from which nothing can be learned.

    Args:
        messages: The messages.
        where: Location of the record, for error messages.
        field: The field that they came from.

    Raises:
        DataError: No assistant turn counts in the loss, or one that counts is empty.
    """
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise DataError(
            f"{where}: the field `{field}` has no assistant turn, so there is nothing to learn.",
            "Add the assistant's answer or remove the record.",
        )
    counted = [message for message in answers if message.counts]
    if not counted:
        raise DataError(
            f"{where}: in the field `{field}` no assistant turn counts, so there is nothing to learn.",
            "Let an answer count (`weight: 1`, `train: true`), or remove the record.",
        )
    if any(not message.content.strip() and not message.tool_calls for message in counted):
        raise DataError(
            f"{where}: the field `{field}` has an empty assistant turn.", "Fill in the answer or remove the record."
        )


def _turn(item: Any, where: str, name: str, learned: bool) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(
            f"{where}: `{name}` is of type {type(item).__name__} where a message is expected.",
            'Write {"role": ..., "content": ...} there.',
        )
    written, role = _role(item, where, name)
    key = _content_key(item)
    if item.keys() <= _BARE and isinstance(item.get(key), str) and written not in CALLING:
        return Message(role, read_text(item[key], where, f"{name}.{key}").text, counts=learned)  # as most turns are
    refuse_fields(item, "turn", where, name)
    _refuse_channel(item, where, name)
    calls = calls_of(item, where, name)
    content = FieldText("")
    if written in CALLING and not calls:
        calls = calls_in(item.get(key), where, f"{name}.{key}")
        if not calls:
            raise DataError(f"{where}: `{name}.{key}` holds no call of a tool.", "Write it there, as JSON.")
    elif role == "tool" and isinstance(item.get(key), Mapping) and not is_parts([item[key]]):
        content = FieldText(json.dumps(item[key], ensure_ascii=False))  # a tool's result is often an object
    elif not absent(item.get(key)) or isinstance(item.get(key), str | list):
        content = read_text(item[key], where, f"{name}.{key}") if item[key] != [] else FieldText("")
    elif not calls:
        raise DataError(f"{where}: the field `{name}.{key}` is missing.", "Write the message's text there.")
    if calls and role != "assistant":
        raise DataError(
            f"{where}: `{name}` calls a tool, but is the turn of {role}.", "Only the assistant calls tools."
        )
    return Message(
        role,
        content.text,
        counts=_counts(item, role, where, name, learned),
        reasoning=_reasoning(item, role, content, where, name),
        tool_calls=calls,
        name=_text(item, "name", where, name),
        tool_call_id=_text(item, "tool_call_id", where, name),
    )


def _role(item: Mapping[str, Any], where: str, name: str) -> tuple[str, Role]:
    role_key = "from" if item.get("from") is not None else "role"
    if item.get(role_key) is None:
        keys = "`role` (or `from`)" if "value" not in item else "`from`"
        raise DataError(f"{where}: `{name}` lacks its field {keys}.", "Say whose turn it is.")
    role = item[role_key]
    written = role.strip().lower().replace("-", "_") if isinstance(role, str) else ""
    if written not in ROLES:
        raise DataError(
            f"{where}: the role {role!r} in `{name}.{role_key}` is unknown.", f"Known roles are {', '.join(ROLES)}."
        )
    return written, ROLES[written]


def _content_key(item: Mapping[str, Any]) -> str:
    usual, other = ("value", "content") if item.get("from") is not None else ("content", "value")
    return other if item.get(usual) is None and item.get(other) is not None else usual


def _refuse_channel(item: Mapping[str, Any], where: str, name: str) -> None:
    """Refuse reasoning and calls in separate turns (OpenAI's harmony): they would be learned as answers."""
    channel = item.get("channel")
    if not absent(channel) and channel != "final":
        raise DataError(
            f"{where}: `{name}` is a turn of the channel {shown(channel)}, not an answer.",
            "Write thoughts as `thinking` of the answer, and calls as `tool_calls`.",
        )


def _counts(item: Mapping[str, Any], role: Role, where: str, name: str, learned: bool) -> bool:
    flags = {key: flag(item[key], where, f"{name}.{key}") for key in COUNTS if key in item}
    said_so = {key: value for key, value in flags.items() if value is not None}
    if len(set(said_so.values())) > 1:
        first, second = list(said_so)[:2]
        raise DataError(
            f"{where}: `{name}` says both, that it counts and that it does not (`{first}`, `{second}`).",
            "Keep one of them.",
        )
    key, value = next(iter(said_so.items()), ("", None))
    if value and (role != "assistant" or not learned):
        whose = "the prompt" if role == "assistant" else role
        raise DataError(
            f"{where}: `{name}.{key}` asks to learn a turn of {whose}, but only the assistant's answers are learned.",
            "Remove the field; raw text of the format `text` counts as a whole.",
        )
    return learned if value is None else value


def _reasoning(item: Mapping[str, Any], role: Role, content: FieldText, where: str, name: str) -> str:
    own = reasoning_in(item, where, name)
    if (own or content.reasoning) and role != "assistant":
        raise DataError(f"{where}: `{name}` holds reasoning, but is the turn of {role}.", "Remove it there.")
    if own and content.reasoning:
        raise DataError(f"{where}: `{name}` holds reasoning in a field and in its parts too.", "Keep one of them.")
    return own or content.reasoning


def _text(item: Mapping[str, Any], key: str, where: str, name: str) -> str:
    value = item.get(key)
    return "" if absent(value) else read_text(value, where, f"{name}.{key}").text


def _merged(messages: Iterable[Message]) -> list[Message]:
    """Merge an answer with the calls that follow it, and several calls in a row, into one assistant turn."""
    merged: list[Message] = []
    for message in messages:
        before = merged[-1] if merged else None
        only_calls = message.tool_calls and not message.content and not message.reasoning
        if before and only_calls and before.role == "assistant" and before.counts == message.counts:
            merged[-1] = replace(before, tool_calls=(*before.tool_calls, *message.tool_calls))
        else:
            merged.append(message)
    return merged


def _with_names(messages: Iterable[Message]) -> tuple[Message, ...]:
    """Add the name of the tool to tool answers that only have the id of the call."""
    names: dict[str, str] = {}
    done: list[Message] = []
    for message in messages:
        for call in message.tool_calls:
            if "id" in call:
                names[call["id"]] = call["function"]["name"]
        if message.role == "tool" and not message.name and message.tool_call_id in names:
            message = replace(message, name=names[message.tool_call_id])
        done.append(message)
    return tuple(done)
