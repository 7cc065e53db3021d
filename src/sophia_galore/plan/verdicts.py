"""Rules, verdicts, and the evaluation of a table of rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sophia_galore.config.problems import Problem, raise_problems
from sophia_galore.errors import ConfigError, UserError
from sophia_galore.plan.facts import Facts


@dataclass(frozen=True)
class Use:
    """The run does as asked, with a note for the user.

    Args:
        setting: The setting that this decides; empty: none.
        to: Its value.
    """

    setting: str = ""
    to: str = ""


@dataclass(frozen=True)
class FallBack:
    """The run uses another value than was asked for, or than it would use elsewhere.

    Args:
        setting: The setting that is changed.
        to: Its value.
    """

    setting: str
    to: str


@dataclass(frozen=True)
class Refuse:
    """The run is refused.

    Args:
        error: The class of the error.
    """

    error: type[UserError] = ConfigError


Verdict = Use | FallBack | Refuse


def describe(verdict: Verdict, facts: Facts) -> str:
    """Return a verdict as `plan.json` has it: "use", "fall back to ..." or "refuse"."""
    if isinstance(verdict, FallBack):
        return f"fall back to {verdict.to.format(f=facts)}"
    return "refuse" if isinstance(verdict, Refuse) else "use"


@dataclass(frozen=True)
class Rule:
    """One row of the table. Text in braces is filled in from the facts.

    Args:
        key: Its name.
        applies: Whether it applies to the facts.
        verdict: What happens then.
        reason: Why, as a sentence.
        remedy: What the user can do, as a sentence; empty if nothing needs to be done.
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
        remedy: What the user can do; may be empty.
    """

    key: str
    verdict: str
    reason: str
    remedy: str

    def sentence(self) -> str:
        """Return reason and remedy."""
        return f"{self.reason} {self.remedy}".rstrip()

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data, for `plan.json`."""
        return asdict(self)


def decide(rules: Iterable[Rule], facts: Facts) -> tuple[Decided, ...]:
    """Evaluate a table.

    Args:
        rules: The table.
        facts: What is known.

    Returns:
        The rules that apply, in the order of the table.

    Raises:
        UserError: At least one rule refuses. The error names all of them and has their class, if they share one.
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
        Decided(rule.key, describe(rule.verdict, facts), rule.reason.format(f=facts), rule.remedy.format(f=facts))
        for rule in found
    )


def settled(rules: Iterable[Rule], setting: str, facts: Facts) -> str | None:
    """Return the value that a table gives a setting.

    Args:
        rules: The table.
        setting: The setting's name.
        facts: What is known.

    Returns:
        The value from the first such rule that applies; None if no rule applies, so the setting is as asked.
    """
    for rule in rules:
        if not isinstance(rule.verdict, Refuse) and rule.verdict.setting == setting and rule.applies(facts):
            return rule.verdict.to
    return None
