"""A conversation written with a chat template, and where in that text each message's own words stand.

The template is rendered twice: with what is said, and with an invented word in its place. What the second text has
around the invented words is the template's own. If what was said, put back there, gives the first text, then it is
known to the character where the template wrote it, whatever was said and whatever the template writes around it.
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
# Marks that a template may look for in what is said, such as </think>: they stay where they are.
_TAGS = re.compile(r"<[|｜/]?[\w▁-]+[|｜]?>|\[/?[A-Z][A-Z_]*\]")


class TemplateRefusal(Exception):
    """A chat template does not write a conversation; the words are its own."""


class ChatTemplate:
    """A tokenizer's chat template, or the version of it that is made for training, on a fixed day.

    Args:
        tokenizer: A tokenizer with a chat template.
        date: The day that the template sees, as `2026-11-28`; "": whatever day it is.
        for_tools: Whether conversations come with tools; some models have a template of their own for that.

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
        """Renders messages.

        Args:
            chat: The messages as the template takes them.
            tools: Definitions of tools.
            prompt: Whether what an answer begins with follows.

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
        """What the template's own markers say the assistant says.

        Args:
            chat: The messages as the template takes them.
            tools: Definitions of tools.
            whole: What the template writes.

        Returns:
            Half-open ranges of characters in order; none if there are no markers or they speak of another text.
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
        except Exception:  # what it says without markers is known, and will do
            return []
        return [(int(begin), int(end)) for begin, end in spans[0]] if written[0] == whole else []

    def chat(self, messages: Sequence[Message]) -> Chat:
        """Messages as the template takes them; a developer is a system turn where it does not know that role."""
        chat: Chat = []
        for message in messages:
            given = message.for_template()
            if message.role == "developer" and not self.knows_developer:
                given["role"] = "system"
            if message.reasoning:
                given["thinking"] = message.reasoning  # which is what the templates of gpt-oss read
            chat.append(given)
        return chat

    def parts(self, said: str) -> list[tuple[str, bool]]:
        """Cuts what is said at marks that the template may look for.

        Returns:
            Pieces that give the text again, and for each whether an invented word may stand in its place. Outer
            whitespace, which templates trim, is a piece of its own.
        """
        cut = re.split(f"({self._tags.pattern})", said) if self._tags else [said]
        # Every second piece is a mark. Where there is nothing but marks, they are what is said.
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
    """A piece of what a message says.

    Args:
        message: The message's number, from 0.
        field: `content`, `reasoning` or `call`, the name of a tool that is called.
        begin: Its first character in the written text; -1: the template leaves it out.
        end: Past its last character.
        said: The piece.
        lead: In a field's first piece, what stands before it there: marks and whitespace.
        trail: In its last piece, what stands behind it.
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
    """A conversation as its template writes it.

    Args:
        text: The whole text.
        chat: The messages as the template took them.
        places: The pieces of what the messages say; those of one message in its own order.
        is_complete: Whether all messages have their places; else only the assistant's have.
    """

    text: str
    chat: Chat
    places: tuple[Place, ...]
    is_complete: bool


def write_chat(conversation: Conversation, template: ChatTemplate) -> Written:
    """Writes a conversation and finds the places of what its messages say.

    Args:
        conversation: A conversation with messages.
        template: The chat template.

    Returns:
        The text and the places.

    Raises:
        DataError: The template refuses the conversation, or rewrites what is said in it.
        ModelError: The template fails on the simplest chat too.
    """
    tools = conversation.tools
    chat, whole = _write(conversation, template)

    def everything(message: Mapping[str, Any]) -> bool:
        return True

    def answers(message: Mapping[str, Any]) -> bool:
        return bool(message["role"] == "assistant")

    # What a template does may depend on what a user says, so that inventing all of it may be too much.
    for chosen in (everything, answers):
        word = _invented(json.dumps([chat, list(tools)], ensure_ascii=False, default=str) + template.text)
        swapped, pieces = _swap(chat, template, chosen, word)
        try:
            places = _places(template.write(swapped, tools), pieces, word, whole)
        except TemplateRefusal:
            continue
        if places is not None:
            return Written(whole, chat, places, chosen is everything)
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
    """Where the simplest chat fails too, no record is to blame."""
    try:
        template.write([{"role": "user", "content": "Question?"}, {"role": "assistant", "content": "Answer."}])
    except TemplateRefusal as refusal:
        raise ModelError(
            f"The model's chat template fails even on one question and its answer: {refusal}.",
            "Set another one (model.chat_template), or use data of the format `text`.",
        ) from refusal


def _invented(said: str) -> str:
    """What invented words begin with: nothing that is said."""
    number = 0
    while (word := f"Zq{number}x") in said:
        number += 1
    return word


def _swap(
    chat: Chat, template: ChatTemplate, chosen: Callable[[Mapping[str, Any]], bool], word: str
) -> tuple[Chat, list[Place]]:
    """Puts invented words into the place of what chosen messages say."""
    pieces: list[Place] = []

    def invent(index: int, field: str, said: str) -> str:
        text = apart = ""
        first = len(pieces)
        for piece, may_be_invented in template.parts(said):
            if may_be_invented:
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
        if chosen(message):
            if message.get("reasoning_content"):
                message["reasoning_content"] = message["thinking"] = invent(
                    index, "reasoning", message["reasoning_content"]
                )
            message["content"] = invent(index, "content", message["content"])
            if message.get("tool_calls"):
                message["tool_calls"] = [_renamed(call, index, invent) for call in message["tool_calls"]]
        swapped.append(message)
    return swapped, pieces


def _renamed(call: Mapping[str, Any], index: int, invent: Callable[[int, str, str], str]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return dict(call)
    return {**call, "function": {**function, "name": invent(index, "call", function["name"])}}


def _places(text: str, pieces: Sequence[Place], word: str, whole: str) -> tuple[Place, ...] | None:
    """Puts what was said back; None: that does not give the whole text."""
    found: dict[int, tuple[int, int]] = {}
    length, last, filled = 0, 0, []
    for match in re.finditer(rf"{word}(\d+)q", text):
        number = int(match[1])
        between = text[last : match.start()]
        begin = length + len(between)
        end = begin + len(pieces[number].said)
        filled += [between, pieces[number].said]
        # Written twice: a tool's answer repeats the name that was called; else the later one is the turn itself.
        if number not in found or pieces[number].field != "call":
            found[number] = begin, end
        length, last = end, match.end()
    if "".join(filled) + text[last:] != whole:
        return None
    return tuple(
        replace(piece, begin=begin, end=end)
        for piece, (begin, end) in ((piece, found.get(number, (-1, -1))) for number, piece in enumerate(pieces))
    )
