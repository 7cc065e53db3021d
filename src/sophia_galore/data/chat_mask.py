"""Convert a chat to token ids and a loss mask of the assistant's text.

`chat_text.py` finds the characters where the template wrote each answer, `chat_frame.py` the text around answers. The
counted part of a turn begins after its header, where the model starts to generate, and ends with the token that ends
the turn. A template with `{% generation %}` markers marks the counted part itself; the markers are used if they hold
the answer, its end and nothing of other turns.

The whole text is tokenised once, so the tokens are those that the model would see.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from sophia_galore.data.chat_calls import end_of_calls, tool_name
from sophia_galore.data.chat_frame import Frame, end_tokens_length, find_frame
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


class ChatMask:
    """Renders and tokenises chats, and masks everything but the assistant's text.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        date: The day that the template sees, as `2026-11-28`; "": whatever day it is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, date: str = "") -> None:
        self._tokenizer, self._date = tokenizer, date

    @cached_property
    def _plain(self) -> tuple[ChatTemplate, Frame]:
        return self._template(for_tools=False)

    @cached_property
    def _with_tools(self) -> tuple[ChatTemplate, Frame]:
        return self._template(for_tools=True)

    def _template(self, *, for_tools: bool) -> tuple[ChatTemplate, Frame]:
        template = ChatTemplate(self._tokenizer, date=self._date, for_tools=for_tools)
        return template, find_frame(template, self._tokenizer)

    @property
    def frame(self) -> Frame:
        """The text that the template writes around turns."""
        return self._plain[1]

    def tokens(self, conversation: Conversation) -> Masked:
        """Render and tokenise a chat, and mask all but the assistant turns that count.

        Args:
            conversation: A conversation with messages.

        Returns:
            Token ids and mask.

        Raises:
            DataError: The template refuses the conversation or leaves out some of it, or the assistant's text can't
                be separated from the rest.
            ModelError: The template fails even on the simplest chat.
        """
        template, frame = self._with_tools if conversation.tools else self._plain
        written = write_chat(conversation, template)
        lost = _lost(conversation, written, "content")
        if _lost(conversation, written, "reasoning") or any(
            _THOUGHT.match(conversation.messages[index].content) for index in lost
        ):
            # A template that removes thoughts from answers may accept them as a separate field.
            apart = _with_separate_reasoning(conversation)
            if apart != conversation:
                again = write_chat(apart, template)
                if not any(_lost(apart, again, field) for field in ("reasoning", "content")):
                    conversation, written = apart, again
        _require_all(conversation, written)
        marked = template.marked(written.chat, conversation.tools, written.text)
        spans = [
            _counted_spans(conversation, written, frame, marked, index)
            for index, message in enumerate(conversation.messages)
            if _counts(message)
        ]
        return span_tokens(written.text, spans, self._tokenizer, where=conversation.where)


def _lost(conversation: Conversation, written: Written, field: str) -> list[int]:
    """Return the numbers of the counted messages of which the template leaves something out."""
    return [
        place.message
        for place in written.places
        if place.field == field and not place.is_written and _counts(conversation.messages[place.message])
    ]


def _counts(message: Message) -> bool:
    return message.role == "assistant" and message.counts


def _with_separate_reasoning(conversation: Conversation) -> Conversation:
    """Return the same conversation, with the thoughts of answers moved to `reasoning`."""
    messages = []
    for message in conversation.messages:
        thought = _THOUGHT.match(message.content) if message.role == "assistant" and not message.reasoning else None
        if thought and thought[1].strip() and "</think" not in thought[2]:
            message = replace(message, content=thought[2].strip("\n"), reasoning=thought[1].strip("\n"))
        messages.append(message)
    return replace(conversation, messages=tuple(messages))


def _require_all(conversation: Conversation, written: Written) -> None:
    """Refuse a template that leaves out some of the conversation."""
    for place in written.places:
        message = conversation.messages[place.message]
        if place.is_written:
            continue
        thinks = place.field == "reasoning" or (place.field == "content" and _in_thought(message, place))
        if thinks and not _counts(message):
            continue  # templates drop the reasoning of earlier turns
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
    """Return whether a piece of an answer belongs to its thought."""
    thought = _THOUGHT.match(message.content)
    return bool(thought and _THOUGHT_MARKS.sub("", place.said) in _THOUGHT_MARKS.sub("", thought[1]))


def _counted_spans(
    conversation: Conversation, written: Written, frame: Frame, marked: Sequence[Span], index: int
) -> tuple[Span, ...]:
    """Return the ranges of the text that count in an assistant turn, in order."""
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
        raise DataError(
            f"{conversation.where}: the model's chat template writes other turns within message {index + 1}, so the "
            "assistant's part can't be told apart.",
            _OTHER_TEMPLATE,
        )
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
    return _trusted_spans(marked, lowest, first, end, after, written.text) or ((begin, end),)


def _with_marks(first: Place, last: Place, text: str) -> tuple[int, int]:
    """Return where a turn's text begins and ends, including tags such as </think> around it."""
    lead, trail = first.lead.lstrip(), last.trail.rstrip()
    begins = first.begin - len(lead) if lead.strip() and text.endswith(lead, 0, first.begin) else first.begin
    ends = last.end + len(trail) if trail.strip() and text.startswith(trail, last.end) else last.end
    return begins, ends


def _begin(conversation: Conversation, written: Written, frame: Frame, before: Place | None, first: int) -> int:
    """Return where the model starts to generate: after the header of its turn."""
    text = written.text
    low = before.end if before else 0
    asked = before is not None and written.is_complete and conversation.messages[before.message].role == "user"
    if asked and frame.boundary and text.startswith(frame.boundary, low) and low + len(frame.boundary) <= first:
        begin = low + len(frame.boundary)
        # Without a generation prompt, the text in between belongs to the header, unless it is whitespace.
        return begin if frame.prompt or not text[begin:first].strip() else first
    for header in (frame.prompt, frame.header):
        place = text.rfind(header, low, first) if header.strip() else -1
        if place < 0:
            continue
        begin = place + len(header)
        # If the user's text was not located, the text in between must look like the template's.
        if written.is_complete or text[begin:first].strip() in ("", frame.opening.strip()):
            return begin
    return first


def _lowest(written: Written, frame: Frame, begin: int) -> int:
    """Return the earliest position where a marked span may begin: before a thought's opening tag and whitespace."""
    opened = frame.prompt[len(frame.header) :]
    if opened and written.text[:begin].endswith(opened):
        begin -= len(opened)
    return len(written.text[:begin].rstrip())


def _end(text: str, frame: Frame, message: Message, last: int, after: int) -> int:
    """Return the position after the token that ends a turn; if there is none, after the whitespace that ends it."""
    closed = _THOUGHT_END.match(text, last, after)
    if closed and end_tokens_length(text[closed.end() : after], frame.ends):
        last = closed.end()  # the turn consists of a thought only
    follows = text[last:after]
    content = message.content
    kept = content[len(content.rstrip()) :]
    reach = end_tokens_length(follows, frame.ends)
    for skipped in {0, len(kept) if follows.startswith(kept) else 0}:
        if frame.tail and follows.startswith(frame.tail, skipped):
            reach = max(reach, skipped + len(frame.tail))
    # Whitespace after the token only separates turns.
    ended = follows[:reach].rstrip()
    return last + (len(ended) or reach)


def _require_whole(conversation: Conversation, counted: str, message: Message, index: int) -> None:
    """Refuse a turn whose text the template changes."""
    content = message.content.strip()
    # The template may only change tags of thoughts, and whitespace.
    if content in counted or _THOUGHT_MARKS.sub("", content) in _THOUGHT_MARKS.sub("", counted):
        return
    raise DataError(
        f"{conversation.where}: the model's chat template changes what the assistant says in message {index + 1}, so "
        "it would not be learned as it is.",
        _OTHER_TEMPLATE,
    )


def _trusted_spans(
    marked: Sequence[Span], lowest: int, first: int, last: int, after: int, text: str
) -> tuple[Span, ...]:
    """Return the marked spans of a turn if they hold its text from `first` to `last` and nothing of other turns."""
    spans = tuple((begin, end) for begin, end in marked if begin < end and begin < after and end > lowest)
    if not spans or spans[0][0] < lowest or spans[0][0] > first:
        return ()
    shift = spans[0][0]
    gaps = text[shift:last]
    for begin, end in reversed(spans):
        gaps = gaps[: max(begin - shift, 0)] + gaps[max(end - shift, 0) :]
    # The rest is not covered by spans; after the end, only whitespace may count.
    if gaps.strip() or text[last : max(spans[-1][1], last)].strip():
        return ()
    return spans
