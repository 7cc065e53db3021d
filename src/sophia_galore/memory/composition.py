"""The memory of a step of the whole model, composed from the simulation of a few layers.

A segment of a step is one phase of one layer. Two differences describe it: from its beginning to its peak, and to its
end. Layers of the same kind behave the same, so one layer of each kind gives the exact memory of any number of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sophia_galore.engine.observe import Phase
from sophia_galore.memory.timeline import Segment, Sizes

# Segments of a pass through a model: the embedding; forward of each layer; the head and its step; backward of each
# layer, the last one first, and its step; the embedding's gradient in two segments, and its step.
_EMBEDDING, _HEAD, _END = 1, 2, 3


@dataclass(frozen=True)
class Change:
    """The change of memory in a segment, relative to its beginning.

    Args:
        phase: Its phase.
        peak: Bytes by category at its peak, minus those at its beginning.
        exit: Bytes by category at its end, minus those at its beginning.
    """

    phase: Phase
    peak: Sizes
    exit: Sizes


@dataclass(frozen=True)
class PassTrace:
    """The changes of memory in one pass through a model.

    Args:
        changes: One for each segment, in the engine's order: embedding, forward, head, backward, end.
    """

    changes: tuple[Change, ...]

    @property
    def num_layers(self) -> int:
        """Number of simulated layers."""
        return (len(self.changes) - _EMBEDDING - _HEAD - _END) // 3

    def forward(self, index: int) -> Change:
        """Return the change in the forward of a layer."""
        return self.changes[_EMBEDDING + index]

    def backward(self, index: int) -> tuple[Change, ...]:
        """Return the changes in the backward of a layer and in its step."""
        start = _EMBEDDING + self.num_layers + _HEAD + 2 * (self.num_layers - 1 - index)
        return self.changes[start : start + 2]

    def compose(self, layout: Layout, keep_layers: int) -> list[Change]:
        """Return the changes of a pass through the whole model.

        Args:
            layout: Which simulated layer represents which layer.
            keep_layers: Number of last layers that run without activation checkpointing.
        """
        if layout.is_whole:
            return list(self.changes)
        representatives = layout.representatives(keep_layers)
        first_kept = max(layout.num_idle, len(representatives) - keep_layers)
        back: list[Change] = []
        for index in reversed(range(len(representatives))):
            passed, stepped = self.backward(representatives[index])
            # A checkpointed layer's output is freed in the backward of the next layer. Without checkpointing the graph
            # keeps the output, as in the simulation of this layer's representative.
            if index == first_kept > 0 and keep_layers:
                passed = replace(passed, exit=subtract(passed.exit, self.forward(0).exit))
            back += [passed, stepped]
        head = _EMBEDDING + self.num_layers
        forward = [self.forward(index) for index in representatives]
        changes = [self.changes[0], *forward, *self.changes[head : head + _HEAD], *back, *self.changes[-_END:]]
        # The last segment frees what layers kept, so a pass ends with the same memory for any number of layers.
        left = add(*(change.exit for change in self.changes))
        before_last = add(*(change.exit for change in changes[:-1]))
        return [*changes[:-1], replace(changes[-1], exit=subtract(left, before_last))]


@dataclass(frozen=True)
class Layout:
    """Which layers are simulated, and which of them represents which layer of the model.

    Args:
        chosen: For each kind of layer, the index of its representative.
        kind_of: For each layer of the model, its kind.
        num_idle: Number of first layers without a backward. They share no kind with the others.
        is_whole: Whether all layers are simulated as they follow one another, because they depend on one another. Then
            a simulation shows one number of layers without activation checkpointing.
    """

    chosen: tuple[int, ...]
    kind_of: tuple[int, ...]
    num_idle: int = 0
    is_whole: bool = False

    def simulated_layers(self, *, with_kept: bool) -> tuple[int, ...]:
        """Return the indices of the layers to simulate: the first, one of each kind and, with `with_kept`, these again.

        Args:
            with_kept: Simulate layers without activation checkpointing too, each after another such layer.
        """
        active = self._active
        if self.is_whole:
            return self.chosen
        return (0, *self.chosen, active[-1], *active) if with_kept and active else (0, *self.chosen)

    def num_kept(self, keep_layers: int) -> int:
        """Return how many of the last simulated layers run without activation checkpointing.

        Args:
            keep_layers: How many of the model's do.
        """
        if self.is_whole or not keep_layers:
            return min(keep_layers, len(self._active))
        return 1 + len(self._active) if self._active else 0

    @property
    def _active(self) -> tuple[int, ...]:
        """The representatives that have a backward."""
        return tuple(index for index in self.chosen if index >= self.num_idle)

    def representatives(self, keep_layers: int) -> list[int]:
        """Return, for each layer of the model, the position of its representative among the simulated layers.

        Args:
            keep_layers: Number of last layers that run without activation checkpointing.
        """
        first_kept = max(self.num_idle, len(self.kind_of) - keep_layers)
        first = [0] if first_kept else []
        checkpointed = [1 + kind for kind in self.kind_of[len(first) : first_kept]]
        # The kinds of idle layers come first, and are not simulated a second time.
        before = 2 + len(self._active)
        return [*first, *checkpointed, *(before + kind for kind in self.kind_of[first_kept:])]


def choose_layers(kinds: Sequence[Hashable], num_idle: int = 0) -> Layout:
    """Choose one layer of each kind to simulate, the last one.

    Args:
        kinds: The kind of each layer of the model.
        num_idle: Number of first layers without a backward.
    """
    last = {kind: index for index, kind in enumerate(kinds)}
    order = list(last)
    return Layout(tuple(last.values()), tuple(order.index(kind) for kind in kinds), num_idle)


def all_layers(num_layers: int, num_idle: int = 0) -> Layout:
    """Simulate all layers.

    Args:
        num_layers: Layers of the model.
        num_idle: Number of first layers without a backward.
    """
    return Layout(tuple(range(num_layers)), tuple(range(num_layers)), num_idle, is_whole=True)


def split_passes(segments: Sequence[Segment], num_layers: int) -> tuple[PassTrace, ...]:
    """Split a step into its passes through the model.

    Args:
        segments: The segments of one step: one pass or, with a curvature estimate before it, two.
        num_layers: Number of simulated layers.
    """
    length = _EMBEDDING + _HEAD + _END + 3 * num_layers
    assert segments and len(segments) % length == 0, "the engine's phases are not in the expected order"
    changes = [
        Change(each.phase, subtract(each.peak, each.entry), subtract(each.exit, each.entry)) for each in segments
    ]
    return tuple(PassTrace(tuple(changes[start : start + length])) for start in range(0, len(changes), length))


def extrapolate(fewer: PassTrace, more: PassTrace, factor: float) -> PassTrace:
    """Return a pass over more micro-batches or experts than were simulated: memory is linear in their number.

    Args:
        fewer: A pass over some of them.
        more: A pass over more of them.
        factor: How far to go beyond `more`, in units of the difference of the two.
    """

    return PassTrace(
        tuple(
            Change(other.phase, beyond(one.peak, other.peak, factor), beyond(one.exit, other.exit, factor))
            for one, other in zip(fewer.changes, more.changes, strict=True)
        )
    )


def beyond(fewer: Sizes, more: Sizes, factor: float) -> Sizes:
    """Return sizes on the line through two others.

    Args:
        fewer: The first ones.
        more: The second ones.
        factor: How far to go beyond them, in units of the difference of the two.
    """
    return Counter({key: round(more[key] + factor * (more[key] - fewer[key])) for key in {*fewer, *more}})


def to_segments(standing: Mapping[str, int], changes: Iterable[Change]) -> list[Segment]:
    """Turn changes into segments with absolute sizes.

    Args:
        standing: Bytes by category before the first change.
        changes: The changes, in order.
    """
    level: Sizes = Counter(standing)
    segments: list[Segment] = []
    for change in changes:
        after = add(level, change.exit)
        segments.append(Segment(change.phase, level, add(level, change.peak), after))
        level = after
    return segments


def add(*sizes: Mapping[str, int]) -> Sizes:
    """Return the sum by category; unlike `+` of Counters, it keeps negative values."""
    total: Sizes = Counter()
    for each in sizes:
        total.update(each)
    return total


def subtract(one: Mapping[str, int], other: Mapping[str, int]) -> Sizes:
    """Return the difference by category."""
    difference: Sizes = Counter(one)
    difference.subtract(other)
    return difference
