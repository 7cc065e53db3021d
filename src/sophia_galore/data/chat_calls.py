"""Calls of tools in what a chat template writes: that they are whole, and where they end."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from sophia_galore.data.chat_frame import Frame, leading_run
from sophia_galore.data.chat_text import Written
from sophia_galore.data.conversation import Conversation
from sophia_galore.errors import DataError


def tool_name(tool: Mapping[str, Any]) -> str:
    """The name in a tool's definition; "" if it has none.

    Args:
        tool: The definition, by itself or within `function`.
    """
    function = tool.get("function", tool)
    name = function.get("name", "") if isinstance(function, Mapping) else ""
    return name if isinstance(name, str) else ""


def end_of_calls(conversation: Conversation, written: Written, frame: Frame, index: int, last: int, after: int) -> int:
    """Finds the end of a turn whose last words are a call's arguments.

    Args:
        conversation: The conversation.
        written: What the template writes of it.
        frame: What the template writes around turns.
        index: The turn's number.
        last: Past the last words of the turn whose place is known, such as the name of the tool.
        after: Where the next message begins.

    Returns:
        The place past the token that ends the turn.

    Raises:
        DataError: The template leaves out an argument, or the end can't be told.
    """
    text, low = written.text, last
    for call in conversation.messages[index].tool_calls:
        arguments = (call.get("function") or {}).get("arguments", {})
        reached = _past_whole(text, arguments, last, after)
        if reached < 0:
            reached = _past_leaves(text, arguments, last, after)
        if reached < 0:
            raise DataError(
                f"{conversation.where}: the model's chat template leaves out an argument of the tool that message "
                f"{index + 1} calls.",
                "Remove the call from the record, or use a model whose chat template has a place for it.",
            )
        low = max(low, reached)
    for match in re.finditer("|".join(map(re.escape, frame.call_ends)) or r"(?!)", text[low:after]):
        return low + match.start() + leading_run(text[low + match.start() : after], frame.call_ends)
    if frame.tail.strip() and (place := text.find(frame.tail.strip(), low, after)) >= 0:
        return place + len(frame.tail.strip())
    raise DataError(
        f"{conversation.where}: it can't be told where the call of a tool in message {index + 1} ends in what the "
        "model's chat template writes.",
        "Set another chat template (model.chat_template), or remove the record.",
    )


def _past_whole(text: str, arguments: Any, low: int, high: int) -> int:
    """Past arguments that are written as JSON in one of its common forms; -1: they are not."""
    forms = [arguments] if isinstance(arguments, str) else []
    for separators in (None, (",", ":")):
        forms += [json.dumps(arguments, ensure_ascii=ascii, separators=separators) for ascii in (False, True)]
    places = [place + len(form) for form in forms if form and (place := text.rfind(form, low, high)) >= 0]
    return max(places, default=-1)


def _past_leaves(text: str, arguments: Any, low: int, high: int) -> int:
    """Past arguments that are written in a form of the template's own; -1: one is missing."""
    reached = low
    for leaf in _leaves(arguments):
        forms = [leaf, *(json.dumps(leaf, ensure_ascii=ascii)[1:-1] for ascii in (False, True))]
        ends = [place + len(form) for form in forms if (place := text.find(form, reached, high)) >= 0]
        if not ends and not any(form in text[low:high] for form in forms):
            return -1
        reached = min(ends, default=reached)
    return reached


def _leaves(value: Any) -> Iterator[str]:
    """The texts in a call's arguments, names of arguments among them."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str) and value:
        yield value
