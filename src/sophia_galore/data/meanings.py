"""The meaning of record fields, in all formats: how each is used, or why it is refused.

A field that changes what should be learned is used or refused by name. Fields without a row in `TABLE` (``id``,
``source``, ``metadata``, a score) are ignored. An empty field (null, NaN, empty text, empty list) counts as absent
everywhere, since tables fill gaps in this way.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Meaning:
    """One row of the table.

    Attributes:
        names: The field's names, the usual one first.
        place: ``record``, or ``turn`` for a message of a list.
        what: What it says, as the continuation of "the field `x`".
        becomes: How it is used; "refused" if it is not supported.
        remedy: What to do about a refused field.
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
    # A number here is a measured loss, not a flag.
    Meaning(("loss",), "record", "says whether it is learned", "true trains, false is refused; a number is ignored"),
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
    """Return the names of the fields with one use.

    Args:
        becomes: The use, as in the table.
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
REFUSALS = {
    place: {
        name: row for row in TABLE if row.place == place and row.becomes == REFUSED and row.remedy for name in row.names
    }
    for place in ("record", "turn")
}
OPTIONAL = frozenset(name for row in TABLE if row.place == "record" for name in row.names) | {"input"}
"""Fields that no format requires, so a table may have gaps in them."""

ANSWERS = ("messages", "conversations", "prompt", "completion", "instruction", "output", "text")
KNOWN = OPTIONAL | frozenset(ANSWERS)
"""All field names of records with a meaning, in lower case."""
