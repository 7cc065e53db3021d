"""Checks of special tokens: they have rows in the embedding, and the model learns where to stop."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from sophia_galore.data.example import Example
from sophia_galore.errors import ModelError

_KINDS = {"bos": "begin-of-text", "eos": "end-of-text", "pad": "padding"}


def refuse_special_tokens(model_config: Any, tokenizer: Any, generation_config: Any) -> None:
    """Refuse special tokens that the embedding has no row for.

    Args:
        model_config: The model's Hugging Face configuration.
        tokenizer: Its tokenizer.
        generation_config: Its generation settings, or None.

    Raises:
        ModelError: There is one; the message names the token and the file.
    """
    rows = int(model_config.vocab_size)
    says = {"The tokenizer": tokenizer, "generation_config.json": generation_config, "config.json": model_config}
    for who, holder in says.items():
        for kind, words in _KINDS.items():
            outside = [token for token in _ids(holder, kind) if token >= rows]
            if not outside:
                continue
            remedy = "Use the tokenizer and the configuration that belong to the model"
            # Padding is masked, whatever its token is.
            remedy += ", or remove that token from them: training needs no padding token." if kind == "pad" else "."
            raise ModelError(
                f"{who} says that the {words} token is number {outside[0]}, but the model's embedding has only {rows} "
                "rows (0 is the first).",
                remedy,
            )


def stopping_at(end_ids: Sequence[int], generation_config: Any, model_config: Any) -> Any:
    """Return generation settings that also stop at the ends of turns.

    Args:
        end_ids: Tokens that end a turn and at which generation does not stop yet.
        generation_config: The model's generation settings, or None.
        model_config: The model's Hugging Face configuration.

    Returns:
        The same settings if there is nothing to add; else others that name these tokens first.
    """
    from transformers import GenerationConfig

    if not end_ids:
        return generation_config
    changed = copy.deepcopy(generation_config) if generation_config is not None else GenerationConfig()
    known = _ids(generation_config, "eos") or _ids(model_config, "eos")
    changed.eos_token_id = list(dict.fromkeys([*end_ids, *known]))
    return changed


def end_of_turn_note(end_ids: Sequence[int], tokenizer: Any) -> str | None:
    """Return a note if turns end with another token than texts.

    Args:
        end_ids: Tokens that end a turn and at which the model's generation did not stop by itself.
        tokenizer: The model's tokenizer.

    Returns:
        A sentence for the user; None: they end with the same one.
    """
    if not end_ids:
        return None
    ends = ", ".join(str(name) for name in tokenizer.convert_ids_to_tokens(list(end_ids)))
    return (
        f"The chat template ends turns with {ends}, at which this model's generation does not stop by itself "
        f"(its end-of-text token is {tokenizer.eos_token or 'not named'}): the trained model's generation_config.json "
        "names it, so that answers end there."
    )


def stop_warning(
    examples: Sequence[Example], *, model_config: Any, tokenizer: Any, generation_config: Any
) -> str | None:
    """Return a warning if the model would not learn to stop, or at another token than generation does.

    Args:
        examples: The training examples.
        model_config: The model's Hugging Face configuration.
        tokenizer: Its tokenizer.
        generation_config: Its generation settings, or None.

    Returns:
        A sentence for the user; None: all is well.
    """
    own = _ids(tokenizer, "eos")
    # As in transformers' `generate`.
    stops = _ids(generation_config, "eos") or _ids(model_config, "eos")
    if not (own or stops):
        return "Neither tokenizer nor model names an end-of-text token: the model will not learn to stop."
    ends = torch.tensor([*own, *stops], dtype=torch.int32)
    if not any(bool(torch.isin(example.input_ids[example.counted], ends).any()) for example in examples):
        names = ", ".join(str(name) for name in tokenizer.convert_ids_to_tokens(sorted({*own, *stops})))
        return (
            f"In no training example the loss counts a token that ends an answer ({names}): the model will not learn "
            "to stop. Its chat template writes none, or training.max_length cuts all of them off."
        )
    if own and stops and not set(own) & set(stops):
        return (
            f"The tokenizer ends a text with {tokenizer.eos_token} (number {own[0]}), but generation stops at number "
            f"{', '.join(map(str, stops))}: answers may go on past their end."
        )
    return None


def _ids(holder: Any, kind: str) -> list[int]:
    """Return the ids of a kind of token: one, several or none; negative ids mean none."""
    given = getattr(holder, f"{kind}_token_id", None)
    listed = given if isinstance(given, list | tuple) else [given]
    return [int(token) for token in listed if token is not None and token >= 0]
