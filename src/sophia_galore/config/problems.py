"""Values that the user gave, and problems with them, which are collected and shown at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from math import inf

from sophia_galore.errors import ConfigError, UserError

SHOWN = 5
"""The largest number of problems in one message."""

LONGEST_VALUE = 60
"""The largest number of characters of a value in a message."""

CUTOFF = 0.7
"""The lowest similarity for a suggestion."""

LAST_WORD_WEIGHT = 0.95
"""Factor on the similarity of the last word alone, relative to the whole path."""


@dataclass(frozen=True)
class Given:
    """One value that the user gave.

    Args:
        key: Dotted key; after translation, our own name.
        value: As YAML reads it.
        where: "run.yaml:12" or "in the override 'x=y'".
        written: The key as the user wrote it.
    """

    key: str
    value: object
    where: str
    written: str

    def name(self) -> str:
        """Return the key for a message: as written, with our name after it if that differs."""
        return self.key if self.written == self.key else f"{self.written} ({self.key})"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Args:
        where: "run.yaml:12" or "in the override 'x=y'"; empty if it has no place.
        cause: What is wrong there.
        remedy: What to do about it.
    """

    where: str
    cause: str
    remedy: str

    def sentence(self) -> str:
        """Return place and cause in one line."""
        return f"{self.where}: {self.cause}" if self.where else self.cause

    def line(self) -> float:
        """Return the line in the file, for sorting; infinity if there is none."""
        digits = self.where.rpartition(":")[2]
        return int(digits) if digits.isdigit() else inf


def raise_problems(
    problems: Sequence[Problem], *, where: str = "in the configuration", error: type[UserError] = ConfigError
) -> None:
    """Raise one error that names all problems, if there are any.

    Args:
        problems: What is wrong.
        where: Where, in words that follow "2 problems".
        error: What to raise.

    Raises:
        UserError: As asked, with all problems, at most `SHOWN` of them spelled out.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise error(problems[0].sentence(), problems[0].remedy)
    lines = [f"{len(problems)} problems {where}:"]
    for problem in sorted(problems, key=Problem.line)[:SHOWN]:
        lines.append(f"- {problem.sentence()}")
        if problem.remedy:
            lines.append(f"  {problem.remedy}")
    if len(problems) > SHOWN:
        lines.append(f"- and {len(problems) - SHOWN} more")
    raise error("\n".join(lines), "Correct these and start again; nothing was changed.")


def show(value: object) -> str:
    """Format a value as in YAML, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most similar to `name`; the first of equals, None if none is similar.

    A key can be misspelt ("optimiser.type"), or right but in the wrong section ("optimizer.rank"). So names are
    compared twice, as a whole and by their last words, and the better of the two counts.
    """
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
