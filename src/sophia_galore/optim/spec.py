"""`ParamSpec`: how the optimizer updates one parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sophia_galore.numerics import int4
from sophia_galore.numerics.bases import BasisKind
from sophia_galore.numerics.blockwise import num_blocks
from sophia_galore.numerics.hyper import Hyper
from sophia_galore.numerics.residual import Residual
from sophia_galore.numerics.rules import RULES, Slot
from sophia_galore.numerics.subspace import Side, basis_shape, projected_shape, projection_side
from sophia_galore.optim.recipes import STORED_BASES, ProjectionBits, StateBits


@dataclass(frozen=True)
class SubspaceSpec:
    """How a gradient is projected.

    Args:
        rank: Columns of the basis.
        gap: Steps between two refreshes of the basis.
        offset: Number of steps by which this parameter's refreshes are earlier, to spread them over the gap.
        scale: Factor on the update from the subspace (alpha in GaLore, algorithm 1).
        kind: How the basis is computed.
        adaptive: Whether the gap doubles while the subspace hardly changes.
        transport: Whether moments are transformed to the new basis at a refresh.
        projection_bits: Bits in which the basis is stored.
        residual: How the part of the gradient outside of the subspace is used.
        growth_limit: Largest ratio of the residual's norm (for APOLLO: the update's) to that of the previous step; 0:
            no limit.
        fast: Whether to request products instead of full gradients when they are enough.
        folds_late: Whether updates are summed in the subspace and added to the weight only when the basis is refreshed.
            For 8-bit weights with a stored basis and without a residual.
    """

    rank: int
    gap: int
    offset: int = 0
    scale: float = 1.0
    kind: BasisKind = "svd"
    adaptive: bool = False
    transport: bool = False
    projection_bits: ProjectionBits = 32
    residual: Residual = "none"
    growth_limit: float = 1.01
    fast: bool = False
    folds_late: bool = False

    def refreshes_at(self, step: int) -> bool:
        """Return whether the basis is recomputed at this step (counted from 1), if the gap is not adaptive.

        It always is at the first step. A tracked basis, which is cheap and begins at random, is also refreshed once in
        each octave of steps (2-3, 4-7, 8-15, ...) below the gap; `offset` determines the step within the octave.
        """
        return self.refreshes_early_at(step) or (step - 1 + self.offset) % self.gap == 0

    def refreshes_early_at(self, step: int) -> bool:
        """Return whether this step has one of the additional refreshes before the end of the first gap."""
        if step == 1:
            return True
        octave = 1 << (step.bit_length() - 1)
        return self.kind == "tracked" and step < self.gap and step == octave + self.offset * octave // self.gap

    def period(self, step: int) -> int:
        """Return the number of the gap that contains a step, for bases that are a function of the seed."""
        return (step - 1 + self.offset) // self.gap


@dataclass(frozen=True)
class ParamSpec:
    """How one parameter is updated.

    Args:
        name: The parameter's name, used only as a key.
        shape: Its shape.
        learning_rate: Peak learning rate; the schedule multiplies it.
        weight_decay: Decoupled weight decay; 0: none.
        hyper: Hyper-parameters of the rule.
        rule: Name of the rule, in `RULES`.
        state_bits: Bits in which the rule's state is stored.
        subspace: How the gradient is projected; None: the rule gets the full gradient.
        rests: Whether it may have no gradient at a step, as an expert without tokens. Then it takes no step, and counts
            its own.
    """

    name: str
    shape: tuple[int, ...]
    learning_rate: float
    weight_decay: float
    hyper: Hyper
    rule: str = "adamw"
    state_bits: StateBits = 32
    subspace: SubspaceSpec | None = None
    rests: bool = False

    @property
    def side(self) -> Side:
        """The side on which this matrix is projected."""
        return projection_side((self.shape[0], self.shape[1]))

    @property
    def held_shape(self) -> tuple[int, ...]:
        """Shape of the part of the gradient that a step keeps, if the residual is not used."""
        if self.subspace is None:
            return self.shape
        return projected_shape((self.shape[0], self.shape[1]), self.subspace.rank)

    def slot_shape(self, slot: Slot) -> tuple[int, ...]:
        """Return the shape of the values in a slot of the rule."""
        shape = self.held_shape
        if slot.extent == "full":
            return shape
        return (shape[0], 1) if slot.extent == "rows" else (1, shape[1])

    def state_tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of each state tensor as it is stored, by name.

        An 8-bit slot is two tensors, `NAME.codes` and `NAME.scales`; a 4-bit basis, `basis.packed` and `basis.scales`.
        """
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, slot in RULES[self.rule].slots.items():
            shape = self.slot_shape(slot)
            # The factors of a factored moment are small already.
            if self.state_bits == 8 and slot.extent == "full":
                tensors[f"{name}.codes"] = (shape, torch.uint8)
                tensors[f"{name}.scales"] = ((num_blocks(math.prod(shape)),), torch.float32)
            else:
                half = self.state_bits == 16 and slot.extent == "full"
                tensors[name] = (shape, torch.bfloat16 if half else torch.float32)
        if self.subspace is not None:
            tensors |= self._subspace_tensors(self.subspace)
        if self.rests:
            tensors["num_steps"] = ((1,), torch.int64)
        return tensors

    def _subspace_tensors(self, subspace: SubspaceSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        shape = basis_shape((self.shape[0], self.shape[1]), subspace.rank)
        if subspace.kind in STORED_BASES:
            if subspace.projection_bits == 4:
                tensors["basis.packed"] = ((-(-math.prod(shape) // 2),), torch.uint8)
                tensors["basis.scales"] = ((-(-math.prod(shape) // int4.BLOCK),), torch.bfloat16)
            else:
                tensors["basis"] = (shape, torch.bfloat16 if subspace.projection_bits == 16 else torch.float32)
        if subspace.residual != "none" and subspace.growth_limit:
            tensors["update_norm"] = ((1,), torch.float32)
        if subspace.folds_late:
            tensors["remainder"] = (self.held_shape, torch.bfloat16)
            tensors["shrink"] = ((1,), torch.float32)
        if subspace.adaptive:
            tensors["next_refresh"] = ((2,), torch.int64)  # the step, and the gap that led to it
        return tensors


def state_bytes(tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Return the total size in bytes of the tensors from `ParamSpec.state_tensors`."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
