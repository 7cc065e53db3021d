"""What a chat template writes around turns: where an answer begins, and what ends it.

Found once a template, from a question and its answer that it is given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sophia_galore.data.chat_text import Chat, ChatTemplate, TemplateRefusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUESTION, _ANSWER, _CALL, _LAST = "Zquestionq", "Zanswerq", "Zcallq", "Zlastq"
_SPECIAL = r"<[|｜]?[\w▁/-]+[|｜]?>"
# What opens a thought: the beginning of an answer, even where the template writes it before the model does.
_THOUGHT = re.compile(r"<think>|<thinking>|\[THINK\]")


@dataclass(frozen=True)
class Frame:
    """The template's own text around turns; "" where it has none, or it can't be told.

    Args:
        turnover: From the end of a question to where its answer begins.
        prompt: The part of it that belongs to the answer: what a generation prompt is.
        opening: From there to the answer's text, such as an empty thought.
        tail: What follows the last answer and belongs to it.
        ends: Tokens that can end a turn, as text.
        call_ends: Those that can end a turn that calls a tool.
    """

    turnover: str = ""
    prompt: str = ""
    opening: str = ""
    tail: str = ""
    ends: tuple[str, ...] = ()
    call_ends: tuple[str, ...] = ()

    @property
    def header(self) -> str:
        """The prompt without the beginning of a thought that it may hold."""
        return _without_thought(self.prompt)

    def end_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """Ids of the tokens after which an answer is over; none if its end is ordinary text.

        Args:
            tokenizer: The template's tokenizer.
        """
        first = next((atom for atom in re.findall(_specials(tokenizer, self.tail), self.tail)), None)
        token = tokenizer.convert_tokens_to_ids(first) if first else None
        return (int(token),) if isinstance(token, int) and token in tokenizer.get_added_vocab().values() else ()


def find_frame(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> Frame:
    """Finds out what a template writes around turns.

    Args:
        template: The template.
        tokenizer: Its tokenizer, which says what a special token is.

    Returns:
        What could be found out; a template that refuses a question and its answer has an empty one.
    """
    asked: Chat = [{"role": "user", "content": _QUESTION}]
    answered: Chat = [*asked, {"role": "assistant", "content": _ANSWER}]
    try:
        question, prompted, text = (
            template.write(asked),
            template.write(asked, prompt=True),
            template.write(answered),
        )
    except TemplateRefusal:
        return _with_ends(Frame(), tokenizer, "")
    begin, end = text.rfind(_ANSWER), text.rfind(_ANSWER) + len(_ANSWER)
    after_question = text.rfind(_QUESTION, 0, max(begin, 0)) + len(_QUESTION)
    if begin < 0 or after_question < len(_QUESTION):
        return _with_ends(Frame(), tokenizer, "")
    specials = _specials(tokenizer, text + prompted)
    shared = text[: _shared(prompted, text[:begin])]
    turnover = shared[after_question:] if len(shared) > after_question else ""
    prompt = turnover[_common(turnover, question[after_question:], specials) :]
    frame = Frame(
        turnover=turnover,
        prompt=prompt,
        opening=text[after_question + len(turnover) : begin],
        tail=_own_tail(template, answered, text[:begin], text[end:], specials, str(tokenizer.eos_token)),
    )
    return _with_ends(frame, tokenizer, _call_tail(template, asked))


def _own_tail(template: ChatTemplate, answered: Chat, before: str, tail: str, specials: str, eos_token: str) -> str:
    """What follows the last answer, without the header of a next turn that some templates always end with."""
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
    # What the headers of all turns begin with is in the common part, too.
    first = re.search(specials, tail[:common])
    return tail[: first.end() if first else common]


def _call_tail(template: ChatTemplate, asked: Chat) -> str:
    """What follows the last call of a tool; "" where the template writes none."""
    call = {"type": "function", "function": {"name": _CALL, "arguments": {"a": _ANSWER}}}
    try:
        text = template.write([*asked, {"role": "assistant", "content": "", "tool_calls": [call]}])
    except TemplateRefusal:
        return ""
    place = text.rfind(_ANSWER)
    return text[place + len(_ANSWER) :] if place >= 0 else ""


def _with_ends(frame: Frame, tokenizer: PreTrainedTokenizerBase, call_tail: str) -> Frame:
    specials = _specials(tokenizer, frame.turnover + frame.tail + call_tail)
    header = re.findall(specials, frame.prompt)
    ends = [
        # A question is ended by the token that ends an answer, in most templates.
        *re.findall(specials, frame.tail),
        *[atom for atom in re.findall(specials, frame.turnover)[:1] if atom not in header],
        *[str(token) for token in (tokenizer.eos_token,) if token and token not in header],
    ]
    calls = [*re.findall(specials, call_tail)[-1:], *ends]
    return Frame(
        frame.turnover,
        frame.prompt,
        frame.opening,
        frame.tail,
        tuple(dict.fromkeys(ends)),
        tuple(dict.fromkeys(calls)),
    )


def _specials(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A pattern of the special tokens that occur in a text, and of what looks like one."""
    own = [token for token in tokenizer.get_added_vocab() if token.strip() and token in text]
    return "|".join([*(re.escape(token) for token in sorted(own, key=len, reverse=True)), _SPECIAL])


def _common(text: str, other: str, specials: str) -> int:
    """Length of the common beginning of two texts; it does not end within a special token."""
    length = _shared(text, other)
    for match in re.finditer(specials, text):
        if match.start() < length < match.end():
            return match.start()
    return length


def _shared(text: str, other: str) -> int:
    """Length of the common beginning of two texts."""
    length = min(len(text), len(other))
    return next((place for place in range(length) if text[place] != other[place]), length)


def _without_thought(prompt: str) -> str:
    thought = _THOUGHT.search(prompt)
    return prompt[: thought.start()] if thought else prompt


def leading_run(text: str, ends: Sequence[str]) -> int:
    """How far a text consists of tokens that end a turn, and whitespace.

    Args:
        text: What follows an answer.
        ends: The tokens.

    Returns:
        The length up to the last of them; 0 if there is none.
    """
    if not ends:
        return 0
    found = re.match(rf"(?:\s*(?:{'|'.join(map(re.escape, ends))}))+", text)
    return found.end() if found else 0
