"""Holding out examples for evaluation, so that none of them is also trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sophia_galore.data.conversation import Conversation
from sophia_galore.errors import DataError
from sophia_galore.numerics.random import generator

Split = tuple[list[Conversation], list[Conversation]]
"""Training part and evaluation part."""


def in_seeded_order(conversations: Sequence[Conversation], seed: int, purpose: str) -> list[Conversation]:
    """Shuffles by seed.

    Args:
        conversations: What to shuffle.
        seed: The run's seed.
        purpose: What the order is for; another purpose gives another order.

    Returns:
        The same conversations in an order that is a function of the arguments.
    """
    order = torch.randperm(len(conversations), generator=generator(seed, purpose)).tolist()
    return [conversations[i] for i in order]


def split_off(conversations: Sequence[Conversation], fraction: float, seed: int) -> Split:
    """Holds out a share of the conversations; equal ones always land on the same side.

    Args:
        conversations: All conversations.
        fraction: Share to hold out, in [0, 1).
        seed: The run's seed.

    Returns:
        Training and evaluation part, each in seeded order. With a fraction above 0 and two or
        more conversations, at least one is held out and one is left. It may be fewer than asked
        for where conversations repeat.

    Raises:
        DataError: Something is to be held out, and all conversations are the same.
    """
    groups: dict[str, list[Conversation]] = {}
    for conversation in conversations:
        groups.setdefault(conversation.content_hash(), []).append(conversation)
    together = list(groups.values())
    shuffled = [together[i] for i in torch.randperm(len(together), generator=generator(seed, "eval split")).tolist()]
    if fraction == 0 or len(conversations) < 2:
        return _flat(shuffled), []
    if len(shuffled) == 1:
        raise DataError(
            f"All {len(conversations)} records say the same, so none can be held out for evaluation.",
            "Set `data.eval_fraction: 0`, or give other evaluation data as `data.eval`.",
        )
    wanted = min(max(round(fraction * len(conversations)), 1), len(conversations) - 1)
    held: set[int] = set()
    size = 0
    for index, group in enumerate(shuffled):
        if size + len(group) <= wanted:
            held.add(index)
            size += len(group)
    if not held:  # every group is larger than what is wanted: take the least that holds something out
        held = {min(range(len(shuffled)), key=lambda index: len(shuffled[index]))}
    return (
        _flat([group for index, group in enumerate(shuffled) if index not in held]),
        _flat([group for index, group in enumerate(shuffled) if index in held]),
    )


def _flat(groups: Sequence[Sequence[Conversation]]) -> list[Conversation]:
    return [conversation for group in groups for conversation in group]
