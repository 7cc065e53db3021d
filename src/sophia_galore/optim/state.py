"""The state of one parameter: named tensors, read and written in float32 whatever they are stored in."""

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

_EVERYTHING = slice(None)


class ParamState:
    """State tensors of one parameter, zero at first.

    Args:
        spec: The parameter.
        device: Where they live; what only the host reads stays there.
    """

    def __init__(self, spec: ParamSpec, device: torch.device) -> None:
        self._spec = spec
        self._slots = RULES[spec.rule].slots
        self.tensors: dict[str, Tensor] = {
            name: torch.zeros(shape, dtype=dtype, device="cpu" if dtype == torch.int64 else device)
            for name, (shape, dtype) in spec.state_tensors().items()
        }
        if "shrink" in self.tensors:
            self.tensors["shrink"].fill_(1)

    def read(self, slot: str, rows: slice = _EVERYTHING) -> Tensor:
        """Rows of a slot in float32; in an fp32 format the stored tensor itself.

        Args:
            slot: Its name.
            rows: Which rows; from `row_blocks`.
        """
        if slot in self.tensors:
            return self.tensors[slot][rows].float()
        codes = self.tensors[f"{slot}.codes"]
        scales = self.tensors[f"{slot}.scales"][_blocks(codes, rows)]
        return decode(codes[rows], scales, signed=self._slots[slot].moment == 1)

    def write(self, slot: str, values: Tensor, noise: Noise, rows: slice = _EVERYTHING) -> None:
        """Store rows of a slot, rounded without bias where the format is narrower than float32.

        Args:
            slot: Its name.
            values: float32.
            noise: For the rounding of the whole slot; each slot takes its own part of it.
            rows: Which rows; from `row_blocks`.
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
        """The tensor whose rows are a slot's, as they are stored: codes, where these need scales to be read."""
        return self.tensors[slot if slot in self.tensors else f"{slot}.codes"]

    def is_empty(self, slot: str) -> bool:
        """Whether nothing but zeros was ever stored in a slot."""
        return not any(tensor.any() for name, tensor in self.tensors.items() if name in (slot, f"{slot}.codes"))

    def read_all(self, rows: slice = _EVERYTHING) -> dict[str, Tensor]:
        """The same rows of every slot of the rule."""
        return {slot: self.read(slot, rows) for slot in self._slots}

    def write_all(self, new: dict[str, Tensor], noise: Noise, rows: slice = _EVERYTHING) -> None:
        """Store the same rows of several slots."""
        for slot, values in new.items():
            self.write(slot, values, noise, rows)

    def basis(self) -> Tensor:
        """The stored basis, (min(m, n), r) float32.

        Raises:
            KeyError: The basis is a function of the seed, so none is stored.
        """
        if "basis.packed" in self.tensors:
            assert self._spec.subspace is not None  # what has a basis has a subspace
            shape = basis_shape((self._spec.shape[0], self._spec.shape[1]), self._spec.subspace.rank)
            return unpack(self.tensors["basis.packed"], self.tensors["basis.scales"], shape)
        return self.tensors["basis"].float()

    def store_basis(self, basis: Tensor) -> None:
        """Store a basis, rounded to nearest into its format."""
        assert self._spec.subspace is not None and self._spec.subspace.kind in STORED_BASES  # others need no store
        if "basis.packed" in self.tensors:
            packed, scales = pack(basis)
            self.tensors["basis.packed"].copy_(packed)
            self.tensors["basis.scales"].copy_(scales)
        else:
            self.tensors["basis"].copy_(basis)


def _blocks(codes: Tensor, rows: slice) -> slice:
    """The scales that belong to some rows of codes."""
    if rows == _EVERYTHING:
        return _EVERYTHING
    columns = codes[0].numel()
    return slice(rows.start * columns // BLOCK, -(-rows.stop * columns // BLOCK))
