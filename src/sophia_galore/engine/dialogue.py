"""A conversation of several turns with a model that has a limited context."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from sophia_galore.engine.generate import Answer, Message, Settings, Stream
from sophia_galore.engine.loaded import Loaded
from sophia_galore.errors import ModelError


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Args:
        question: The user's question.
        answer: The model's answer, unchanged; not only whitespace.
        is_whole: Whether the model ended the answer itself.
    """

    question: str
    answer: str
    is_whole: bool


@dataclass(frozen=True)
class Asked:
    """A question together with its prompt.

    Args:
        question: The user's question.
        prompt: (1, T) token ids of the question and as much of the history as fits.
        num_forgotten: Number of turns that this question pushed out of the context.
    """

    question: str
    prompt: torch.Tensor
    num_forgotten: int


class Dialogue:
    """A conversation with one model.

    Args:
        loaded: The model.
        system: The system prompt; "" for none.

    Raises:
        ModelError: There is a system message, but the model has no chat template.
    """

    def __init__(self, loaded: Loaded, system: str = "") -> None:
        self.loaded = loaded
        self.turns: list[Turn] = []
        self._num_forgotten = 0
        self.tell(system)

    def tell(self, system: str) -> None:
        """Set the system message; keep the turns so far.

        Raises:
            ModelError: The model has no chat template.
        """
        if system and not self.loaded.has_chat_template:
            raise ModelError(
                f"{self.loaded.title} has no chat template, so there is no place for a system message.",
                "Put it into the question.",
            )
        self.system = system

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns, self._num_forgotten = [], 0

    def ask(self, question: str, *, max_new_tokens: int) -> Asked:
        """Build the prompt of a question; leave out the oldest turns if it does not fit.

        Args:
            question: The user's question.
            max_new_tokens: Positions to keep free for the answer, as far as leaving out turns makes this possible.

        Raises:
            ModelError: The question is empty or too long, or the chat template refuses the conversation.
        """
        room = self.loaded.num_positions - max_new_tokens
        num_forgotten = self._num_forgotten
        prompt = self.loaded.prompt(self._messages(question, num_forgotten))
        while prompt.shape[1] > room and num_forgotten < len(self.turns):
            num_forgotten += 1
            prompt = self.loaded.prompt(self._messages(question, num_forgotten))
        self.loaded.refuse_too_long(prompt)
        newly, self._num_forgotten = num_forgotten - self._num_forgotten, num_forgotten
        return Asked(question, prompt, newly)

    def answer(self, asked: Asked, settings: Settings, stream: Stream) -> Answer:
        """Generate an answer; `keep` adds it to the history."""
        return self.loaded.answer(asked.prompt, settings, stream)

    def keep(self, asked: Asked, given: Answer) -> bool:
        """Add a question and its answer to the history, unless the answer is empty; return whether they were added."""
        says_something = bool(given.text.strip())
        if says_something:
            self.turns.append(Turn(asked.question, given.text, given.end == "done"))
        return says_something

    def record(self) -> str:
        """Return the conversation as a line of a JSONL file that a run can train on.

        The line has the field `messages`, or `text` if the model has no chat template.
        """
        if self.loaded.has_chat_template:
            turns = [{"role": role, "content": text} for role, text in self._messages(None, 0)]
            return json.dumps({"messages": turns}, ensure_ascii=False)
        text = "\n".join(turn.question + turn.answer for turn in self.turns)
        return json.dumps({"text": text}, ensure_ascii=False)

    def _messages(self, question: str | None, first: int) -> list[Message]:
        messages: list[Message] = [("system", self.system)] if self.system else []
        for turn in self.turns[first:]:
            # A template adds its own separators; in plain text, the leading space is part of the answer.
            said = turn.answer.strip() if self.loaded.has_chat_template else turn.answer
            messages += [("user", turn.question), ("assistant", said)]
        return messages if question is None else [*messages, ("user", question)]
