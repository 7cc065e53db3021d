"""How the tensors of a folder become the weights of a model, and back.

Hubs keep some models otherwise than the model has them: each matrix of an expert apart, or all experts in one tensor,
or under other names. A conversion says what some tensors of a folder are in the model. Each is small: the most that is
in memory at once is what one of them takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from sophia_galore.errors import ModelError
from sophia_galore.weights.plain import PlainWeight
from sophia_galore.weights.saved import SavedWeight
from sophia_galore.weights.tensor_stream import Block, Group, blocks_of
from sophia_galore.weights.weight import Weight

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Convert = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Makes named tensors from named tensors."""
Values = Callable[[str], Iterator[Block]]
"""Yields a weight of the model by rows, converted to the precision of the file and checked."""


class Conversion(Protocol):
    """What some tensors of a folder are in a model."""

    @property
    def keys(self) -> Sequence[str]:
        """Names of the tensors in the folder."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the weights in the model."""

    def read(self, found: Mapping[str, SavedWeight], latest: Latest) -> Iterator[SavedWeight]:
        """Yield the model's weights, given those of the folder."""

    def groups(self, shapes: Shapes, dtype_of: Callable[[str], torch.dtype]) -> list[Group]:
        """Return dtypes and shapes of the folder's tensors, given those of the model."""

    def blocks(self, values: Values, shapes: Shapes) -> Iterator[Block]:
        """Yield the folder's tensors by rows, in the order of `groups`."""


class Latest:
    """What was computed last, so that several weights that come from it don't compute it again."""

    def __init__(self) -> None:
        self._of: object = None
        self._made: Mapping[str, Tensor] = {}

    def of(self, owner: object, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Return what `make` returns, made once for an owner as long as no other one asks."""
        if self._of is not owner:
            self._made = {}
            self._made, self._of = make(), owner
        return self._made


@dataclass(frozen=True)
class Renamed:
    """A tensor that is a weight of the model as it is.

    Args:
        key: Its name in the folder.
        name: Its name in the model.
    """

    key: str
    name: str

    @property
    def keys(self) -> Sequence[str]:
        """See `Conversion`."""
        return (self.key,)

    @property
    def names(self) -> Sequence[str]:
        """See `Conversion`."""
        return (self.name,)

    def read(self, found: Mapping[str, SavedWeight], latest: Latest) -> Iterator[SavedWeight]:
        """See `Conversion`."""
        yield replace(found[self.key], name=self.name)

    def groups(self, shapes: Shapes, dtype_of: Callable[[str], torch.dtype]) -> list[Group]:
        """See `Conversion`."""
        return [{self.key: (dtype_of(self.name), shapes[self.name])}]

    def blocks(self, values: Values, shapes: Shapes) -> Iterator[Block]:
        """See `Conversion`."""
        return (Block(self.key, rows, first) for _, rows, first in values(self.name))


@dataclass(frozen=True)
class Stacked:
    """A tensor whose slices are weights of the model: one of each expert.

    Args:
        key: Its name in the folder.
        names: Names of the weights in the model, in the order of the slices.
    """

    key: str
    names: tuple[str, ...]

    @property
    def keys(self) -> Sequence[str]:
        """See `Conversion`."""
        return (self.key,)

    def read(self, found: Mapping[str, SavedWeight], latest: Latest) -> Iterator[SavedWeight]:
        """See `Conversion`."""
        saved = _plain(found[self.key])
        if len(saved.kind.shape) < 2 or saved.kind.shape[0] != len(self.names):
            raise ModelError(
                f"{saved.path}: {self.key} has shape {tuple(saved.kind.shape)}, and not one slice for each of the "
                f"{len(self.names)} experts that config.json says.",
                "config.json and the weights must belong to the same model.",
            )
        for number, name in enumerate(self.names):
            yield SavedWeight(saved.path, name, _slice(saved.kind, number), _Slice(saved, number))

    def groups(self, shapes: Shapes, dtype_of: Callable[[str], torch.dtype]) -> list[Group]:
        """See `Conversion`."""
        first = self.names[0]
        return [{self.key: (dtype_of(first), (len(self.names), *shapes[first]))}]

    def blocks(self, values: Values, shapes: Shapes) -> Iterator[Block]:
        """See `Conversion`."""
        for number, name in enumerate(self.names):
            yield Block(self.key, _gathered(values(name), shapes[name])[None], number)


@dataclass(frozen=True, eq=False)
class Computed:
    """Tensors from which weights of the model are computed.

    Args:
        sources: Shapes of the tensors in the folder, by name.
        targets: Shapes of the weights in the model, by name.
        forward: Makes the weights from the tensors.
        back: Makes the tensors from the weights.
    """

    sources: Shapes
    targets: Shapes
    forward: Convert
    back: Convert

    @property
    def keys(self) -> Sequence[str]:
        """See `Conversion`."""
        return tuple(self.sources)

    @property
    def names(self) -> Sequence[str]:
        """See `Conversion`."""
        return tuple(self.targets)

    def read(self, found: Mapping[str, SavedWeight], latest: Latest) -> Iterator[SavedWeight]:
        """See `Conversion`."""
        parts = [_plain(found[key]) for key in self.sources]
        dtype = parts[0].kind.dtype

        def made() -> Mapping[str, Tensor]:
            return self.forward({part.name: part.opened().first for part in parts})

        for name, shape in self.targets.items():
            kind = PlainWeight(torch.empty(shape, dtype=dtype, device="meta"))
            yield SavedWeight(parts[0].path, name, kind, _Made(self, name, made, latest))

    def groups(self, shapes: Shapes, dtype_of: Callable[[str], torch.dtype]) -> list[Group]:
        """See `Conversion`."""
        dtype = dtype_of(next(iter(self.targets)))
        return [{key: (dtype, shape)} for key, shape in self.sources.items()]

    def blocks(self, values: Values, shapes: Shapes) -> Iterator[Block]:
        """See `Conversion`."""
        made = dict(self.back({name: _gathered(values(name), shape) for name, shape in self.targets.items()}))
        for key in self.sources:
            yield from blocks_of(key, made.pop(key))


@dataclass(frozen=True)
class Layout:
    """The tensors of a folder, as a model sees them.

    Args:
        conversions: What becomes weights of the model.
        carried: Names of tensors that are no weights of the model: they go into what is written as they are.
        buffers: Those of them that are buffers of the model, with their names there.
        ignored: Names of tensors that follow from others, such as a second copy of a tied embedding.
    """

    conversions: tuple[Conversion, ...]
    carried: tuple[str, ...] = ()
    buffers: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()

    @property
    def keys(self) -> list[str]:
        """Names of the tensors that become weights of the model."""
        return [key for one in self.conversions for key in one.keys]

    @property
    def is_own(self) -> bool:
        """Whether the folder has nothing but tensors of the model under its names."""
        has_own_weights = all(isinstance(one, Renamed) and one.key == one.name for one in self.conversions)
        return has_own_weights and all(self.buffers.get(key) == key for key in self.carried)

    @property
    def untrained(self) -> tuple[str, ...]:
        """Names of what is carried and no part of the model."""
        return tuple(key for key in self.carried if key not in self.buffers)

    def read(self, found: Iterable[SavedWeight]) -> Iterator[SavedWeight]:
        """Yield the weights of the model, and what is unknown under the name that it has.

        Args:
            found: The weights of the folder.
        """
        saved = {one.name: one for one in found}
        latest, passed = Latest(), {*self.carried, *self.ignored}
        for conversion in self.conversions:
            if all(key in saved for key in conversion.keys):  # else its weights are reported as missing
                yield from conversion.read(saved, latest)
            passed.update(conversion.keys)
        yield from (one for name, one in saved.items() if name not in passed)


@dataclass(frozen=True)
class _Slice:
    """Returns a slice of a weight in a file."""

    saved: SavedWeight
    number: int

    def __call__(self) -> Weight:
        return _slice(self.saved.opened(), self.number)


@dataclass(frozen=True)
class _Made:
    """Returns a weight that is computed."""

    owner: object
    name: str
    make: Callable[[], Mapping[str, Tensor]]
    latest: Latest

    def __call__(self) -> Weight:
        return PlainWeight(self.latest.of(self.owner, self.make)[self.name])


def _slice(weight: Weight, number: int) -> Weight:
    return PlainWeight(weight.first[number])


def _plain(saved: SavedWeight) -> SavedWeight:
    if saved.kind.is_packed:
        raise ModelError(
            f"{saved.path}: {saved.name} is in eight bits, under a name that only plain weights have.",
            "Take another copy of the model.",
        )
    return saved


def _gathered(blocks: Iterator[Block], shape: Shape) -> Tensor:
    """Return a weight as one tensor."""
    whole: Tensor | None = None
    for _, rows, first in blocks:
        if whole is None:
            whole = torch.empty(shape, dtype=rows.dtype)
        if shape:
            whole[first : first + len(rows)].copy_(rows)
        else:
            whole.copy_(rows)
    return torch.empty(shape) if whole is None else whole
