"""`Route`: what happens to one parameter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from sophia_galore.numerics.subspace import Side
from sophia_galore.optim.spec import ParamSpec, state_bytes

Format = Literal["fp32", "bf16", "int8", "bnb8"]
"""How a weight is stored: as a tensor, in our int8, or in the int8 of bitsandbytes, which is frozen."""

FROZEN = "frozen"
"""The rule's name of a parameter that is not trained."""


@dataclass(frozen=True)
class Route:
    """What happens to one parameter.

    Args:
        name: The parameter's name.
        shape: Its shape.
        spec: How the optimizer updates it; None if it is frozen.
        format: Format in which its weight is stored.
        weight_bytes: Bytes of the stored weight.
        rule: Name of the optimizer if the gradient is projected, else of the rule.
        reason: Why, as text.
        remarks: Further remarks, as text.
        because: Keys of the rows of `parameters.py` that apply.
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
        """Reason and remarks, joined."""
        return "; ".join((self.reason, *self.remarks))

    @property
    def trained(self) -> bool:
        """Whether its values change."""
        return self.spec is not None

    @property
    def side(self) -> Side | None:
        """The side on which the gradient is projected; None if it is not."""
        return self.spec.side if self.spec and self.spec.subspace else None

    @property
    def num_elements(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)

    # Models of experts have tens of thousands of routes, whose bytes are asked for at each try of a search.
    @cached_property
    def projection_bytes(self) -> int:
        """Bytes of its basis."""
        tensors = self.spec.state_tensors() if self.spec else {}
        return state_bytes({name: tensor for name, tensor in tensors.items() if name.startswith("basis")})

    @cached_property
    def state_bytes(self) -> int:
        """Bytes of its optimizer state, the basis not included."""
        return state_bytes(self.spec.state_tensors()) - self.projection_bytes if self.spec else 0

    def to_json(self) -> dict[str, Any]:
        """Return the route as plain data, for `plan.json`: everything that affects results, and the bytes.

        A frozen parameter has the same keys; those of its optimizer are null.
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
    """Return the names of the parameters that are not trained."""
    return frozenset(route.name for route in routes if not route.trained)


def by_layer(routes: Sequence[Route], names: Sequence[str]) -> tuple[dict[str, list[Route]], list[Route]]:
    """Routes of each layer, and of what is in no layer.

    Args:
        routes: The model's routes.
        names: Its layers, as prefixes of their parameters' names without the final dot.
    """
    of_layer: dict[str, list[Route]] = {name: [] for name in names}
    around: list[Route] = []
    for route in routes:
        layer = next((name for name in names if route.name.startswith(f"{name}.")), None)
        (around if layer is None else of_layer[layer]).append(route)
    return of_layer, around
