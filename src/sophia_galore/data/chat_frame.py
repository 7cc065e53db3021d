"""Find the text that a chat template writes around turns: where an answer begins and which tokens end it.

This is found once per template, by rendering a test question and answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sophia_galore.data.chat_text import Chat, ChatTemplate, TemplateRefusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUESTION, _ANSWER, _CALL, _LAST = "Zquestionq", "Zanswerq", "Zcallq", "Zlastq"
_SPECIAL = r"<[|｜]?[\w▁/-]+[|｜]?>"
# These tags open a thought. They belong to the answer, even if the template writes them in the generation prompt.
_THOUGHT = re.compile(r"<think>|<thinking>|\[THINK\]")


@dataclass(frozen=True)
class Frame:
    """The template's text around turns; "" where there is none or it can't be found.

    Args:
        boundary: Text from the end of a question to the beginning of the answer.
        prompt: The part of `boundary` that is the generation prompt.
        opening: Text between the generation prompt and the answer, such as an empty thought.
        tail: Text after the last answer that belongs to it.
        ends: Tokens that can end a turn, as text.
        call_ends: Tokens that can end a turn that calls a tool, as text.
    """

    boundary: str = ""
    prompt: str = ""
    opening: str = ""
    tail: str = ""
    ends: tuple[str, ...] = ()
    call_ends: tuple[str, ...] = ()

    @property
    def header(self) -> str:
        """The generation prompt without a tag that opens a thought."""
        return _THOUGHT.split(self.prompt, maxsplit=1)[0]

    def end_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """Return the ids of the tokens that end an answer; none if it ends with ordinary text.

        Args:
            tokenizer: The template's tokenizer.
        """
        first = re.search(_specials(tokenizer, self.tail), self.tail)
        token = tokenizer.convert_tokens_to_ids(first[0]) if first else None
        return (int(token),) if isinstance(token, int) and token in tokenizer.get_added_vocab().values() else ()


def find_frame(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> Frame:
    """Find the text that a template writes around turns.

    Args:
        template: The template.
        tokenizer: Its tokenizer, which knows the special tokens.

    Returns:
        What was found; it is empty for a template that refuses a question with an answer.
    """
    asked: Chat = [{"role": "user", "content": _QUESTION}]
    answered: Chat = [*asked, {"role": "assistant", "content": _ANSWER}]
    try:
        question, prompted = template.write(asked), template.write(asked, prompt=True)
        text = template.write(answered)
    except TemplateRefusal:
        return _with_ends(Frame(), tokenizer, "")
    begin, end = text.rfind(_ANSWER), text.rfind(_ANSWER) + len(_ANSWER)
    after_question = text.rfind(_QUESTION, 0, max(begin, 0)) + len(_QUESTION)
    if begin < 0 or after_question < len(_QUESTION):
        return _with_ends(Frame(), tokenizer, "")
    specials = _specials(tokenizer, text + prompted)
    shared = text[: _shared(prompted, text[:begin])]
    boundary = shared[after_question:] if len(shared) > after_question else ""
    prompt = boundary[_common(boundary, question[after_question:], specials) :]
    frame = Frame(
        boundary=boundary,
        prompt=prompt,
        opening=text[after_question + len(boundary) : begin],
        tail=_own_tail(template, answered, text[:begin], text[end:], specials, str(tokenizer.eos_token)),
    )
    return _with_ends(frame, tokenizer, _call_tail(template, asked))


def _own_tail(template: ChatTemplate, answered: Chat, before: str, tail: str, specials: str, eos_token: str) -> str:
    """Return the text after the last answer, without the header of the next turn that some templates append."""
    try:
        text = template.write([*answered, {"role": "user", "content": _LAST}])
    except TemplateRefusal:
        return tail
    begin = text.rfind(_ANSWER)
    end = text.find(_LAST, begin)
    if begin < 0 or end < 0:
        return tail
    common = _common(tail, text[begin + len(_ANSWER) : end], specials)
    rest = tail[common:]
    found = set(re.findall(specials, rest)) - {eos_token}
    is_header = re.search(r"\w", re.sub(specials, "", rest)) or any(atom in before for atom in found)
    if not is_header:
        return tail
    # The common part also holds the text with which the headers of all turns begin.
    first = re.search(specials, tail[:common])
    return tail[: first.end() if first else common]


def _call_tail(template: ChatTemplate, asked: Chat) -> str:
    """Return the text after the last tool call; "" if the template writes none."""
    call = {"type": "function", "function": {"name": _CALL, "arguments": {"a": _ANSWER}}}
    try:
        text = template.write([*asked, {"role": "assistant", "content": "", "tool_calls": [call]}])
    except TemplateRefusal:
        return ""
    place = text.rfind(_ANSWER)
    return text[place + len(_ANSWER) :] if place >= 0 else ""


def _with_ends(frame: Frame, tokenizer: PreTrainedTokenizerBase, call_tail: str) -> Frame:
    specials = _specials(tokenizer, frame.boundary + frame.tail + call_tail)
    header = re.findall(specials, frame.prompt)
    ends = [
        # In most templates, the same token ends questions and answers.
        *re.findall(specials, frame.tail),
        *[atom for atom in re.findall(specials, frame.boundary)[:1] if atom not in header],
        *[str(token) for token in (tokenizer.eos_token,) if token and token not in header],
    ]
    calls = [*re.findall(specials, call_tail)[-1:], *ends]
    return replace(frame, ends=tuple(dict.fromkeys(ends)), call_ends=tuple(dict.fromkeys(calls)))


def _specials(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return a pattern of the special tokens in a text, and of text that looks like one."""
    own = [token for token in tokenizer.get_added_vocab() if token.strip() and token in text]
    return "|".join([*(re.escape(token) for token in sorted(own, key=len, reverse=True)), _SPECIAL])


def _common(text: str, other: str, specials: str) -> int:
    """Return the length of the common beginning of two texts; it does not end within a special token."""
    length = _shared(text, other)
    for match in re.finditer(specials, text):
        if match.start() < length < match.end():
            return match.start()
    return length


def _shared(text: str, other: str) -> int:
    """Return the length of the common beginning of two texts."""
    length = min(len(text), len(other))
    return next((place for place in range(length) if text[place] != other[place]), length)


def end_tokens_length(text: str, ends: Sequence[str]) -> int:
    """Return the length of the tokens that end a turn, at the beginning of a text.

    Args:
        text: The text after an answer.
        ends: The tokens; whitespace may stand between them.

    Returns:
        The length up to the last of them; 0 if there is none.
    """
    if not ends:
        return 0
    found = re.match(rf"(?:\s*(?:{'|'.join(map(re.escape, ends))}))+", text)
    return found.end() if found else 0
