"""Generate answers with Hugging Face's `generate`, and stream their text."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sophia_galore.engine.whole import whole_model
from sophia_galore.errors import ModelError, short
from sophia_galore.model.architecture import Architecture
from sophia_galore.weights.store import WeightStore

Message = tuple[str, str]
"""Role (system, user or assistant) and text."""

_HALF_A_CHARACTER = "\ufffd"


@dataclass(frozen=True)
class Settings:
    """Sampling settings of an answer.

    Args:
        max_new_tokens: Longest answer in tokens.
        temperature: Sampling temperature; 0: greedy decoding.
        top_p: At temperatures above 0, sample from the most likely tokens that together have this probability.
        seed: Seed of the sampling.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Args:
        text: The text without special tokens.
        tokens: All generated token ids, including the end token.
        end: done: the model ended it; cut: it reached `max_new_tokens`; interrupted: the user stopped it.
    """

    text: str
    tokens: tuple[int, ...]
    end: Literal["done", "cut", "interrupted"]


class Stream:
    """Decodes the tokens of an answer as they are generated; a streamer for transformers.

    A character may take several tokens, and the space before a token depends on the previous token. So each token is
    decoded together with the previous ones, and its text is shown once it ends with a complete character.

    Args:
        tokenizer: The model's tokenizer.
        on_text: Receives each new part of the text.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None = None) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._tokens: list[int] = []
        self._parts: list[str] = []
        # Tokens from `_start` on are decoded; those before `_shown` have been shown.
        self._start = self._shown = 0
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt's tokens, (1, T), at the first call; then one token, (1,), at each call."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._tokens += value.flatten().tolist()
        self._show(certain=False)

    def end(self) -> None:
        """Show the remaining text, even if its last character is incomplete."""
        self._show(certain=True)

    def given(self, end: Literal["done", "cut", "interrupted"]) -> Answer:
        """Return the answer so far.

        Args:
            end: How it ended.
        """
        self._show(certain=True)
        return Answer("".join(self._parts), tuple(self._tokens), end)

    def _show(self, *, certain: bool) -> None:
        before, text = self._decode(self._shown), self._decode(len(self._tokens))
        if len(text) <= len(before) or (text.endswith(_HALF_A_CHARACTER) and not certain):
            return
        self._start, self._shown = self._shown, len(self._tokens)
        self._parts.append(text[len(before) :])
        if self._on_text is not None:
            self._on_text(self._parts[-1])

    def _decode(self, stop: int) -> str:
        tokens = self._tokens[self._start : stop]
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def answer(
    architecture: Architecture,
    store: WeightStore,
    tokenizer: Any,
    questions: Sequence[str],
    *,
    max_new_tokens: int,
    device: torch.device,
    generation_config: Any = None,
) -> list[str]:
    """Answer questions by greedy decoding, in the precision of the stored weights, without a second copy of them.

    8-bit weights are decoded one at a time.

    Args:
        architecture: The model's modules; parameters on the meta device, before and after.
        store: The weights.
        tokenizer: The model's tokenizer.
        questions: The user's questions; each is put into the chat template if there is one.
        max_new_tokens: Longest answer in tokens.
        device: The device of the store.
        generation_config: The generation settings that come with the model, or None.

    Returns:
        One answer per question.
    """
    answers: list[str] = []
    if not questions:
        return answers
    settings = Settings(max_new_tokens)
    with whole_model(architecture, store) as model:
        for question in questions:
            prompt = prompt_tokens(tokenizer, [("user", question)]).to(device)
            stream = Stream(tokenizer)
            said = generate(model, prompt, settings, stream, tokenizer=tokenizer, generation_config=generation_config)
            answers.append(said.text.strip())
    return answers


def prompt_tokens(tokenizer: Any, messages: Sequence[Message]) -> torch.Tensor:
    """Tokenize a conversation, up to where the model's next answer begins.

    Args:
        tokenizer: The model's tokenizer.
        messages: The conversation; the last message is the user's. Without a chat template the messages are joined:
            an answer follows its question directly, and the next question begins on a new line.

    Returns:
        (1, T) token ids.

    Raises:
        ModelError: The model's chat template refuses the conversation.
    """
    # Input that the terminal could not decode holds surrogates, which tokenizers refuse.
    clean = [(role, text.encode("utf-8", "replace").decode("utf-8")) for role, text in messages]
    if tokenizer.chat_template:
        turns = [{"role": role, "content": text} for role, text in clean]
        try:
            encoded = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # a template is a program: it may fail in any way
            roles = ", ".join(dict.fromkeys(role for role, _ in clean))
            raise ModelError(
                f"The model's chat template refuses a conversation of {roles}: {short(error)}.",
                "Leave the system message out."
                if "system" in roles
                else "Repair chat_template in the model's tokenizer files.",
            ) from error
    else:
        text = "".join(f"\n{text}" if role == "user" and place else text for place, (role, text) in enumerate(clean))
        encoded = tokenizer(text, return_tensors="pt", verbose=False)
    tokens: torch.Tensor = encoded["input_ids"]
    return tokens.long()


def stop_tokens(*holders: Any) -> list[int]:
    """Return the ids of the tokens that end an answer.

    Args:
        holders: Objects with an optional `eos_token_id`: a tokenizer, generation settings, a model's configuration,
            or None.

    Returns:
        The ids, sorted.
    """
    found: set[int] = set()
    for holder in holders:
        given = getattr(holder, "eos_token_id", None)
        found |= {int(token) for token in (given if isinstance(given, list | tuple) else [given]) if token is not None}
    return sorted(token for token in found if token >= 0)


def generate(
    model: Any,
    prompt: torch.Tensor,
    settings: Settings,
    stream: Stream,
    *,
    tokenizer: Any,
    generation_config: Any = None,
) -> Answer:
    """Generate one answer.

    Args:
        model: A whole Hugging Face model.
        prompt: (1, T) token ids, on the model's device.
        settings: Sampling settings.
        stream: Receives the tokens; after an interruption it holds the partial answer.
        tokenizer: The model's tokenizer.
        generation_config: The generation settings that come with the model, such as a repetition penalty; `settings`
            takes precedence. None: the model has none.

    Returns:
        The answer.
    """
    # As in transformers, generation_config.json takes precedence over config.json.
    stops = stop_tokens(tokenizer, generation_config if stop_tokens(generation_config) else model.config)
    asked = copy.deepcopy(model.generation_config if generation_config is None else generation_config)
    samples = settings.temperature > 0
    asked.update(
        max_new_tokens=settings.max_new_tokens,
        max_length=None,
        num_beams=1,
        num_return_sequences=1,
        use_cache=True,
        do_sample=samples,
        temperature=settings.temperature if samples else None,
        top_p=settings.top_p if samples else None,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
    )
    if not samples:
        asked.top_k = None
    if samples:
        torch.manual_seed(settings.seed)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=asked,
        streamer=stream,
    )
    said = stream.given("done")
    return said if said.tokens and said.tokens[-1] in stops else stream.given("cut")
