"""Everything that can be combined, as data: a new rule, basis or format is a word in one of these tables.

The whole product of what decides about numbers (rule, basis, residual, transport, format of the basis) is there;
formats of state and weight, shapes and adaptive gaps are dealt out to it in turn, so that each pair of words of
any two tables meets somewhere (`test_every_pair_meets`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from itertools import cycle, product
from typing import Any, Literal, get_args

import torch

from sophia_galore.numerics.bases import BasisKind
from sophia_galore.numerics.hyper import Hyper
from sophia_galore.numerics.residual import Residual
from sophia_galore.numerics.rules import RULES
from sophia_galore.optim.recipes import STORED_BASES, ProjectionBits, StateBits
from sophia_galore.optim.spec import ParamSpec, SubspaceSpec

# Peak rates with which each rule goes some way, and not too far, in the few steps of a test.
RATES = {"sgd": 1e-2, "muon": 5e-2, "scale": 3e-2, "scale_momentum": 3e-2}
HYPER = Hyper(beta2=0.99, rho=0.01)

TABLES: dict[str, tuple[Any, ...]] = {
    "rule": tuple(RULES),
    "kind": ("dense", *get_args(BasisKind)),
    "residual": get_args(Residual),
    "transport": (False, True),
    "projection_bits": get_args(ProjectionBits),
    "adaptive": (False, True),
    "state_bits": get_args(StateBits),
    # and in eight bits, written at each step or when the basis is refreshed
    "dtype": (torch.float32, torch.bfloat16, torch.int8, "folded"),
    # right, left, square, and a vector; the first two have odd numbers of elements or several blocks of states
    "shape": ((51, 5), (6, 48), (7, 7), (9,)),
}
_MAIN, _DEALT = ("rule", "kind", "residual", "transport", "projection_bits"), ("state_bits", "dtype", "shape")


@dataclass(frozen=True)
class Case:
    """One word of each table."""

    rule: str
    kind: str
    residual: Residual = "none"
    transport: bool = False
    projection_bits: ProjectionBits = 32
    adaptive: bool = False
    state_bits: StateBits = 32
    dtype: torch.dtype | Literal["folded"] = torch.float32
    shape: tuple[int, ...] = (51, 5)

    def __str__(self) -> str:
        flags = [name for name in ("transport", "adaptive") if getattr(self, name)]
        bits = f"P{self.projection_bits}-S{self.state_bits}"
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}.get(self.dtype, "folded")
        return "-".join([self.rule, self.kind, self.residual, *flags, bits, dtype, "x".join(map(str, self.shape))])

    def spec(self, name: str = "w", *, gap: int = 3, offset: int = 1, **more: Any) -> ParamSpec:
        """The parameter of this case."""
        subspace = None
        if self.kind != "dense":
            subspace = SubspaceSpec(
                rank=3,
                gap=gap,
                offset=offset,
                scale=0.5,
                kind=self.kind,  # type: ignore[arg-type]
                adaptive=self.adaptive,
                transport=self.transport,
                projection_bits=self.projection_bits,
                residual=self.residual,
                folds_late=self.dtype == "folded",
            )
        settings: dict[str, Any] = {"weight_decay": 0.1, "learning_rate": RATES.get(self.rule, 1e-2), "hyper": HYPER}
        return ParamSpec(
            name, self.shape, rule=self.rule, state_bits=self.state_bits, subspace=subspace, **{**settings, **more}
        )

    @property
    def draws(self) -> bool:
        """Whether anything in its steps is drawn at random."""
        rounds_state = self.state_bits < 32 and any(slot.extent == "full" for slot in RULES[self.rule].slots.values())
        return self.dtype != torch.float32 or rounds_state or self.kind not in ("dense", "svd")

    @property
    def may_not_feel_its_basis(self) -> bool:
        """Whether a drawn basis may show or not: SGD scales channels by nearly 1 in any subspace, till momenta move."""
        return self.rule == "sgd" and self.residual in ("channel", "tensor") and self.dtype == torch.float32


# What can't be combined, and why.
MEANINGLESS: tuple[tuple[str, Callable[[Case], bool]], ...] = (
    (
        "without a subspace there is no rest, no basis to store or to turn, and no gap",
        lambda c: c.kind == "dense" and (c.residual != "none" or c.transport or c.adaptive or c.projection_bits != 32),
    ),
    (
        "column norms are those of the full gradient",
        lambda c: RULES[c.rule].column_norm and c.kind != "dense",
    ),
    (
        "a basis that is a function of the seed is not stored",
        lambda c: c.kind not in ("dense", *STORED_BASES) and c.projection_bits != 32,
    ),
    (
        "an adaptive gap looks at how far the basis turned, and one that is drawn always turns",
        lambda c: c.kind not in ("dense", *STORED_BASES) and c.adaptive,
    ),
    (
        "Gaussian columns are not orthonormal: G P P^T is no projection, and P^T Q no change of basis",
        lambda c: c.kind == "gaussian" and (c.residual in ("none", "fira") or c.transport),
    ),
    (
        "a vector has neither rows nor columns",
        lambda c: len(c.shape) == 1 and (c.kind != "dense" or c.rule not in ("adamw", "sophia", "sgd")),
    ),
    (
        "a vector has no rows to share scales in",
        lambda c: len(c.shape) == 1 and c.dtype in (torch.int8, "folded"),
    ),
    (
        "updates are summed up in a stored basis, and only if they all lie in it",
        lambda c: c.dtype == "folded" and (c.kind not in STORED_BASES or c.residual != "none"),
    ),
)


def is_meaningful(case: Case) -> bool:
    """Whether the words of a case can be combined."""
    return not any(applies(case) for _, applies in MEANINGLESS)


def main_product() -> Iterator[Case]:
    """Every combination of rule, basis, residual, transport and format of the basis that has a meaning."""
    for words in product(*(TABLES[name] for name in _MAIN)):
        case = Case(**dict(zip(_MAIN, words, strict=True)))
        if is_meaningful(case):
            yield case


@cache
def all_cases() -> tuple[Case, ...]:
    """`main_product`, with one word of each other table dealt to each."""
    # Without a subspace there are so few that each is dealt several hands.
    mains = list(main_product()) + [case for case in main_product() if case.kind == "dense"] * 11
    random.Random(0).shuffle(mains)  # or words would meet in step
    dealt = [dict(zip(_DEALT, words, strict=True)) for words in product(*(TABLES[name] for name in _DEALT))]
    random.Random(2).shuffle(dealt)  # a hand that is often refused must not always be followed by the same one
    hands = cycle(dealt)
    cases: dict[Case, None] = {}
    for index, main in enumerate(mains):
        plain = {field.name: getattr(main, field.name) for field in fields(Case)}
        while True:
            case = Case(**{**plain, **next(hands), "adaptive": index % 2 == 1 and main.kind in STORED_BASES})
            if is_meaningful(case):
                break
        cases[case] = None
    return tuple(cases)


def pairs_of(case: Case) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    """All pairs of words of a case."""
    words = [(name, getattr(case, name)) for name in TABLES]
    return {(one, other) for index, one in enumerate(words) for other in words[index + 1 :]}
