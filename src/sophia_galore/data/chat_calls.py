"""Find tool calls in rendered chats: check that they are complete, and find where they end."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from sophia_galore.data.chat_frame import Frame, end_tokens_length
from sophia_galore.data.chat_text import Written
from sophia_galore.data.conversation import Conversation
from sophia_galore.errors import DataError


def tool_name(tool: Mapping[str, Any]) -> str:
    """Return the name in a tool definition; "" if it has none.

    Args:
        tool: The definition, at the top level or within `function`.
    """
    function = tool.get("function", tool)
    name = function.get("name", "") if isinstance(function, Mapping) else ""
    return name if isinstance(name, str) else ""


def end_of_calls(conversation: Conversation, written: Written, frame: Frame, index: int, last: int, after: int) -> int:
    """Find the end of a turn that ends with the arguments of a call.

    Args:
        conversation: The conversation.
        written: The conversation as the template renders it.
        frame: The template's text around turns.
        index: Number of the turn.
        last: Position after the last located text of the turn, such as the name of the tool.
        after: Position where the next message begins.

    Returns:
        The position after the token that ends the turn.

    Raises:
        DataError: The template leaves out an argument, or the end can't be found.
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
        return low + match.start() + end_tokens_length(text[low + match.start() : after], frame.call_ends)
    if frame.tail.strip() and (place := text.find(frame.tail.strip(), low, after)) >= 0:
        return place + len(frame.tail.strip())
    raise DataError(
        f"{conversation.where}: it can't be told where the call of a tool in message {index + 1} ends in what the "
        "model's chat template writes.",
        "Set another chat template (model.chat_template), or remove the record.",
    )


def _past_whole(text: str, arguments: Any, low: int, high: int) -> int:
    """Return the position after arguments that are written as JSON; -1 if they are not."""
    forms = [arguments] if isinstance(arguments, str) else []
    for separators in (None, (",", ":")):
        forms += [json.dumps(arguments, ensure_ascii=ascii, separators=separators) for ascii in (False, True)]
    places = [place + len(form) for form in forms if form and (place := text.rfind(form, low, high)) >= 0]
    return max(places, default=-1)


def _past_leaves(text: str, arguments: Any, low: int, high: int) -> int:
    """Return the position after arguments in a template-specific form; -1 if one is missing."""
    reached = low
    for leaf in _leaves(arguments):
        forms = [leaf, *(json.dumps(leaf, ensure_ascii=ascii)[1:-1] for ascii in (False, True))]
        ends = [place + len(form) for form in forms if (place := text.find(form, reached, high)) >= 0]
        if not ends and not any(form in text[low:high] for form in forms):
            return -1
        reached = min(ends, default=reached)
    return reached


def _leaves(value: Any) -> Iterator[str]:
    """Yield the texts in the arguments of a call, including the names of arguments."""
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
