"""Units: the tensors of a layer, or of the embedding or head, which move together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from sophia_galore.weights.safetensors_layout import FileLayout, Span

Placement = Literal["device", "host", "disk"]
"""Where tensors are between uses: on the compute device, in host memory, or in files."""

Part = Literal["weights", "state"]

# Tensors begin at multiples of this, as torch's own do on a GPU: kernels may choose by it how they compute.
_ALIGNMENT = 512


@dataclass(frozen=True)
class Key:
    """A tensor of a unit.

    Args:
        part: Whether it is a part of a weight or of an optimizer's state.
        name: Its name in files: the weight's with a suffix, or "parameter/state".
    """

    part: Part
    name: str


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor of a unit.

    Args:
        key: The tensor.
        first_row: The first row.
        num_rows: Number of rows; None: all of them.
    """

    key: Key
    first_row: int = 0
    num_rows: int | None = None


@dataclass(frozen=True)
class Unit:
    """The tensors of one layer, of the embedding or of the head.

    Args:
        name: Name of the layer, or of the weight.
        placement: host or disk.
        layouts: The two parts, as they are laid out in files; in host memory and in a buffer is room between tensors.
        early: Names of the state tensors without which the weights can't be read, because they hold an update that is
            not in the weights yet.
        by_rows: Whether the weights never visit as a whole: only blocks of their rows do.
    """

    name: str
    placement: Placement
    layouts: Mapping[Part, FileLayout]
    early: frozenset[str] = frozenset()
    by_rows: bool = False

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that it takes if that is its home."""
        return self._state_start(whole=True) + self._inside["state"].num_bytes

    @property
    def buffer_bytes(self) -> int:
        """Bytes of a buffer that it visits in."""
        return self._state_start(whole=not self.by_rows) + self._inside["state"].num_bytes

    def keys(self, *, trains: bool) -> list[Key]:
        """Return the tensors that visit together.

        Args:
            trains: Whether the weights are to be updated; if not, they are only read.
        """
        weights = [] if self.by_rows else [Key("weights", name) for name in self.layouts["weights"].spans]
        state = [Key("state", name) for name in self.layouts["state"].spans if trains or name in self.early]
        return weights + state

    def span(self, key: Key) -> Span:
        """Return a tensor's place in its part."""
        return self.layouts[key.part].spans[key.name]

    def place(self, key: Key) -> slice:
        """Return the bytes of a buffer that a tensor takes."""
        start = self._start(key, whole=not self.by_rows)
        return slice(start, start + self.span(key).num_bytes)

    def host_place(self, piece: Piece) -> slice:
        """Return the bytes of its host memory that a piece takes."""
        inside, start = self.rows_of(piece), self._start(piece.key, whole=True)
        return slice(start + inside.start, start + inside.stop)

    def rows_of(self, piece: Piece) -> slice:
        """Return the bytes of a piece, counted from the beginning of its tensor."""
        span = self.span(piece.key)
        if piece.num_rows is None:
            return slice(0, span.num_bytes)
        return slice(piece.first_row * span.row_bytes, (piece.first_row + piece.num_rows) * span.row_bytes)

    @cached_property
    def _inside(self) -> dict[Part, _Inside]:
        return {part: _Inside.of(layout) for part, layout in self.layouts.items()}

    def _start(self, key: Key, *, whole: bool) -> int:
        inside = self._inside[key.part].starts[key.name]
        return inside if key.part == "weights" else self._state_start(whole=whole) + inside

    def _state_start(self, *, whole: bool) -> int:
        """Return where the state begins; `whole`: behind the weights, which are there as a whole."""
        return _aligned(self._inside["weights"].num_bytes) if whole else 0


@dataclass(frozen=True)
class _Inside:
    """Where the tensors of a part begin in memory, and how many bytes it takes."""

    starts: Mapping[str, int]
    num_bytes: int

    @classmethod
    def of(cls, layout: FileLayout) -> _Inside:
        starts, stop = {}, 0
        for name, span in layout.spans.items():
            starts[name] = _aligned(stop)
            stop = starts[name] + span.num_bytes
        return cls(starts, stop)


def _aligned(place: int) -> int:
    return -(-place // _ALIGNMENT) * _ALIGNMENT
