"""The record formats: telling them apart, and turning each into conversations.

    alpaca             instruction, output; optional: input, system, history (list of [question, answer])
    sharegpt           conversations: list of {from, value}
    messages           messages: list of {role, content}
    prompt_completion  prompt, completion: two strings or two lists of messages
    text               text

A field that is null counts as absent, since tables fill their gaps with nulls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from sophia_galore.data.conversation import Conversation, Message, checked_string, listed, present, string_field
from sophia_galore.data.record import Record
from sophia_galore.data.turns import require_answer, turns
from sophia_galore.errors import DataError

# In this order: data sets often keep a rendered `text` or the first `prompt` beside the full conversation.
MARKS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}


def detect_format(records: Sequence[Record]) -> str:
    """Recognises the format that all records share.

    Args:
        records: The records.

    Returns:
        A key of `MARKS`.

    Raises:
        DataError: The first record fits no format, or a later one fits another than the first.
    """
    if not records:
        raise DataError("There is no record to recognise a format by.")
    first = _format_of(records[0])
    if first is None:
        raise DataError(
            f"{records[0].where}: no known format has the fields {listed(present(records[0]))}.",
            "Known are: "
            + "; ".join(f"{name} ({' + '.join(f'`{field}`' for field in marks)})" for name, marks in MARKS.items())
            + ".",
        )
    for record in records:
        # A record that fits none is left to its conversion, which knows what field is missing.
        if (other := _format_of(record)) not in (first, None):
            raise DataError(
                f"{record.where}: this record is {other} ({listed(present(record))}), but {records[0].where} is "
                f"{first}: formats are mixed.",
                "Split the data by format and convert one part, or name the format with `data.format`.",
            )
    return first


def to_conversation(record: Record, format: str) -> Conversation:
    """Turns one record into a conversation.

    Args:
        record: The record.
        format: A key of `MARKS`.

    Returns:
        The conversation; it has something to learn.

    Raises:
        DataError: A field is missing, of a wrong type or empty; the message names file, place
            and field.
    """
    return CONVERSIONS[format](record)


def _format_of(record: Record) -> str | None:
    for name, marks in MARKS.items():
        if any(record.fields.get(mark) is not None for mark in marks):
            return name
    return None


def _alpaca(record: Record) -> Conversation:
    system = string_field(record, "system", required=False)
    instruction = string_field(record, "instruction")
    context = string_field(record, "input", required=False)
    answer = _filled(string_field(record, "output"), record, "output")
    question = "\n".join(part for part in (instruction, context) if part.strip())
    _filled(question, record, "instruction")
    messages: list[Message] = [Message("system", system)] if system.strip() else []
    for index, (asked, answered) in enumerate(_history(record)):
        answered = _filled(answered, record, f"history[{index}][1]")
        messages += [Message("user", asked), Message("assistant", answered)]
    messages += [Message("user", question), Message("assistant", answer)]
    return Conversation(tuple(messages), record.where)


def _history(record: Record) -> list[tuple[str, str]]:
    history = record.fields.get("history")
    if history is None or history == "":
        return []
    if not isinstance(history, list):
        raise DataError(
            f"{record.where}: the field `history` is of type {type(history).__name__} where a list is expected.",
            "Write a list of [question, answer] pairs.",
        )
    pairs = []
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(
                f"{record.where}: `history[{index}]` is not a pair.", "Write [question, answer] there, two strings."
            )
        asked, answered = (
            checked_string(part, record.where, f"history[{index}][{side}]") for side, part in enumerate(pair)
        )
        pairs.append((asked, answered))
    return pairs


def _sharegpt(record: Record) -> Conversation:
    return _chat(record, "conversations")


def _messages(record: Record) -> Conversation:
    return _chat(record, "messages")


def _chat(record: Record, field: str) -> Conversation:
    messages = turns(record, field)
    require_answer(messages, record.where, field)
    return Conversation(messages, record.where)


def _prompt_completion(record: Record) -> Conversation:
    prompt, completion = record.fields.get("prompt"), record.fields.get("completion")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        asked = _filled(string_field(record, "prompt"), record, "prompt")
        answer = _filled(string_field(record, "completion"), record, "completion")
        return Conversation((Message("user", asked), Message("assistant", answer)), record.where, kind="completion")
    context = tuple(replace(message, counts=False) for message in turns(record, "prompt"))
    answers = turns(Record({"completion": completion}, record.where), "completion")
    require_answer(answers, record.where, "completion")
    return Conversation(context + answers, record.where)


def _text(record: Record) -> Conversation:
    text = _filled(string_field(record, "text"), record, "text")
    return Conversation((), record.where, kind="text", text=text)


def _filled(value: str, record: Record, name: str) -> str:
    if not value.strip():
        raise DataError(
            f"{record.where}: the field `{name}` is empty.", "Fill it in or remove the record: it would teach nothing."
        )
    return value


CONVERSIONS: dict[str, Callable[[Record], Conversation]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "text": _text,
}
