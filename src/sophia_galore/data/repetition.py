"""Measure how much of the evaluation data repeats the training data, by an n-gram model.

The model counts token sequences of the training examples and predicts each token from the ones before it, by
Witten and Bell's interpolation (IEEE Trans. Inf. Theory 37(4), 1991, their method C, as in Chen and Goodman, 1996):

    p_n(w | h) = (c(h w) + t(h) p_{n-1}(w | h')) / (c(h) + t(h))        p_{-1} = 1 / V

where c are the counts in the training examples, t(h) is the number of different tokens seen after the n tokens h, and
h' are the last n - 1 of them. If the evaluation text repeats the training text, its loss is near 0, as any model's is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sophia_galore.data.example import Example

ORDER = 7
"""Maximum number of preceding tokens that are used."""

MOST_TRAIN_TOKENS = 500_000
"""Number of training tokens that are read, so that it takes about a second."""

MOST_EVAL_TOKENS = 50_000

_PREDICTED = 0.5
"""A token with more than this probability counts as predicted by repetition."""

_BASE = np.uint64(0x9E3779B97F4A7C15)

Keys = NDArray[np.uint64]


@dataclass(frozen=True)
class Repetition:
    """How much the evaluation examples repeat the training examples.

    Args:
        loss: Loss of the n-gram model on the counted tokens of the evaluation examples, in nats per token.
        share: Fraction of these tokens that it predicts with a probability above 1/2, from 0 to 1.
    """

    loss: float
    share: float


def repetition(train: Sequence[Example], eval: Sequence[Example]) -> Repetition | None:
    """Count token sequences of the training examples, and predict the evaluation examples from them.

    Args:
        train: Training examples; the first half a million tokens are read.
        eval: Evaluation examples; the counted ones of the first 50,000 tokens are predicted.

    Returns:
        Loss and share; None without an evaluation.
    """
    seen, _ = _joined(train, MOST_TRAIN_TOKENS)
    asked, counted = _joined(eval, MOST_EVAL_TOKENS)
    if not counted.any():
        return None
    vocabulary = 1 + max(int(seen.tokens.max(initial=0)), int(asked.tokens.max()))
    probability = np.full(len(asked.tokens), 1 / vocabulary)
    for order in range(ORDER + 1):
        probability = _interpolated(seen, asked, probability, order)
    counted_probability = probability[counted]
    return Repetition(
        loss=float(-np.log(counted_probability).mean()), share=float((counted_probability > _PREDICTED).mean())
    )


@dataclass(frozen=True)
class _Text:
    """Examples one after the other: token ids, and the place of each token in its own example, both (T,)."""

    tokens: Keys
    places: NDArray[np.int64]

    def contexts(self, order: int) -> Keys:
        """Return a key for the `order` tokens before each token, (T,); valid if the example has that many."""
        keys = np.zeros(len(self.tokens), dtype=np.uint64)
        for distance in range(order, 0, -1):
            keys[distance:] = (keys[distance:] + self.tokens[:-distance] + np.uint64(1)) * _BASE
        return _mixed(keys)


def _joined(examples: Sequence[Example], most: int) -> tuple[_Text, NDArray[np.bool_]]:
    """Concatenate examples until they have at least `most` tokens, and return which of these count."""
    chosen, num_tokens = [], 0
    for example in examples:
        if num_tokens >= most:
            break
        chosen.append(example)
        num_tokens += example.num_tokens
    none = np.zeros(0, dtype=np.int64)
    tokens = np.concatenate([none, *(example.input_ids.numpy() for example in chosen)]).astype(np.uint64)
    places = np.concatenate([none, *(np.arange(example.num_tokens) for example in chosen)])
    counted = np.concatenate([none.astype(np.bool_), *(example.counted.numpy() for example in chosen)])
    return _Text(tokens, places), counted


def _interpolated(seen: _Text, asked: _Text, lower: NDArray[np.float64], order: int) -> NDArray[np.float64]:
    """Return probabilities given `order` preceding tokens, (T,), from those given one token less."""
    contexts = seen.contexts(order)[seen.places >= order]
    pairs = _mixed(contexts + seen.tokens[seen.places >= order] * _BASE)
    pair_keys, first, pair_counts = np.unique(pairs, return_index=True, return_counts=True)
    context_keys, context_counts = np.unique(contexts, return_counts=True)
    kinds_keys, kinds_counts = np.unique(contexts[first], return_counts=True)
    asked_contexts = asked.contexts(order)
    asked_pairs = _mixed(asked_contexts + asked.tokens * _BASE)
    whole = asked.places >= order
    count = np.where(whole, _counts_of(asked_pairs, pair_keys, pair_counts), 0)
    total = np.where(whole, _counts_of(asked_contexts, context_keys, context_counts), 0)
    kinds = np.where(whole, _counts_of(asked_contexts, kinds_keys, kinds_counts), 0)
    return np.where(total > 0, (count + kinds * lower) / np.maximum(total + kinds, 1), lower)


def _counts_of(keys: Keys, known: Keys, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the count of each key, 0 for unknown ones; `known` is sorted."""
    if not len(known):
        return np.zeros(len(keys), dtype=np.int64)
    places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[places] == keys, counts[places], 0)


def _mixed(keys: Keys) -> Keys:
    """Mix the bits of keys, so that 64 bits distinguish sequences (splitmix64)."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))
