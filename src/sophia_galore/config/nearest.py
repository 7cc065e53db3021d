"""The known name that a user most likely meant.

A key can be wrong in two ways: misspelt ("optimiser.type"), or right but in the wrong section
("optimizer.rank"). So a candidate is compared twice, over its full path and by its last word,
and the better of the two counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

from sophia_galore.config.aliases import ALIASES
from sophia_galore.config.keys import keys, sections

CUTOFF = 0.7
"""Likeness below which a suggestion would be a guess."""

LAST_WORD_WEIGHT = 0.95
"""A match of the last word alone counts a little less than one of the whole path."""

SHORTHANDS = {
    "lr": "training.learning_rate",
    "bs": "training.batch_size",
    "wd": "training.weight_decay",
    "steps": "training.max_steps",
    "dataset": "data.train",
    "optimizer": "optimizer.type",
}
"""Names in wide use that look like none of ours; only for suggestions."""


def nearest_key(name: str) -> str | None:
    """The known key or section most like `name`, or None if nothing is.

    Args:
        name: Dotted, as the user wrote it.
    """
    last = name.rsplit(".", 1)[-1]
    if last in SHORTHANDS:
        return SHORTHANDS[last]
    # Real keys come first: `nearest` keeps the first of equals, and an alias often shares the last word.
    found = nearest(name, [*keys(), *sections(), *ALIASES])
    return ALIASES[found].target if found in ALIASES else found


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`; the first of equals, None if nothing is like it."""
    best, best_score = None, CUTOFF
    for candidate in known:
        score = _likeness(name, candidate)
        if score > best_score:
            best, best_score = candidate, score
    return best


def _likeness(name: str, candidate: str) -> float:
    name, candidate = name.lower().replace("-", "_"), candidate.lower()
    whole = SequenceMatcher(None, name, candidate).ratio()
    last = SequenceMatcher(None, name.rsplit(".", 1)[-1], candidate.rsplit(".", 1)[-1]).ratio()
    return max(whole, LAST_WORD_WEIGHT * last)
