"""What is wrong with a configuration, collected so that one attempt shows all of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from sophia_galore.errors import ConfigError, UserError

SHOWN = 5
"""Problems spelled out in one message; more than these are rarely read."""

LONGEST_VALUE = 60
"""Characters of a given value that a message repeats."""


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
        """The place and the cause in one line."""
        return f"{self.where}: {self.cause}" if self.where else self.cause

    def line(self) -> float:
        """The line in the file, for sorting; what has none comes last."""
        digits = self.where.rpartition(":")[2]
        return int(digits) if digits.isdigit() else inf


def raise_problems(
    problems: Sequence[Problem], *, where: str = "in the configuration", error: type[UserError] = ConfigError
) -> None:
    """Does nothing without problems, else raises one error that names them.

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
    """A value as a user would write it in YAML, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."
