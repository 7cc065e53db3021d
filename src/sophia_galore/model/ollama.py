"""Write a Modelfile for Ollama, with the model's chat template and stop texts.

Ollama supports a few chat templates; with any other, it passes the bare question to the model. So the chat template is
translated to Ollama's notation (https://docs.ollama.com/modelfile#template), which is applied turn by turn: the text
around questions and answers is found by rendering conversations of markers. The result is compared with the original on
a longer conversation and left out if it differs, since a template may do more than put text around turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Render = Callable[[Sequence[tuple[str, str]]], str]
"""Renders (role, content) pairs up to where the next answer begins; raises an error if that is not possible."""

_SYSTEM, _FIRST, _ANSWER, _SECOND = "SYSTEMMARK", "FIRSTMARK", "ANSWERMARK", "SECONDMARK"


@dataclass(frozen=True)
class TurnFormat:
    """The text that a chat template puts around turns.

    Args:
        before_system: Text before the system prompt.
        after_system: Text after the system prompt.
        inside: Whether the system prompt is inside the turn of the first question.
        before_question: Text before a question.
        before_answer: Text between a question and its answer.
        after_answer: Text between an answer and the next question.
        default_system: The system prompt if none is given; "": there is none.
        knows_system: Whether the template accepts a system prompt.
    """

    before_system: str
    after_system: str
    inside: bool
    before_question: str
    before_answer: str
    after_answer: str
    default_system: str
    knows_system: bool

    def render(self, turns: Sequence[tuple[str, str]]) -> str:
        """Render a conversation as Ollama does, to compare it with the chat template."""
        system = next((content for role, content in turns if role == "system"), self.default_system)
        questions = [content for role, content in turns if role == "user"]
        answers = [content for role, content in turns if role == "assistant"]
        text = ""
        for index, question in enumerate(questions):
            around = self.before_system + system + self.after_system if system and not index else ""
            text += self.before_question + around if self.inside else around + self.before_question
            text += question + self.before_answer
            text += answers[index] + self.after_answer if index < len(answers) else ""
        return text

    def template(self) -> str:
        """Return the format in Ollama's notation, which is applied once per turn."""
        system = f"{{{{ if .System }}}}{self.before_system}{{{{ .System }}}}{self.after_system}{{{{ end }}}}"
        if not self.knows_system:
            system = ""
        before = self.before_question + system if self.inside else system + self.before_question
        return f"{before}{{{{ .Prompt }}}}{self.before_answer}{{{{ .Response }}}}{self.after_answer}"


def find_format(render: Render, *, begin: str, ends: Sequence[str]) -> TurnFormat | None:
    """Find the text that a chat template puts around turns.

    Args:
        render: The chat template.
        begin: Text of the beginning-of-text token, which Ollama adds itself.
        ends: Texts of the tokens that end an answer.

    Returns:
        The format; None: this template can't be expressed in this form.
    """
    try:
        long = render([("user", _FIRST), ("assistant", _ANSWER), ("user", _SECOND)]).removeprefix(begin)
        start, between, after_answer, before_answer = _cut(long, _FIRST, _ANSWER, _SECOND)
    except Exception:  # a template may raise anything
        return None
    if between != before_answer:
        return None
    before_system, after_system, knows_system = "", "", True
    try:
        with_system = render([("system", _SYSTEM), ("user", _FIRST)]).removeprefix(begin)
        before_system, after_system, _ = _cut(with_system, _SYSTEM, _FIRST)
    except Exception:
        knows_system = False
    inside = knows_system and start == before_system and not after_system.endswith(start)
    default = ""
    if inside or not knows_system or after_system.endswith(start):
        before_question = start
    elif start.startswith(before_system) and start.endswith(after_system):
        default = start[len(before_system) : len(start) - len(after_system)]
        before_question = _behind_end(_common_ending(after_system, after_answer), ends)
    else:
        return None
    if not after_answer.endswith(before_question):
        return None
    if inside:
        before_system = ""
    elif knows_system:
        after_system = after_system.removesuffix(before_question)
    found = TurnFormat(
        before_system,
        after_system,
        inside,
        before_question,
        before_answer,
        after_answer.removesuffix(before_question),
        default,
        knows_system,
    )
    return found if _reproduces(found, render, begin) else None


def modelfile(gguf: str, found: TurnFormat | None, *, has_template: bool, stops: Sequence[str]) -> str:
    """Return the Modelfile.

    Args:
        gguf: Name of the model's file, which lies beside it.
        found: The chat template's format; None: none was found.
        has_template: Whether the model has a chat template.
        stops: Texts at which an answer ends.
    """
    lines = [f"FROM ./{gguf}"]
    if found is not None and '"""' not in found.template():
        lines.append(f'TEMPLATE """{found.template()}"""')
        if found.default_system:
            lines.append(f'SYSTEM """{found.default_system}"""')
    elif has_template:
        lines.append("# The chat template says more than Ollama's turn by turn ones can: Ollama takes it from the GGUF")
        lines.append("# file if it knows it. Compare an answer before you rely on it.")
    else:
        lines.append("# A model without chat template: it continues texts.")
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops) if stop and '"' not in stop]
    return "\n".join(lines) + "\n"


def _cut(text: str, *marks: str) -> list[str]:
    """Return the text before, between and after markers that each occur once, in this order."""
    parts: list[str] = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise ValueError(f"{mark} is not in it once")
        parts.append(before)
    return [*parts, text]


def _common_ending(first: str, second: str) -> str:
    length = 0
    while length < min(len(first), len(second)) and first[-1 - length] == second[-1 - length]:
        length += 1
    return first[len(first) - length :]


def _behind_end(text: str, ends: Sequence[str]) -> str:
    """Return a text without the token and the line breaks that end the turn before."""
    for end in ends:
        if end and text.startswith(end):
            return text[len(end) :].lstrip("\n")
    return text


def _reproduces(found: TurnFormat, render: Render, begin: str) -> bool:
    talk = [("user", "One, two?"), ("assistant", "Three."), ("user", "And?"), ("assistant", "Four."), ("user", "So?")]
    talks = [talk[:1], talk[:3], talk]
    if found.knows_system:
        talks += [[("system", "Be kind."), *turns] for turns in talks]
    try:
        return all(found.render(turns) == render(turns).removeprefix(begin) for turns in talks)
    except Exception:
        return False
