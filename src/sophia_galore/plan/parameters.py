"""The table of verdicts on a parameter: what trains it, and what else there is to say about it.

The first row of `ROUTES` that applies decides what trains it; every row of `REMARKS` that applies is added to the
reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from sophia_galore.numerics.rules import RULES as NUMERIC_RULES
from sophia_galore.optim.build import settled_bits
from sophia_galore.optim.recipes import PROJECTING, apollo_rank
from sophia_galore.plan.facts import Facts, Param
from sophia_galore.plan.route import FROZEN
from sophia_galore.plan.rules import optimizer

PROJECTED = "projected"
"""What stands where a rule's name would, if the gradient is projected: the rule is then the optimizer's."""


@dataclass(frozen=True)
class ParamRule:
    """One row of the table. Text in braces is filled in: `f` the facts, `p` the parameter, `rank` the optimizer's.

    Args:
        key: Its name.
        applies: Whether it is the case.
        reason: Why, in words.
        rule: Name of the numeric rule that trains it, `PROJECTED` or `FROZEN`; empty in a remark.
    """

    key: str
    applies: Callable[[Facts, Param], bool]
    reason: str
    rule: str = ""


@dataclass(frozen=True)
class Routing:
    """What the tables say of a parameter.

    Args:
        rule: Name of the numeric rule that trains it, `PROJECTED` or `FROZEN`.
        reason: Why, in words.
        remarks: What else there is to say, in words.
        keys: The rows that say so; the first one is of `ROUTES`.
    """

    rule: str
    reason: str
    remarks: tuple[str, ...]
    keys: tuple[str, ...]


def rank(facts: Facts) -> int:
    """Columns of a basis, for optimizers that have one; else 0."""
    kind, settings = optimizer(facts), facts.config.optimizer
    if kind == "galore":
        return settings.galore.rank
    return apollo_rank(settings.apollo.rank, mini=kind == "apollo_mini") if kind in PROJECTING else 0


def is_skipped(facts: Facts, param: Param) -> bool:
    """Whether a matrix stays in the store's format where others are held in native eight bits."""
    skips = facts.config.quantization.skip
    return facts.has_native_int8 and param.is_matrix and any(fnmatchcase(param.name, skip) for skip in skips)


def is_left_out(facts: Facts, param: Param) -> bool:
    """Whether a parameter is none of those that were to be trained."""
    wanted = facts.config.training.trainable
    return wanted is not None and not any(param.goes_by(pattern) for pattern in wanted)


def is_held_frozen(facts: Facts, param: Param) -> bool:
    """Whether a parameter is held by bitsandbytes, which can't change it."""
    return facts.freezes_layers and param.is_linear


def route_of(facts: Facts, param: Param) -> Routing:
    """Evaluate the tables for one parameter.

    Args:
        facts: What is known of the run.
        param: The parameter.
    """
    first = next(row for row in ROUTES if row.applies(facts, param))
    found = [first, *(row for row in REMARKS if row.applies(facts, param))]
    reason, *remarks = (row.reason.format(f=facts, p=param, rank=rank(facts)) for row in found)
    return Routing(first.rule, reason, tuple(remarks), tuple(row.key for row in found))


def _is_rounded_less(facts: Facts, param: Param) -> bool:
    """Whether a state that was asked for in fewer bits stays in fp32."""
    asked = facts.config.optimizer.state_bits
    rule = next(row for row in ROUTES if row.applies(facts, param)).rule
    has_state = rule == PROJECTED or (rule != FROZEN and bool(NUMERIC_RULES[rule].slots))
    return has_state and settled_bits(param.shape, asked) != asked


ROUTES: tuple[ParamRule, ...] = (
    ParamRule(
        "frozen",
        is_held_frozen,
        "held in eight bits by bitsandbytes",
        FROZEN,
    ),
    ParamRule("not_trainable", lambda f, p: is_left_out(f, p), "frozen: not in training.trainable", FROZEN),
    ParamRule(
        "instead",
        lambda f, p: optimizer(f) != f.config.optimizer.type,
        "what {f.config.optimizer.type} is for is frozen",
        "adamw",
    ),
    ParamRule("adamw", lambda f, p: optimizer(f) == "adamw", "optimizer.type is adamw", "adamw"),
    ParamRule("sophia", lambda f, p: optimizer(f) == "sophia", "optimizer.type is sophia", "sophia"),
    ParamRule("vector", lambda f, p: not p.is_matrix, "norm or bias", "adamw"),
    ParamRule(
        "scale_head", lambda f, p: optimizer(f) == "scale" and p.is_head, "head, with momentum", "scale_momentum"
    ),
    ParamRule("scale_matrix", lambda f, p: optimizer(f) == "scale", "no state", "scale"),
    ParamRule("small_side", lambda f, p: min(p.shape) <= rank(f), "a side <= rank {rank}", "adamw"),
    ParamRule("projected", lambda f, p: True, "projected, rank {rank}", PROJECTED),
)

REMARKS: tuple[ParamRule, ...] = (
    ParamRule(
        "tied_head",
        lambda f, p: p.is_head and p.part == "embed",
        "embedding and head in one: both gradients, one step",
    ),
    ParamRule(
        "padding_row",
        lambda f, p: p.padding_row is not None,
        "no gradient from look-ups of padding, row {p.padding_row}",
    ),
    ParamRule("small_state", _is_rounded_less, "state in fp32: fewer than 4096 elements"),
    ParamRule("skipped", is_skipped, "not in eight bits: quantization.skip"),
)
