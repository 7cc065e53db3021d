"""Detect the format of records and convert them to conversations.

    alpaca             instruction, output; optional: input
    sharegpt           conversations: list of {from, value}
    messages           messages: list of {role, content}
    prompt_completion  prompt, completion: two texts or two lists of messages
    text               text

Fields that any format may have are in `fields.py`. A null field counts as absent, since tables fill gaps with nulls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from sophia_galore.data.content import field_text, is_parts, read_text, reasoning_in, text_field
from sophia_galore.data.conversation import Conversation, Message
from sophia_galore.data.fields import absent, listed, normalised, one_of, parsed, present, refuse_by_name, refuse_label
from sophia_galore.data.meanings import REASONING, SYSTEM, TOOLS
from sophia_galore.data.record import Record
from sophia_galore.data.tools import tools_of
from sophia_galore.data.turns import require_answer, system_of, turns
from sophia_galore.errors import DataError

# The order matters: data sets often keep a rendered `text` or the first `prompt` beside the full conversation.
MARKS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}


def detect_format(records: Sequence[Record]) -> str:
    """Detect the format that all records share.

    Args:
        records: The records.

    Returns:
        A key of `MARKS`.

    Raises:
        DataError: No record fits a format, or one fits another than those before it.
    """
    if not records:
        raise DataError("There is no record to recognise a format by.")
    first, place = "", ""
    for record in records:
        # The conversion reports a record that fits no format: it knows which field is missing.
        others = _formats_of(record)
        if others and not first:
            first, place = others[0], record.where
        elif others and first not in others:
            raise DataError(
                f"{record.where}: this record is {others[0]} ({listed(present(record))}), but {place} is "
                f"{first}: formats are mixed.",
                "Split the data by format and convert one part, or name the format with `data.format`.",
            )
    if first:
        return first
    refuse_by_name(normalised(records[0]))
    raise DataError(
        f"{records[0].where}: no known format has the fields {listed(present(records[0]))}.",
        "Known are: "
        + "; ".join(f"{name} ({' + '.join(f'`{field}`' for field in marks)})" for name, marks in MARKS.items())
        + ".",
    )


def to_conversation(record: Record, format: str) -> Conversation:
    """Turn one record into a conversation.

    Args:
        record: The record.
        format: A key of `MARKS`.

    Returns:
        The conversation; it has at least one target.

    Raises:
        DataError: A field is missing, empty, of a wrong type, or not supported; the message names location and field.
    """
    record = normalised(record)
    refuse_by_name(record)
    refuse_label(record, of_answer=format != "text")
    return CONVERSIONS[format](record)


def _formats_of(record: Record) -> list[str]:
    """Return the formats whose fields are all in a record; if there are none, those with at least one field in it."""
    fields = normalised(record).fields
    there = {name: [fields.get(mark) is not None for mark in marks] for name, marks in MARKS.items()}
    # Any record may hold a rendered `text` as well.
    whole = [name for name, marks in there.items() if all(marks) and name != "text"]
    return whole or [name for name, marks in there.items() if any(marks)]


def _alpaca(record: Record) -> Conversation:
    instruction = text_field(record, "instruction")
    context = text_field(record, "input", required=False)
    answer = _answer(record, "output")
    question = "\n".join(part for part in (instruction, context) if part.strip())
    _require_text(question, record, "instruction")
    return Conversation(
        (*_earlier_turns(record), Message("user", question), answer), record.where, tools=tools_of(record)
    )


def _prompt_completion(record: Record) -> Conversation:
    prompt, completion = record.fields.get("prompt"), record.fields.get("completion")
    if _are_messages(prompt, completion):
        context = turns(record, "prompt", learned=False)
        answers = turns(Record({"completion": completion}, record.where), "completion")
        require_answer(answers, record.where, "completion")
        _refuse_history(record, "prompt")
        return Conversation(
            (*context, *_with_reasoning(record, answers)), record.where, tools=tools_of(record, _items(prompt))
        )
    asked = Message("user", _require_text(text_field(record, "prompt"), record, "prompt"))
    answer = _answer(record, "completion")
    before, tools = _earlier_turns(record), tools_of(record)
    # Only a bare question and answer can also be written without a chat template, one after the other.
    bare = not before and not tools and not answer.reasoning
    return Conversation((*before, asked, answer), record.where, kind="completion" if bare else "chat", tools=tools)


def _are_messages(prompt: object, completion: object) -> bool:
    """Return whether prompt and completion are lists of messages, perhaps as JSON text."""
    both = [parsed(value) for value in (prompt, completion)]
    if all(_is_chat(value) for value in both):
        return True
    return any(isinstance(value, list) and value and not is_parts(value) for value in (prompt, completion))


def _is_chat(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and (item.get("role") or item.get("from")) for item in value)
    )


def _items(value: object) -> list[object]:
    value = parsed(value)
    return value if isinstance(value, list) else []


def _answer(record: Record, name: str) -> Message:
    """Return the only answer of a record, with its reasoning."""
    content = field_text(record, name)
    thought = reasoning_in(_without_reasoning_modes(record), record.where)
    if thought and content.reasoning:
        raise DataError(
            f"{record.where}: the record holds reasoning in a field and in the parts of `{name}` too.",
            "Keep one of them.",
        )
    _require_text(content.text, record, name)
    return Message("assistant", content.text, reasoning=thought or content.reasoning)


def _earlier_turns(record: Record) -> tuple[Message, ...]:
    """Return the messages before the question: the system prompt and earlier turns."""
    system = system_of(record)
    messages = [Message("system", system)] if system.strip() else []
    for index, (asked, answered) in enumerate(_history(record)):
        answered = _require_text(answered, record, f"history[{index}][1]")
        messages += [Message("user", asked), Message("assistant", answered)]
    return tuple(messages)


def _history(record: Record) -> list[tuple[str, str]]:
    history = parsed(record.fields.get("history"))
    if absent(history):
        return []
    if not isinstance(history, list):
        raise DataError(
            f"{record.where}: the field `history` is of type {type(history).__name__} where a list is expected.",
            "Write a list of [question, answer] pairs.",
        )
    pairs = []
    for index, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(
                f"{record.where}: `history[{index}]` is not a pair.", "Write [question, answer] there, two strings."
            )
        asked, answered = (
            read_text(part, record.where, f"history[{index}][{side}]").text for side, part in enumerate(pair)
        )
        pairs.append((asked, answered))
    return pairs


def _chat(record: Record, field: str) -> Conversation:
    messages = turns(record, field)
    require_answer(messages, record.where, field)
    _refuse_history(record, field)
    tools = tools_of(record, _items(record.fields.get(field)))
    return Conversation(_with_reasoning(record, messages), record.where, tools=tools)


def _refuse_history(record: Record, field: str) -> None:
    if _items(record.fields.get("history")):
        raise DataError(
            f"{record.where}: the field `history` holds turns beside those of `{field}`.",
            f"Write them into `{field}`, at its beginning.",
        )


def _with_reasoning(record: Record, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the messages with the reasoning that a field of the record holds; it must be clear whose it is."""
    thought = reasoning_in(_without_reasoning_modes(record), record.where)
    if not thought:
        return messages
    answers = [message for message in messages if message.role == "assistant"]
    if len(answers) == 1 and answers[0].reasoning in ("", thought):
        return tuple(replace(message, reasoning=thought) if message is answers[0] else message for message in messages)
    name, _ = one_of(record.fields, REASONING, record.where)
    raise DataError(
        f"{record.where}: the field `{name}` is the reasoning of one answer, but does not say of which.",
        "Write it into that answer's message, as `reasoning_content`.",
    )


def _without_reasoning_modes(record: Record) -> dict[str, object]:
    """Return the fields without those that only set a reasoning mode, such as ``reasoning: "off"``."""
    modes = ("on", "off", "true", "false", "none", "low", "medium", "high")
    return {
        name: value
        for name, value in record.fields.items()
        if name not in REASONING or not (isinstance(value, bool) or str(value).strip().lower() in modes)
    }


def _text(record: Record) -> Conversation:
    text = _require_text(text_field(record, "text"), record, "text")
    for name in (*SYSTEM, *TOOLS, *REASONING):
        value = record.fields.get(name)
        if not absent(parsed(value)) and name in _without_reasoning_modes(record):
            raise DataError(
                f"{record.where}: the field `{name}` can't be used with raw text, which is learned as it is.",
                "Write it into `text`, or give the record as `messages`.",
            )
    return Conversation((), record.where, kind="text", text=text)


def _require_text(value: str, record: Record, name: str) -> str:
    if not value.strip():
        raise DataError(
            f"{record.where}: the field `{name}` is empty.", "Fill it in or remove the record: it would teach nothing."
        )
    return value


CONVERSIONS: dict[str, Callable[[Record], Conversation]] = {
    "alpaca": _alpaca,
    "sharegpt": partial(_chat, field="conversations"),
    "messages": partial(_chat, field="messages"),
    "prompt_completion": _prompt_completion,
    "text": _text,
}
