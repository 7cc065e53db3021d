"""What a table of rules consists of, and how it is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sophia_galore.config.problems import Problem, raise_problems
from sophia_galore.errors import ConfigError, UserError
from sophia_galore.plan.facts import Facts


@dataclass(frozen=True)
class Use:
    """It is done as asked, and there is something to know about it.

    Args:
        setting: What is settled by that; empty: nothing.
        to: As what.
    """

    setting: str = ""
    to: str = ""

    def words(self, facts: Facts) -> str:
        """What is done, in words."""
        return "use"


@dataclass(frozen=True)
class FallBack:
    """Something else is done than was asked for, or than would be done elsewhere.

    Args:
        setting: What is done otherwise.
        to: As what.
    """

    setting: str
    to: str

    def words(self, facts: Facts) -> str:
        """What is done, in words."""
        return f"fall back to {self.to.format(f=facts)}"


@dataclass(frozen=True)
class Refuse:
    """Nothing is done.

    Args:
        error: What is raised.
    """

    error: type[UserError] = ConfigError

    def words(self, facts: Facts) -> str:
        """What is done, in words."""
        return "refuse"


Verdict = Use | FallBack | Refuse


@dataclass(frozen=True)
class Rule:
    """One row of the table. Text in braces is filled in from the facts.

    Args:
        key: Its name.
        applies: Whether it is the case.
        verdict: What is done then.
        reason: Why, in a sentence.
        remedy: What the user can do about it, in a sentence; empty: nothing needs to be done.
    """

    key: str
    applies: Callable[[Facts], bool]
    verdict: Verdict
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class Decided:
    """A rule that applied, with its text filled in.

    Args:
        key: The rule's name.
        verdict: "use", "fall back to ..." or "refuse".
        reason: Why.
        remedy: What the user can do about it; may be empty.
    """

    key: str
    verdict: str
    reason: str
    remedy: str

    def sentence(self) -> str:
        """Reason and remedy."""
        return f"{self.reason} {self.remedy}".rstrip()

    def to_json(self) -> dict[str, Any]:
        """It as plain data, for `plan.json`."""
        return asdict(self)


def decide(rules: Iterable[Rule], facts: Facts) -> tuple[Decided, ...]:
    """Evaluate a table.

    Args:
        rules: The table.
        facts: What is known.

    Returns:
        Those of its rules that apply, in its order; none of them refuses.

    Raises:
        UserError: Some refuse; all of them are named. Of the class that they agree on.
    """
    found = [rule for rule in rules if rule.applies(facts)]
    refusals = [rule for rule in found if isinstance(rule.verdict, Refuse)]
    kinds = {rule.verdict.error for rule in refusals if isinstance(rule.verdict, Refuse)}
    raise_problems(
        [Problem("", rule.reason.format(f=facts), rule.remedy.format(f=facts)) for rule in refusals],
        where="with this run",
        error=kinds.pop() if len(kinds) == 1 else UserError,
    )
    return tuple(
        Decided(rule.key, rule.verdict.words(facts), rule.reason.format(f=facts), rule.remedy.format(f=facts))
        for rule in found
    )


def settled(rules: Iterable[Rule], setting: str, facts: Facts) -> str | None:
    """What a table says a setting is.

    Args:
        rules: The table.
        setting: Which setting.
        facts: What is known.

    Returns:
        What the first rule about it that applies says; None: there is none, so it is as asked.
    """
    for rule in rules:
        if not isinstance(rule.verdict, Refuse) and rule.verdict.setting == setting and rule.applies(facts):
            return rule.verdict.to
    return None
