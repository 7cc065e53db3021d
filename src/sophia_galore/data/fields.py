"""The fields of records that bear meaning, in all formats: what each becomes, or why it is refused.

`TABLE` is the list. A field that changes what should be learned is honoured or refused by name; what stands in no row
(``id``, ``source``, ``metadata``, a score) changes nothing and is ignored. A field that says nothing (null, NaN, an
empty text, an empty list) counts as absent everywhere, since tables fill their gaps so.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sophia_galore.data.record import Record
from sophia_galore.errors import DataError


@dataclass(frozen=True)
class Meaning:
    """One row of the table.

    Attributes:
        names: The field's names, the usual one first.
        place: Where it stands: in a record, or in a turn of a list of messages.
        what: What it says, in words that follow "the field `x`".
        becomes: Where it goes; "refused" if nothing here can honour it.
        remedy: What to do about a field that is refused.
    """

    names: tuple[str, ...]
    place: str
    what: str
    becomes: str
    remedy: str = ""


REFUSED = "refused"
_PREFERENCES = (
    "Answers are learned here, not preferences: keep the answer that is preferred as the record's answer, and leave "
    "out the other one."
)
_TEXT_ONLY = "Remove the record, or the field if the text makes sense without it."

TABLE: tuple[Meaning, ...] = (
    Meaning(("weight", "sample_weight", "loss_weight"), "record", "says how much it counts", "1 trains, else refused"),
    Meaning(("train", "trainable"), "record", "says whether it is learned", "true trains, else refused"),
    Meaning(("train_on_input", "train_on_inputs", "train_on_prompt"), "record", "asks to learn the question", REFUSED),
    Meaning(("label", "kto_tag"), "record", "says whether the answer is a good one", "true trains, false is refused"),
    Meaning(("system", "system_prompt", "system_message"), "record", "is the system prompt", "a system turn in front"),
    Meaning(("tools", "functions"), "record", "defines tools", "Conversation.tools"),
    Meaning(("history",), "record", "holds earlier turns", "turns before the question"),
    Meaning(("reasoning_content", "reasoning", "thinking"), "record", "is the answer's reasoning", "Message.reasoning"),
    Meaning(("chosen", "chosen_response", "preferred_output"), "record", "is preference data", REFUSED, _PREFERENCES),
    Meaning(
        ("rejected", "rejected_response", "rejected_messages", "non_preferred_output"),
        "record",
        "is preference data: an answer that must not be learned",
        REFUSED,
        _PREFERENCES,
    ),
    Meaning(("image", "images", "video", "videos", "audio", "audios"), "record", "is no text", REFUSED, _TEXT_ONLY),
    Meaning(
        ("documents", "chat_template", "chat_template_kwargs"),
        "record",
        "changes how the chat template writes the record",
        REFUSED,
        "Write what it says into the messages, or set the template for all records with the model.",
    ),
    Meaning(
        (
            "weight",
            "train",
            "training",
            "trainable",
            "train_on_turn",
            "loss",
            "loss_weight",
            "loss_scale",
            "loss_mask",
            "include_in_loss",
        ),
        "turn",
        "says whether the turn is learned",
        "Message.counts",
    ),
    Meaning(("reasoning_content", "reasoning", "thinking"), "turn", "is the answer's reasoning", "Message.reasoning"),
    Meaning(("tool_calls", "function_call"), "turn", "calls tools", "Message.tool_calls"),
    Meaning(("tools", "functions"), "turn", "defines tools", "Conversation.tools"),
    Meaning(("name",), "turn", "names the tool or the speaker", "Message.name"),
    Meaning(("tool_call_id",), "turn", "says which call is answered", "Message.tool_call_id"),
    Meaning(
        ("train_detail", "training_detail"),
        "turn",
        "says which characters are learned",
        REFUSED,
        "A turn is learned as a whole or not at all: write `train` in its place, or split the record.",
    ),
    Meaning(
        ("refusal",),
        "turn",
        "is an answer that declines",
        REFUSED,
        "Write it as the turn's content if it is to be learned.",
    ),
    Meaning(
        ("mask",),
        "turn",
        "can mean both, what is learned and what is not",
        REFUSED,
        "Write `train: true` or `train: false` in its place.",
    ),
    Meaning(("image", "images", "image_url", "video", "videos", "audio"), "turn", "is no text", REFUSED, _TEXT_ONLY),
)


def names_of(becomes: str, place: str) -> tuple[str, ...]:
    """The names of the fields that go to one end.

    Args:
        becomes: As a row of the table says it.
        place: ``record`` or ``turn``.
    """
    return tuple(name for row in TABLE if (row.becomes, row.place) == (becomes, place) for name in row.names)


SYSTEM = names_of("a system turn in front", "record")
TOOLS = names_of("Conversation.tools", "record")
REASONING = names_of("Message.reasoning", "turn")
COUNTS = names_of("Message.counts", "turn")
CALLS = names_of("Message.tool_calls", "turn")
RECORD_COUNTS = names_of("1 trains, else refused", "record") + names_of("true trains, else refused", "record")
LABELS = names_of("true trains, false is refused", "record")
ASKS_FOR_INPUT = ("train_on_input", "train_on_inputs", "train_on_prompt")
_REFUSALS = {
    place: {
        name: row for row in TABLE if row.place == place and row.becomes == REFUSED and row.remedy for name in row.names
    }
    for place in ("record", "turn")
}
OPTIONAL = frozenset(name for row in TABLE if row.place == "record" for name in row.names) | {"input"}
"""Fields that no format requires: tables write their gaps in these."""

ANSWERS = ("messages", "conversations", "prompt", "completion", "instruction", "output", "text")
KNOWN = OPTIONAL | frozenset(ANSWERS)
"""Names of a record's fields that mean something here; all of them in small letters."""


def absent(value: Any) -> bool:
    """Whether a field says nothing: null, NaN, an empty or blank text, an empty list or object."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return not value.strip() if isinstance(value, str) else isinstance(value, list | tuple | Mapping) and not value


def tidied(record: Record) -> Record:
    """A record whose NaNs are null, and whose fields are named as they are known: ``Instruction`` is ``instruction``.

    Args:
        record: As it was read.
    """
    names = renamed(record)
    if not names and not any(isinstance(value, float) and math.isnan(value) for value in record.fields.values()):
        return record
    fields = {
        names.get(name, name): None if isinstance(value, float) and math.isnan(value) else value
        for name, value in record.fields.items()
    }
    return Record(fields, record.where)


def renamed(record: Record) -> dict[str, str]:
    """The fields of a record that are known by another spelling, such as ``Instruction``, with their known names.

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
    """Refuses what changes the learning and can't be honoured, in whatever format it stands.

    Args:
        record: The record, tidied.

    Raises:
        DataError: It holds a preference, something other than text, or asks to be learned otherwise.
    """
    refuse_fields(record.fields, "record", record.where)
    for name in RECORD_COUNTS:
        if flag(record.fields.get(name), record.where, name) is False:
            raise DataError(
                f"{record.where}: the field `{name}` is {shown(record.fields[name])}: this record is not to be "
                "learned from.",
                "Remove the record, or the field.",
            )
    for name in ASKS_FOR_INPUT:
        if flag(record.fields.get(name), record.where, name):
            raise DataError(
                f"{record.where}: the field `{name}` asks to learn the question too, but only answers are learned.",
                "Remove the field; raw text of the format `text` counts as a whole.",
            )


def refuse_label(record: Record, *, of_answer: bool) -> None:
    """Refuses an answer that is labelled as a bad one; a good one is learned, and a class's name says neither.

    Args:
        record: The record, tidied.
        of_answer: Whether the record has an answer, of which 0 says that it is bad; beside raw text 0 is a class.

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
    """Refuses the fields whose row says so.

    Args:
        fields: Fields by name.
        place: ``record`` or ``turn``.
        where: The record's place.
        within: The turn, for messages.

    Raises:
        DataError: There is one, and it says something.
    """
    for name, value in fields.items():
        row = _REFUSALS[place].get(name)
        if row is not None and not absent(value) and value is not False and value != "[]":
            label = f"{within}.{name}" if within else name
            raise DataError(f"{where}: the field `{label}` {row.what}.", row.remedy)


def flag(value: Any, where: str, name: str) -> bool | None:
    """Reads a field that says whether something counts.

    Args:
        value: The field's value.
        where: The record's place.
        name: The field's name, for messages.

    Returns:
        What it says; None if it says nothing.

    Raises:
        DataError: It is something between, or no truth value at all.
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
    """The one value among several names of the same thing.

    Args:
        fields: Fields by name.
        names: Names that mean the same.
        where: The record's place.
        within: The turn, for messages.

    Returns:
        The name in use and its value; ("", None) if none says anything.

    Raises:
        DataError: Two of them say different things.
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
    """What a text holds that is a list or an object, written as JSON or as Python writes it; else the value itself.

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
    """A value as JSON writes it, cut to a length that fits into a sentence."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def present(record: Record) -> list[str]:
    """The names of a record's fields that are not null (tables fill absent fields with null)."""
    return [str(name) for name, value in record.fields.items() if value is not None]


def listed(names: list[str]) -> str:
    """Field names for a message.

    Args:
        names: The names; long lists are shortened.

    Returns:
        Such as "`a`, `b`", or "no field at all".
    """
    if not names:
        return "no field at all"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(f"`{name}`" for name in names[:8]) + more
