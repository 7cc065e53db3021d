"""The state of one parameter: named tensors, read and written in float32 whatever their stored format."""

from __future__ import annotations

import torch
from torch import Tensor

from sophia_galore.numerics.blockwise import BLOCK, decode, encode
from sophia_galore.numerics.int4 import pack, unpack
from sophia_galore.numerics.noise import Noise
from sophia_galore.numerics.rounding import write_rounded
from sophia_galore.numerics.rules import RULES
from sophia_galore.numerics.subspace import basis_shape
from sophia_galore.optim.recipes import STORED_BASES
from sophia_galore.optim.spec import ParamSpec

COUNTER = torch.int64
"""Dtype of state tensors that only the processor reads; they are always in its memory."""

_EVERYTHING = slice(None)


class ParamState:
    """The state tensors of one parameter, initially zero.

    Args:
        spec: The parameter.
        device: Their device; int64 tensors, which only the CPU reads, are on the CPU.
        tensors: Existing state tensors to use instead of new ones, by name.

    Attributes:
        tensors: The stored tensors, by name.
    """

    def __init__(self, spec: ParamSpec, device: torch.device, tensors: dict[str, Tensor] | None = None) -> None:
        self._spec = spec
        self._slots = RULES[spec.rule].slots
        if tensors is not None:
            self.tensors = tensors
            return
        self.tensors = {
            name: torch.zeros(shape, dtype=dtype, device="cpu" if dtype == COUNTER else device)
            for name, (shape, dtype) in spec.state_tensors().items()
        }
        self.begin()

    @property
    def begins_above_zero(self) -> bool:
        """Whether not all of its tensors are zero before the first step."""
        return "shrink" in self.tensors

    def begin(self) -> None:
        """Set what is not zero before the first step."""
        if self.begins_above_zero:
            self.tensors["shrink"].fill_(1)

    def read(self, slot: str, rows: slice = _EVERYTHING) -> Tensor:
        """Return rows of a slot in float32; if it is stored in float32, a view of the stored tensor.

        Args:
            slot: Name of the slot.
            rows: The rows, from `row_blocks`.
        """
        if slot in self.tensors:
            return self.tensors[slot][rows].float()
        codes = self.tensors[f"{slot}.codes"]
        scales = self.tensors[f"{slot}.scales"][_blocks(codes, rows)]
        return decode(codes[rows], scales, signed=self._slots[slot].moment == 1)

    def write(self, slot: str, values: Tensor, noise: Noise, rows: slice = _EVERYTHING) -> None:
        """Store rows of a slot, with stochastic rounding if its format is narrower than float32.

        Args:
            slot: Name of the slot.
            values: float32.
            noise: Noise for rounding; each slot uses a separate part of it.
            rows: The rows, from `row_blocks`.
        """
        of_rows = noise.part(slot).rows(rows, values[0].numel())
        if slot in self.tensors:
            write_rounded(self.tensors[slot][rows], values, of_rows)
            return
        stored = self.tensors[f"{slot}.codes"]
        codes, scales = encode(values, signed=self._slots[slot].moment == 1, noise=of_rows)
        stored[rows] = codes
        self.tensors[f"{slot}.scales"][_blocks(stored, rows)] = scales

    def stored(self, slot: str) -> Tensor:
        """Return the stored tensor that has the slot's rows: its values, or its 8-bit codes."""
        return self.tensors[slot if slot in self.tensors else f"{slot}.codes"]

    def is_empty(self, slot: str) -> bool:
        """Return whether a slot holds only zeros."""
        return not any(tensor.any() for name, tensor in self.tensors.items() if name in (slot, f"{slot}.codes"))

    def read_all(self, rows: slice = _EVERYTHING) -> dict[str, Tensor]:
        """Return the same rows of every slot of the rule, by name, in float32."""
        return {slot: self.read(slot, rows) for slot in self._slots}

    def write_all(self, new: dict[str, Tensor], noise: Noise, rows: slice = _EVERYTHING) -> None:
        """Store the same rows of several slots."""
        for slot, values in new.items():
            self.write(slot, values, noise, rows)

    def basis(self) -> Tensor:
        """Return the stored basis, (min(m, n), r) float32.

        Raises:
            KeyError: No basis is stored, because it is a function of the seed.
        """
        if "basis.packed" in self.tensors:
            assert self._spec.subspace is not None  # what has a basis has a subspace
            shape = basis_shape((self._spec.shape[0], self._spec.shape[1]), self._spec.subspace.rank)
            return unpack(self.tensors["basis.packed"], self.tensors["basis.scales"], shape)
        return self.tensors["basis"].float()

    def store_basis(self, basis: Tensor) -> None:
        """Store a basis, rounded to nearest into its format."""
        assert self._spec.subspace is not None and self._spec.subspace.kind in STORED_BASES  # others are not stored
        if "basis.packed" in self.tensors:
            packed, scales = pack(basis)
            self.tensors["basis.packed"].copy_(packed)
            self.tensors["basis.scales"].copy_(scales)
        else:
            self.tensors["basis"].copy_(basis)


def _blocks(codes: Tensor, rows: slice) -> slice:
    """Return the slice of scales that belong to some rows of codes."""
    if rows == _EVERYTHING:
        return _EVERYTHING
    columns = codes[0].numel()
    return slice(rows.start * columns // BLOCK, -(-rows.stop * columns // BLOCK))
