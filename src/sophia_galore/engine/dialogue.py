"""A conversation with a model: what was said, and how much of it the model still reads."""

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
        question: The user's.
        answer: The model's, as it was said; not only spaces.
        is_whole: Whether the model itself ended it.
    """

    question: str
    answer: str
    is_whole: bool


@dataclass(frozen=True)
class Asked:
    """A question as the model will read it.

    Args:
        question: The user's.
        prompt: (1, T) token ids, with the history that fits.
        num_forgotten: Turns of the history that are left out from now on.
    """

    question: str
    prompt: torch.Tensor
    num_forgotten: int


class Dialogue:
    """Several turns with one model.

    Args:
        loaded: The model.
        system: The system prompt; "" for none.

    Raises:
        ModelError: There is a system message and no place for one.
    """

    def __init__(self, loaded: Loaded, system: str = "") -> None:
        self.loaded = loaded
        self.turns: list[Turn] = []
        self._num_forgotten = 0
        self.tell(system)

    def tell(self, system: str) -> None:
        """Set the system message; the turns so far stay.

        Raises:
            ModelError: The model has no chat template, and so no place for one.
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
        """Put a question behind the history; of that, the oldest turns are left out if it does not fit.

        Args:
            question: The user's.
            max_new_tokens: So many positions stay free for the answer, as long as there is history to leave out.

        Raises:
            ModelError: Not even the question fits, it is empty, or the chat template refuses the conversation.
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
        """Answer a question; it does not belong to the history before `keep`."""
        return self.loaded.answer(asked.prompt, settings, stream)

    def keep(self, asked: Asked, given: Answer) -> bool:
        """Make a question and its answer part of the history; False: the answer is empty, so they are not."""
        says_something = bool(given.text.strip())
        if says_something:
            self.turns.append(Turn(asked.question, given.text, given.end == "done"))
        return says_something

    def record(self) -> str:
        """The whole conversation as a line of a JSONL file that a run can train on.

        It has the field `messages`; for a model without chat template, which could not be trained on that, `text`.
        """
        if self.loaded.has_chat_template:
            turns = [{"role": role, "content": text} for role, text in self._messages(None, 0)]
            return json.dumps({"messages": turns}, ensure_ascii=False)
        text = "\n".join(turn.question + turn.answer for turn in self.turns)
        return json.dumps({"text": text}, ensure_ascii=False)

    def _messages(self, question: str | None, first: int) -> list[Message]:
        messages: list[Message] = [("system", self.system)] if self.system else []
        for turn in self.turns[first:]:
            # A template puts its own marks around an answer; in plain text, the space before it belongs to it.
            said = turn.answer.strip() if self.loaded.has_chat_template else turn.answer
            messages += [("user", turn.question), ("assistant", said)]
        return messages if question is None else [*messages, ("user", question)]
