"""The tables that decide how a parameter is trained.

The first row of `ROUTES` that applies decides the rule; every row of `REMARKS` that applies is added to the reason.
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
"""The rule's name of a parameter whose gradient is projected; the optimizer then chooses the rule."""


@dataclass(frozen=True)
class ParamRule:
    """One row of the table. Text in braces is filled in: `f` the facts, `p` the parameter, `rank` the optimizer's.

    Args:
        key: Its name.
        applies: Whether it applies.
        reason: Why, as text.
        rule: Name of the numeric rule that trains it, `PROJECTED` or `FROZEN`; empty in a remark.
    """

    key: str
    applies: Callable[[Facts, Param], bool]
    reason: str
    rule: str = ""


@dataclass(frozen=True)
class Routing:
    """The result of the tables for a parameter.

    Args:
        rule: Name of the numeric rule that trains it, `PROJECTED` or `FROZEN`.
        reason: Why, as text.
        remarks: Further remarks, as text.
        keys: Keys of the rows that apply, the one of `ROUTES` first.
    """

    rule: str
    reason: str
    remarks: tuple[str, ...]
    keys: tuple[str, ...]


def rank(facts: Facts) -> int:
    """Return the rank of the projection; 0 for optimizers without one."""
    kind, settings = optimizer(facts), facts.config.optimizer
    if kind == "galore":
        return settings.galore.rank
    return apollo_rank(settings.apollo.rank, mini=kind == "apollo_mini") if kind in PROJECTING else 0


def is_skipped(facts: Facts, param: Param) -> bool:
    """Return whether a matrix is exempt from int8 by `quantization.skip`."""
    skips = facts.config.quantization.skip
    return facts.has_native_int8 and param.is_matrix and any(fnmatchcase(param.name, skip) for skip in skips)


def is_left_out(facts: Facts, param: Param) -> bool:
    """Return whether `training.trainable` leaves a parameter out."""
    wanted = facts.config.training.trainable
    return wanted is not None and not any(param.goes_by(pattern) for pattern in wanted)


def is_held_frozen(facts: Facts, param: Param) -> bool:
    """Return whether a parameter is stored by bitsandbytes, which freezes it."""
    return facts.freezes_layers and param.is_linear


def route_of(facts: Facts, param: Param) -> Routing:
    """Evaluate the tables for one parameter.

    Args:
        facts: The facts of the run.
        param: The parameter.
    """
    first = next(row for row in ROUTES if row.applies(facts, param))
    found = [first, *(row for row in REMARKS if row.applies(facts, param))]
    reason, *remarks = (row.reason.format(f=facts, p=param, rank=rank(facts)) for row in found)
    return Routing(first.rule, reason, tuple(remarks), tuple(row.key for row in found))


def _is_rounded_less(facts: Facts, param: Param) -> bool:
    """Return whether the state stays in fp32 although fewer bits were asked for."""
    asked = facts.config.optimizer.state_bits
    rule = next(row for row in ROUTES if row.applies(facts, param)).rule
    has_state = rule == PROJECTED or (rule != FROZEN and bool(NUMERIC_RULES[rule].slots))
    return has_state and settled_bits(param.shape, asked) != asked


def _is_fixed(facts: Facts, param: Param) -> bool:
    """Return whether a parameter never gets a gradient, by the model's code or by the proof."""
    return not param.requires_grad or (facts.proof is not None and param.inner in facts.proof.unreached)


ROUTES: tuple[ParamRule, ...] = (
    ParamRule("frozen", is_held_frozen, "held in eight bits by bitsandbytes", FROZEN),
    ParamRule("fixed", _is_fixed, "the model keeps it as it is: it gets no gradient", FROZEN),
    ParamRule("not_trainable", is_left_out, "frozen: not in training.trainable", FROZEN),
    ParamRule(
        "instead",
        lambda f, p: optimizer(f) != f.config.optimizer.type,
        "what {f.config.optimizer.type} is for is frozen",
        "adamw",
    ),
    ParamRule("adamw", lambda f, p: optimizer(f) == "adamw", "optimizer.type is adamw", "adamw"),
    ParamRule("sophia", lambda f, p: optimizer(f) == "sophia", "optimizer.type is sophia", "sophia"),
    ParamRule("vector", lambda f, p: len(p.shape) < 2, "norm or bias", "adamw"),
    ParamRule("not_a_matrix", lambda f, p: not p.is_matrix, "no matrix", "adamw"),
    ParamRule("router", lambda f, p: p.is_router, "chooses experts", "adamw"),
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
