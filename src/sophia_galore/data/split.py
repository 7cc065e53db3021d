"""Hold out examples for evaluation, so that none of them is also trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from sophia_galore.data.conversation import Conversation
from sophia_galore.errors import DataError
from sophia_galore.numerics.random import generator

Split = tuple[list[Conversation], list[Conversation]]
"""Training part and evaluation part."""

Item = TypeVar("Item")


def in_seeded_order(items: Sequence[Item], seed: int, purpose: str) -> list[Item]:
    """Shuffle by seed.

    Args:
        items: What to shuffle.
        seed: The run's seed.
        purpose: What the order is for; another purpose gives another order.

    Returns:
        The same items in an order that is a function of the arguments.
    """
    return [items[i] for i in torch.randperm(len(items), generator=generator(seed, purpose)).tolist()]


def split_off(conversations: Sequence[Conversation], fraction: float, seed: int) -> Split:
    """Hold out a fraction of the conversations; equal ones always stay on the same side.

    Args:
        conversations: All conversations.
        fraction: Fraction to hold out, in [0, 1).
        seed: The run's seed.

    Returns:
        Training and evaluation part, each in seeded order. With a fraction above 0 and two or more conversations, each
        part has at least one. Fewer than requested may be held out if conversations repeat.

    Raises:
        DataError: The fraction is above 0 and all conversations are equal.
    """
    groups: dict[str, list[Conversation]] = {}
    for conversation in conversations:
        groups.setdefault(conversation.content_hash(), []).append(conversation)
    shuffled = in_seeded_order(list(groups.values()), seed, "eval split")
    if fraction == 0 or len(conversations) < 2:
        return _flat(shuffled), []
    if len(shuffled) == 1:
        raise DataError(
            f"All {len(conversations)} records say the same, so none can be held out for evaluation.",
            "Set `data.eval_fraction: 0`, or give other evaluation data as `data.eval`.",
        )
    wanted = num_held(len(conversations), fraction)
    held: set[int] = set()
    size = 0
    for index, group in enumerate(shuffled):
        if size + len(group) <= wanted:
            held.add(index)
            size += len(group)
    if not held:  # every group is larger than wanted: hold out the smallest
        held = {min(range(len(shuffled)), key=lambda index: len(shuffled[index]))}
    return (
        _flat([group for index, group in enumerate(shuffled) if index not in held]),
        _flat([group for index, group in enumerate(shuffled) if index in held]),
    )


def num_held(count: int, fraction: float) -> int:
    """Return how many of some are held out: with a fraction above 0, one at least and all but one at most.

    Args:
        count: How many there are.
        fraction: Fraction to hold out, in [0, 1).
    """
    return min(max(round(fraction * count), 1), count - 1) if fraction > 0 and count > 1 else 0


def _flat(groups: Sequence[Sequence[Conversation]]) -> list[Conversation]:
    return [conversation for group in groups for conversation in group]
