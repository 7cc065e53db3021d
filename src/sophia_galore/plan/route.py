"""`Route`: what happens to one parameter."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from sophia_galore.numerics.subspace import Side
from sophia_galore.optim.spec import ParamSpec, state_bytes

Format = Literal["fp32", "bf16", "int8", "bnb8"]
"""How a weight is stored: as a tensor, in native eight bits, or in those of bitsandbytes, which are frozen."""

FROZEN = "frozen"
"""What stands where a rule's name would, if nothing steps a parameter."""


@dataclass(frozen=True)
class Route:
    """What happens to one parameter.

    Args:
        name: The parameter's name.
        shape: Its shape.
        spec: How it is stepped; None: it is frozen, has no state, and no rule.
        format: Format in which its weight is stored.
        weight_bytes: Bytes of the stored weight.
        rule: What steps it, in words: the optimizer's name if the gradient is projected, else the rule's.
        reason: Why, in words.
        remarks: What else there is to say about it, in words.
        because: Names of the rows of `parameters.py` that say so.
    """

    name: str
    shape: tuple[int, ...]
    spec: ParamSpec | None
    format: Format
    weight_bytes: int
    rule: str
    reason: str
    remarks: tuple[str, ...] = ()
    because: tuple[str, ...] = ()

    @property
    def why(self) -> str:
        """Reason and remarks."""
        return "; ".join((self.reason, *self.remarks))

    @property
    def trained(self) -> bool:
        """Whether its values change."""
        return self.spec is not None

    @property
    def side(self) -> Side | None:
        """The side on which the gradient is projected, if it is."""
        return self.spec.side if self.spec and self.spec.subspace else None

    @property
    def num_elements(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)

    @property
    def projection_bytes(self) -> int:
        """Bytes of its basis."""
        tensors = self.spec.state_tensors() if self.spec else {}
        return state_bytes({name: tensor for name, tensor in tensors.items() if name.startswith("basis")})

    @property
    def state_bytes(self) -> int:
        """Bytes of its optimizer state, the basis not included."""
        return state_bytes(self.spec.state_tensors()) - self.projection_bytes if self.spec else 0

    def to_json(self) -> dict[str, Any]:
        """The route as plain data, for `plan.json`: everything that decides about numbers, and the bytes.

        A frozen parameter has the same keys; those that only a rule fills are null.
        """
        spec = self.spec
        return {
            "name": self.name,
            "shape": list(self.shape),
            "format": self.format,
            "weight_bytes": self.weight_bytes,
            "rule": self.rule,
            "direction": spec.rule if spec else None,
            "side": self.side,
            "hyper": vars(spec.hyper) if spec else None,
            "rank": spec.subspace.rank if spec and spec.subspace else None,
            "subspace": vars(spec.subspace) if spec and spec.subspace else None,
            "learning_rate": spec.learning_rate if spec else None,
            "weight_decay": spec.weight_decay if spec else None,
            "state_bits": spec.state_bits if spec else None,
            "state_bytes": self.state_bytes,
            "projection_bytes": self.projection_bytes,
            "trained": self.trained,
            "why": self.why,
            "because": list(self.because),
        }


def frozen_names(routes: Iterable[Route]) -> frozenset[str]:
    """Names of the parameters that are not trained."""
    return frozenset(route.name for route in routes if not route.trained)
