"""Apply the weights of data sets: how many conversations of each are used, and how often.

A weight up to 1 is the fraction of the data set that is used, chosen by the seed. A weight above 1 repeats: each
conversation is used as often as the integer part says, and a random part of them once more for the rest. Conversations
are repeated after evaluation data were held out, so that the latter are neither trained on nor evaluated twice.
"""

from __future__ import annotations

from collections.abc import Sequence

from sophia_galore.config.schema_data import DataSource
from sophia_galore.data.conversation import Conversation
from sophia_galore.data.gather import Portion
from sophia_galore.data.split import in_seeded_order
from sophia_galore.errors import DataError


def shares(portions: Sequence[Portion], seed: int, use: str) -> list[Conversation]:
    """Choose conversations of each data set by its weight and `max_examples`.

    Args:
        portions: The data sets.
        seed: The data's seed.
        use: What they are for; another use gives another choice.

    Returns:
        The conversations by data set, in the order of the files.

    Raises:
        DataError: The weight of a data set leaves no conversation.
    """
    taken: list[Conversation] = []
    for place, portion in enumerate(portions):
        source, everything = portion.source, portion.conversations
        num = min(len(everything), source.max_examples or len(everything))
        if source.weight < 1:
            num = _rounded(source.weight * num)
        if everything and not num:
            raise DataError(
                f"{source.path}: weight {source.weight:g} leaves none of its {len(everything)} records.",
                "Raise the weight, or leave the data set out.",
            )
        taken += _some(everything, num, seed, f"{use} share {place}")
    return taken


def repeated(chosen: Sequence[Conversation], portions: Sequence[Portion], seed: int, use: str) -> list[Conversation]:
    """Repeat the conversations of data sets with a weight above 1.

    Args:
        chosen: The conversations chosen by `shares`, in any order.
        portions: The data sets.
        seed: The data's seed.
        use: What they are for.

    Returns:
        The conversations in seeded order; unchanged if no data set is repeated.
    """
    if all(portion.source.weight <= 1 for portion in portions):
        return list(chosen)
    owner = {id(each): place for place, portion in enumerate(portions) for each in portion.conversations}
    own: list[list[Conversation]] = [[] for _ in portions]
    for conversation in chosen:
        own[owner[id(conversation)]].append(conversation)
    mixed: list[Conversation] = []
    for place, (portion, conversations) in enumerate(zip(portions, own, strict=True)):
        times, rest = _times(portion.source, len(conversations))
        mixed += [*conversations * times, *_some(conversations, rest, seed, f"{use} repeat {place}")]
    return in_seeded_order(mixed, seed, f"{use} mixture")


def _times(source: DataSource, num: int) -> tuple[int, int]:
    """Return how often all conversations are used, and how many of them once more."""
    if source.weight <= 1:
        return 1, 0
    total = _rounded(source.weight * num)
    return (total // num, total % num) if num else (1, 0)


def _some(conversations: Sequence[Conversation], num: int, seed: int, purpose: str) -> list[Conversation]:
    if num >= len(conversations):
        return list(conversations)
    first = {id(each) for each in in_seeded_order(conversations, seed, purpose)[:num]}
    return [conversation for conversation in conversations if id(conversation) in first]


def _rounded(amount: float) -> int:
    """Round to the nearest integer, halves up."""
    return int(amount + 0.5)
