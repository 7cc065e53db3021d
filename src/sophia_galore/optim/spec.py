"""What the optimizer is told about one parameter, as data."""

from __future__ import annotations

from dataclasses import dataclass

from sophia_galore.numerics.rules import ADAMW_STATE, AdamWHyper
from sophia_galore.numerics.subspace import basis_shape, projected_shape


@dataclass(frozen=True)
class SubspaceSpec:
    """How a gradient is projected.

    Args:
        rank: Columns of the basis.
        gap: Steps between two refreshes of the basis.
        offset: Steps by which this parameter's refreshes come early, so that they are spread over the gap.
        scale: Factor on the update that comes back from the subspace (alpha in GaLore, algorithm 1).
    """

    rank: int
    gap: int
    offset: int
    scale: float

    def refreshes_at(self, step: int) -> bool:
        """Whether the basis is made anew at this step (counted from 1); at the first step it always is."""
        return step == 1 or (step - 1 + self.offset) % self.gap == 0


@dataclass(frozen=True)
class ParamSpec:
    """How one parameter is stepped.

    Args:
        name: The parameter's name; a key, never looked into.
        shape: Its shape.
        learning_rate: Peak rate; the schedule multiplies it.
        weight_decay: Decoupled decay; 0: none.
        hyper: Hyper-parameters of the rule.
        subspace: How the gradient is projected; None: the rule sees the full gradient.
    """

    name: str
    shape: tuple[int, ...]
    learning_rate: float
    weight_decay: float
    hyper: AdamWHyper
    subspace: SubspaceSpec | None = None

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameter's state tensors, all float32."""
        if self.subspace is None:
            return dict.fromkeys(ADAMW_STATE, self.shape)
        matrix = (self.shape[0], self.shape[1])
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(ADAMW_STATE, projected_shape(matrix, self.subspace.rank))
        shapes["basis"] = basis_shape(matrix, self.subspace.rank)
        return shapes
