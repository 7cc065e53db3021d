"""From a chat to token ids and the mask of what the assistant says.

Where the template wrote each answer is known to the character (`chat_text.py`), and so is what it writes around
answers (`chat_frame.py`). What counts in a turn begins behind the header, where the model takes over when it answers,
and ends with the token that ends the turn. A template with `{% generation %}` markers says itself what counts, and is
believed where that holds the answer, its end and nothing of others.

The whole text is tokenised once, so the tokens are those that the model would see.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from sophia_galore.data.chat_calls import end_of_calls, tool_name
from sophia_galore.data.chat_frame import Frame, find_frame, leading_run
from sophia_galore.data.chat_text import ChatTemplate, Place, Written, write_chat
from sophia_galore.data.conversation import Conversation, Message
from sophia_galore.data.span_tokens import Masked, span_tokens
from sophia_galore.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_THOUGHT = re.compile(r"\s*(?:<think>|<thinking>|\[THINK\])?(.*?)(?:</think>|</thinking>|\[/THINK\])(.*)", re.DOTALL)
_THOUGHT_END = re.compile(r"\s*(?:</think>|</thinking>|\[/THINK\])")
_THOUGHT_MARKS = re.compile(r"</?think(?:ing)?>|\[/?THINK\]|\s")
_OTHER_TEMPLATE = "Set another chat template (model.chat_template), or use data of the format `text`."


@dataclass(frozen=True)
class Turn:
    """A turn that counts.

    Args:
        spans: What of the text counts, in order.
        holds: What is said in it, to be found in what counts.
    """

    spans: tuple[Span, ...]
    holds: tuple[Place, ...]


class ChatMask:
    """Renders and tokenises chats, counting the assistant's tokens.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        date: The day that the template sees, as `2026-11-28`; "": whatever day it is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, date: str = "") -> None:
        self._tokenizer, self._date = tokenizer, date

    @cached_property
    def _plain(self) -> tuple[ChatTemplate, Frame]:
        template = ChatTemplate(self._tokenizer, date=self._date)
        return template, find_frame(template, self._tokenizer)

    @cached_property
    def _with_tools(self) -> tuple[ChatTemplate, Frame]:
        template = ChatTemplate(self._tokenizer, date=self._date, for_tools=True)
        return template, find_frame(template, self._tokenizer)

    @property
    def frame(self) -> Frame:
        """What the template writes around turns."""
        return self._plain[1]

    def tokens(self, conversation: Conversation) -> Masked:
        """Renders and tokenises a chat, counting what the assistant says in turns that count.

        Args:
            conversation: A conversation with messages.

        Returns:
            Token ids and mask.

        Raises:
            DataError: The template refuses the conversation, or leaves out some of it, or what counts can't be told
                apart from the rest.
            ModelError: The template fails on the simplest chat too.
        """
        template, frame = self._with_tools if conversation.tools else self._plain
        written = write_chat(conversation, template)
        if _lost(conversation, written, "reasoning") or _cut_thoughts(conversation, written):
            # Where the template cuts a thought out of an answer, it may know one that is kept apart.
            apart = _thoughts_apart(conversation)
            if apart != conversation:
                again = write_chat(apart, template)
                if not any(_lost(apart, again, field) for field in ("reasoning", "content")):
                    conversation, written = apart, again
        _require_all(conversation, written)
        marked = template.marked(written.chat, conversation.tools, written.text)
        turns = [
            _turn(conversation, written, frame, marked, index)
            for index, message in enumerate(conversation.messages)
            if message.role == "assistant" and message.counts
        ]
        spans = [turn.spans for turn in turns]
        return span_tokens(written.text, spans, self._tokenizer, where=conversation.where)


def _lost(conversation: Conversation, written: Written, field: str) -> list[int]:
    """Numbers of the messages that count and of which the template leaves something out."""
    return [
        place.message
        for place in written.places
        if place.field == field and not place.is_written and _counts(conversation.messages[place.message])
    ]


def _cut_thoughts(conversation: Conversation, written: Written) -> list[int]:
    lost = _lost(conversation, written, "content")
    return [index for index in lost if _THOUGHT.match(conversation.messages[index].content)]


def _counts(message: Message) -> bool:
    return message.role == "assistant" and message.counts


def _thoughts_apart(conversation: Conversation) -> Conversation:
    """The same conversation with thoughts that stand in answers as a field of their own."""
    messages = []
    for message in conversation.messages:
        thought = _THOUGHT.match(message.content) if message.role == "assistant" and not message.reasoning else None
        if thought and thought[1].strip() and "</think" not in thought[2]:
            message = replace(message, content=thought[2].strip("\n"), reasoning=thought[1].strip("\n"))
        messages.append(message)
    return replace(conversation, messages=tuple(messages))


def _require_all(conversation: Conversation, written: Written) -> None:
    """Refuses templates that leave out some of what is said."""
    for place in written.places:
        message = conversation.messages[place.message]
        if place.is_written:
            continue
        thinks = place.field == "reasoning" or (place.field == "content" and _in_thought(message, place))
        if thinks and not _counts(message):
            continue  # templates forget what was thought in turns that are over
        if thinks:
            raise DataError(
                f"{conversation.where}: the model's chat template leaves out what the assistant thinks in message "
                f"{place.message + 1}, so it would not be learned.",
                "Remove the reasoning; or, if the template keeps it in the last turn only, end the record there, or "
                'give earlier turns "weight": 0.',
            )
        what = (
            f"the tool that message {place.message + 1} calls"
            if place.field == "call"
            else (f"the text of {_article(message.role)} turn (message {place.message + 1})")
        )
        raise DataError(
            f"{conversation.where}: the model's chat template leaves out {what}.",
            "Use the tokenizer of a text model; this template may expect another kind of messages."
            if message.role in ("user", "assistant") and place.field == "content"
            else "Remove it from the record, or use a model whose chat template has a place for it.",
        )
    for index, message in enumerate(conversation.messages):
        if not written.is_complete and message.content.strip() not in written.text and message.role != "assistant":
            raise DataError(
                f"{conversation.where}: the model's chat template leaves out the text of {_article(message.role)} turn "
                f"(message {index + 1}).",
                _OTHER_TEMPLATE,
            )
    for tool in conversation.tools:
        name = tool_name(tool)
        if name and name not in written.text:
            raise DataError(
                f"{conversation.where}: the model's chat template leaves out the definition of the tool {name}.",
                "Remove `tools` from the record, or use a model whose chat template has a place for them.",
            )


def _article(role: str) -> str:
    return f"an {role}" if role[0] in "aeiou" else f"a {role}"


def _in_thought(message: Message, place: Place) -> bool:
    """Whether a piece of an answer stands in its thinking part."""
    thought = _THOUGHT.match(message.content)
    return bool(thought and _THOUGHT_MARKS.sub("", place.said) in _THOUGHT_MARKS.sub("", thought[1]))


def _turn(conversation: Conversation, written: Written, frame: Frame, marked: Sequence[Span], index: int) -> Turn:
    own = sorted(
        (place for place in written.places if place.message == index and place.is_written),
        key=lambda place: place.begin,
    )
    if not own:
        raise DataError(
            f"{conversation.where}: message {index + 1} of the assistant is empty, so nothing could be learned.",
            "Fill it in, or remove the record.",
        )
    first, last = _with_marks(own[0], own[-1], written.text)
    others = [place for place in written.places if place.message != index and place.is_written]
    if any(first < place.begin < last for place in others):
        raise _mingled(conversation, index)
    before = max((place for place in others if place.end <= first), key=lambda place: place.end, default=None)
    after = min((place.begin for place in others if place.begin >= last), default=len(written.text))
    begin = _begin(conversation, written, frame, before, first)
    message = conversation.messages[index]
    end = (
        end_of_calls(conversation, written, frame, index, last, after)
        if message.tool_calls
        else _end(written.text, frame, message, last, after)
    )
    _require_whole(conversation, written.text[begin:end], message, index)
    lowest = _lowest(written, frame, begin)
    spans = _believed(marked, lowest, Cover(first, last, end), after, written.text)
    return Turn(spans or ((begin, end),), tuple(own))


def _with_marks(first: Place, last: Place, text: str) -> tuple[int, int]:
    """Where a turn's words begin and end, with marks such as </think> that stand before or behind them there."""
    lead, trail = first.lead.lstrip(), last.trail.rstrip()
    begins = first.begin - len(lead) if lead.strip() and text.endswith(lead, 0, first.begin) else first.begin
    ends = last.end + len(trail) if trail.strip() and text.startswith(trail, last.end) else last.end
    return begins, ends


@dataclass(frozen=True)
class Cover:
    """What has to count in a turn: from `first` to `last` what is said, up to `end` what ends it."""

    first: int
    last: int
    end: int


def _begin(conversation: Conversation, written: Written, frame: Frame, before: Place | None, first: int) -> int:
    """Where the model takes over when it answers: behind the header of its turn."""
    text = written.text
    low = before.end if before else 0
    asked = before is not None and written.is_complete and conversation.messages[before.message].role == "user"
    if asked and frame.turnover and text.startswith(frame.turnover, low) and low + len(frame.turnover) <= first:
        begin = low + len(frame.turnover)
        # Without a generation prompt, what is between belongs to the header, unless it is a mere space.
        return begin if frame.prompt or not text[begin:first].strip() else first
    for header in (frame.prompt, frame.header):
        place = text.rfind(header, low, first) if header.strip() else -1
        if place < 0:
            continue
        begin = place + len(header)
        # Where it is not known what a user says in between, it has to look like what the template writes.
        if written.is_complete or text[begin:first].strip() in ("", frame.opening.strip()):
            return begin
    return first


def _lowest(written: Written, frame: Frame, begin: int) -> int:
    """How early a marked span may begin: a thought that the template opens is no header, nor is mere whitespace."""
    opened = frame.prompt[len(frame.header) :]
    if opened and written.text[:begin].endswith(opened):
        begin -= len(opened)
    return len(written.text[:begin].rstrip())


def _end(text: str, frame: Frame, message: Message, last: int, after: int) -> int:
    """Past the token that ends a turn; where there is none, past the whitespace that does."""
    closed = _THOUGHT_END.match(text, last, after)
    if closed and leading_run(text[closed.end() : after], frame.ends):
        last = closed.end()  # the turn is a thought and nothing else
    follows = text[last:after]
    content = message.content
    kept = content[len(content.rstrip()) :]
    reach = leading_run(follows, frame.ends)
    for skipped in {0, len(kept) if follows.startswith(kept) else 0}:
        if frame.tail and follows.startswith(frame.tail, skipped):
            reach = max(reach, skipped + len(frame.tail))
    # Whitespace behind the token only separates turns.
    ended = follows[:reach].rstrip()
    return last + (len(ended) or reach)


def _require_whole(conversation: Conversation, counted: str, message: Message, index: int) -> None:
    """Refuses a turn whose text the template changes."""
    content = message.content.strip()
    # Only marks of a thought, and whitespace, may be written anew.
    if content in counted or _THOUGHT_MARKS.sub("", content) in _THOUGHT_MARKS.sub("", counted):
        return
    raise DataError(
        f"{conversation.where}: the model's chat template changes what the assistant says in message {index + 1}, so "
        "it would not be learned as it is.",
        _OTHER_TEMPLATE,
    )


def _believed(marked: Sequence[Span], lowest: int, cover: Cover, after: int, text: str) -> tuple[Span, ...]:
    """The marked spans of a turn, if they hold what is said in it, its end, and nothing of others."""
    spans = tuple((begin, end) for begin, end in marked if begin < end and begin < after and end > lowest)
    if not spans or spans[0][0] < lowest or spans[0][0] > cover.first:
        return ()
    gaps = text[spans[0][0] : cover.end]
    for begin, end in reversed(spans):
        shift = spans[0][0]
        gaps = gaps[: max(begin - shift, 0)] + gaps[max(end - shift, 0) :]
    # What is left is not covered; past the end, only whitespace may count.
    if gaps.strip() or text[cover.end : max(spans[-1][1], cover.end)].strip():
        return ()
    return spans


def _mingled(conversation: Conversation, index: int) -> DataError:
    return DataError(
        f"{conversation.where}: the model's chat template writes other turns within message {index + 1}, so the "
        "assistant's part can't be told apart.",
        _OTHER_TEMPLATE,
    )
