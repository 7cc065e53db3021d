"""Render a conversation with a chat template, and find the text of each message in the result.

The template is rendered twice: with the messages, and with placeholders instead. In the second text, everything around
the placeholders was written by the template. If replacing the placeholders by the messages gives the first text, the
exact position of each message is known, whatever it says and whatever the template writes around it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sophia_galore.data.conversation import Conversation, Message
from sophia_galore.data.template_date import with_date
from sophia_galore.data.training_template import MARKERS, own_template, training_template
from sophia_galore.errors import DataError, ModelError, short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = list[dict[str, Any]]
# Tags that a template may search for in a message, such as </think>: placeholders do not replace them.
_TAGS = re.compile(r"<[|｜/]?[\w▁-]+[|｜]?>|\[/?[A-Z][A-Z_]*\]")


class TemplateRefusal(Exception):
    """A chat template refuses a conversation; the message is the template's."""


class ChatTemplate:
    """A tokenizer's chat template, or its version for training, with a fixed date.

    Args:
        tokenizer: A tokenizer with a chat template.
        date: The date that the template sees, as `2026-11-28`; "": the current date.
        for_tools: Whether conversations come with tools; some models have a separate template for that.

    Raises:
        DataError: There are several templates and no default.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, date: str = "", for_tools: bool = False) -> None:
        self._tokenizer = tokenizer
        text = training_template(tokenizer, for_tools=for_tools) or own_template(tokenizer, for_tools=for_tools)
        self.is_marked = bool(MARKERS.search(text))
        tags = sorted({tag for tag in _TAGS.findall(text)}, key=len, reverse=True)
        self._tags = re.compile("|".join(re.escape(tag) for tag in tags)) if tags else None
        self.knows_developer = "developer" in text
        self.text = with_date(text, date)

    def write(self, chat: Chat, tools: Sequence[Mapping[str, Any]] = (), *, prompt: bool = False) -> str:
        """Render messages.

        Args:
            chat: The messages as the template takes them.
            tools: Definitions of tools.
            prompt: Whether to append the generation prompt.

        Returns:
            The text.

        Raises:
            TemplateRefusal: The template refuses them.
        """
        options: dict[str, Any] = {"tools": [dict(tool) for tool in tools]} if tools else {}
        try:
            written = self._tokenizer.apply_chat_template(
                chat, chat_template=self.text, tokenize=False, add_generation_prompt=prompt, **options
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise TemplateRefusal(short(error)) from error
        return str(written)

    def marked(self, chat: Chat, tools: Sequence[Mapping[str, Any]], whole: str) -> list[tuple[int, int]]:
        """Return the assistant's text by the template's `{% generation %}` markers.

        Args:
            chat: The messages as the template takes them.
            tools: Definitions of tools.
            whole: The text that the template writes without the markers.

        Returns:
            Half-open ranges of characters in order; none if there are no markers, or the text with markers differs.
        """
        if not self.is_marked:
            return []
        from transformers.utils.chat_template_utils import render_jinja_template

        options: dict[str, Any] = {"tools": [dict(tool) for tool in tools]} if tools else {}
        try:
            written, spans = render_jinja_template(
                [chat],
                chat_template=self.text,
                return_assistant_tokens_mask=True,
                **options,
                **self._tokenizer.special_tokens_map,
            )
        except Exception:  # the spans can also be found without markers
            return []
        return [(int(begin), int(end)) for begin, end in spans[0]] if written[0] == whole else []

    def chat(self, messages: Sequence[Message]) -> Chat:
        """Return messages as the template takes them; role developer becomes system if it is unknown there."""
        chat: Chat = []
        for message in messages:
            given = message.for_template()
            if message.role == "developer" and not self.knows_developer:
                given["role"] = "system"
            if message.reasoning:
                given["thinking"] = message.reasoning  # the templates of gpt-oss read this field
            chat.append(given)
        return chat

    def parts(self, said: str) -> list[tuple[str, bool]]:
        """Split a message at tags that the template may search for.

        Returns:
            Pieces whose concatenation is the message, and for each whether a placeholder may replace it. Outer
            whitespace, which templates trim, is a separate piece.
        """
        cut = re.split(f"({self._tags.pattern})", said) if self._tags else [said]
        # Every second piece is a tag. If there is nothing but tags, they are the message.
        if not any(text.strip() for text in cut[::2]):
            cut = [said]
        pieces: list[tuple[str, bool]] = []
        for place, text in enumerate(cut):
            core = text.strip()
            if place % 2 or not core:
                pieces.append((text, False))
                continue
            begin = text.index(core)
            pieces += [(text[:begin], False), (core, True), (text[begin + len(core) :], False)]
        return pieces


@dataclass(frozen=True)
class Place:
    """A piece of a message and its position in the rendered text.

    Args:
        message: Number of the message, from 0.
        field: `content`, `reasoning` or `call` (the name of a called tool).
        begin: Position of its first character in the rendered text; -1: the template leaves it out.
        end: Position after its last character.
        said: The text of the piece.
        lead: For a field's first piece, the tags and whitespace before it.
        trail: For a field's last piece, the tags and whitespace after it.
    """

    message: int
    field: str
    begin: int
    end: int
    said: str
    lead: str = ""
    trail: str = ""

    @property
    def is_written(self) -> bool:
        """Whether the template writes it."""
        return self.begin >= 0


@dataclass(frozen=True)
class Written:
    """A rendered conversation.

    Args:
        text: The whole text.
        chat: The messages as the template took them.
        places: The pieces of the messages; those of one message in their order.
        is_complete: Whether all messages were located; else only the assistant's were.
    """

    text: str
    chat: Chat
    places: tuple[Place, ...]
    is_complete: bool


def write_chat(conversation: Conversation, template: ChatTemplate) -> Written:
    """Render a conversation and locate its messages.

    Args:
        conversation: A conversation with messages.
        template: The chat template.

    Returns:
        The text and the positions of the messages.

    Raises:
        DataError: The template refuses the conversation, or changes the text of messages.
        ModelError: The template fails even on the simplest chat.
    """
    tools = conversation.tools
    chat, whole = _write(conversation, template)

    # A template may depend on the user's text, so if replacing all messages fails, replace the answers only.
    for answers_only in (False, True):
        word = _placeholder(json.dumps([chat, list(tools)], ensure_ascii=False, default=str) + template.text)
        swapped, pieces = _swap(chat, template, word, answers_only=answers_only)
        try:
            places = _places(template.write(swapped, tools), pieces, word, whole)
        except TemplateRefusal:
            continue
        if places is not None:
            return Written(whole, chat, places, is_complete=not answers_only)
    raise DataError(
        f"{conversation.where}: this model's chat template writes a turn differently depending on what is said in it, "
        "so the assistant's part can't be told apart.",
        "Use another chat template (model.chat_template), or data of the format `text`.",
    )


def _write(conversation: Conversation, template: ChatTemplate) -> tuple[Chat, str]:
    chat = template.chat(conversation.messages)
    try:
        return chat, template.write(chat, conversation.tools)
    except TemplateRefusal as refusal:
        said = str(refusal)
    # Some templates want a call's arguments as JSON in a string.
    if any("tool_calls" in message for message in chat):
        chat = [_with_strings(message) for message in chat]
        try:
            return chat, template.write(chat, conversation.tools)
        except TemplateRefusal:
            pass
    _refuse_broken_template(template)
    raise DataError(
        f"{conversation.where}: the model's chat template refuses this conversation: {said}.",
        "Change the order or the roles of its turns, or remove the record.",
    )


def _with_strings(message: dict[str, Any]) -> dict[str, Any]:
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"].get("arguments", {}))}}
        for call in message.get("tool_calls", [])
        if isinstance(call.get("function"), Mapping)
    ]
    return {**message, "tool_calls": calls} if calls else message


def _refuse_broken_template(template: ChatTemplate) -> None:
    """Raise an error if even the simplest chat fails: then no record is at fault."""
    try:
        template.write([{"role": "user", "content": "Question?"}, {"role": "assistant", "content": "Answer."}])
    except TemplateRefusal as refusal:
        raise ModelError(
            f"The model's chat template fails even on one question and its answer: {refusal}.",
            "Set another one (model.chat_template), or use data of the format `text`.",
        ) from refusal


def _placeholder(said: str) -> str:
    """Return a prefix for placeholders that does not occur in a text."""
    number = 0
    while (word := f"Zq{number}x") in said:
        number += 1
    return word


def _swap(chat: Chat, template: ChatTemplate, word: str, *, answers_only: bool) -> tuple[Chat, list[Place]]:
    """Replace the text of messages, or of the assistant's only, by placeholders."""
    pieces: list[Place] = []

    def replace_text(index: int, field: str, said: str) -> str:
        text = apart = ""
        first = len(pieces)
        for piece, is_replaceable in template.parts(said):
            if is_replaceable:
                text += f"{apart}{word}{len(pieces)}q"
                pieces.append(Place(index, field, -1, -1, piece, lead=apart if len(pieces) == first else ""))
                apart = ""
            else:
                apart += piece
        if len(pieces) > first:
            pieces[-1] = replace(pieces[-1], trail=apart)
        return text + apart

    swapped: Chat = []
    for index, message in enumerate(chat):
        message = dict(message)
        if not answers_only or message["role"] == "assistant":
            if message.get("reasoning_content"):
                message["reasoning_content"] = message["thinking"] = replace_text(
                    index, "reasoning", message["reasoning_content"]
                )
            message["content"] = replace_text(index, "content", message["content"])
            if message.get("tool_calls"):
                message["tool_calls"] = [_renamed(call, index, replace_text) for call in message["tool_calls"]]
        swapped.append(message)
    return swapped, pieces


def _renamed(call: Mapping[str, Any], index: int, replace_text: Callable[[int, str, str], str]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return dict(call)
    return {**call, "function": {**function, "name": replace_text(index, "call", function["name"])}}


def _places(text: str, pieces: Sequence[Place], word: str, whole: str) -> tuple[Place, ...] | None:
    """Locate the pieces by replacing the placeholders; None: the result is not the original text."""
    found: dict[int, tuple[int, int]] = {}
    length, last, filled = 0, 0, []
    for match in re.finditer(rf"{word}(\d+)q", text):
        number = int(match[1])
        between = text[last : match.start()]
        begin = length + len(between)
        end = begin + len(pieces[number].said)
        filled += [between, pieces[number].said]
        # If a piece is written twice, the later one is the turn itself; but a tool's answer repeats the called name.
        if number not in found or pieces[number].field != "call":
            found[number] = begin, end
        length, last = end, match.end()
    if "".join(filled) + text[last:] != whole:
        return None
    return tuple(
        replace(piece, begin=begin, end=end)
        for piece, (begin, end) in ((piece, found.get(number, (-1, -1))) for number, piece in enumerate(pieces))
    )
