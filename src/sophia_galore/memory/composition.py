"""Memory over one step of the whole model, composed from what single layers were seen to do.

A segment of a step is one phase of one layer. It is described by two differences: how far memory rises above where the
segment begins, and where it ends. Layers of a kind do the same, so a model with any number of layers is composed from
one layer of each kind, exactly.
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
    """What a segment does to memory, wherever it begins.

    Args:
        phase: Its phase.
        peak: Bytes by category at its peak, less those at its beginning.
        exit: Bytes by category at its end, less those at its beginning.
    """

    phase: Phase
    peak: Sizes
    exit: Sizes


@dataclass(frozen=True)
class PassTrace:
    """One pass through a model: what each segment does, in the engine's order.

    Args:
        changes: Embedding, forward, head, backward, end.
    """

    changes: tuple[Change, ...]

    @property
    def num_layers(self) -> int:
        """Layers of the model that was run."""
        return (len(self.changes) - _EMBEDDING - _HEAD - _END) // 3

    def forward(self, index: int) -> Change:
        """Forward of a layer."""
        return self.changes[_EMBEDDING + index]

    def backward(self, index: int) -> tuple[Change, ...]:
        """Backward of a layer, and its step."""
        start = _EMBEDDING + self.num_layers + _HEAD + 2 * (self.num_layers - 1 - index)
        return self.changes[start : start + 2]

    def compose(self, layout: Layout, keep_layers: int) -> list[Change]:
        """The changes of a pass through the whole model.

        Args:
            layout: Which layers stand for which.
            keep_layers: So many of the model's last layers run without activation checkpointing.
        """
        stand_ins = layout.stand_ins(keep_layers)
        first_kept = max(layout.num_idle, len(stand_ins) - keep_layers)
        back: list[Change] = []
        for index in reversed(range(len(stand_ins))):
            passed, stepped = self.backward(stand_ins[index])
            # A checkpointed layer's output dies in the backward of the layer after it. The output of a layer without
            # checkpointing lives on in its graph, and so it was where this layer's stand-in was seen.
            if index == first_kept > 0 and keep_layers:
                passed = replace(passed, exit=minus(passed.exit, self.forward(0).exit))
            back += [passed, stepped]
        head = _EMBEDDING + self.num_layers
        forward = [self.forward(index) for index in stand_ins]
        changes = [self.changes[0], *forward, *self.changes[head : head + _HEAD], *back, *self.changes[-_END:]]
        # The last segment frees what was kept of any layer, so that a pass leaves the same behind for any number.
        left = plus(*(change.exit for change in self.changes))
        before_last = plus(*(change.exit for change in changes[:-1]))
        return [*changes[:-1], replace(changes[-1], exit=minus(left, before_last))]


@dataclass(frozen=True)
class Layout:
    """Which layers are run, and which of them stands for which layer of the model.

    Args:
        chosen: For each kind of layer, the number of the one that stands for it.
        kind_of: For each layer of the model, its kind.
        num_idle: So many of the first layers have no backward. They share no kind with the others.
    """

    chosen: tuple[int, ...]
    kind_of: tuple[int, ...]
    num_idle: int = 0

    def run(self, *, with_kept: bool) -> tuple[int, ...]:
        """Numbers of the layers to be run: the first one, one of each kind and, if wanted, each of these once more.

        Args:
            with_kept: Whether to see layers without activation checkpointing too, each after another such layer.
        """
        active = self._active
        return (0, *self.chosen, active[-1], *active) if with_kept and active else (0, *self.chosen)

    @property
    def num_kept(self) -> int:
        """How many of the layers that are run, the last ones, are without activation checkpointing if any are."""
        return 1 + len(self._active) if self._active else 0

    @property
    def _active(self) -> tuple[int, ...]:
        """The chosen layers that have a backward."""
        return tuple(index for index in self.chosen if index >= self.num_idle)

    def stand_ins(self, keep_layers: int) -> list[int]:
        """For each layer of the model, which of the layers that were run stands for it.

        Args:
            keep_layers: So many of the model's last layers run without activation checkpointing.
        """
        first_kept = max(self.num_idle, len(self.kind_of) - keep_layers)
        first = [0] if first_kept else []
        checkpointed = [1 + kind for kind in self.kind_of[len(first) : first_kept]]
        # The kinds of idle layers come first, and are not among those that are run once more.
        before = 2 + len(self._active)
        return [*first, *checkpointed, *(before + kind for kind in self.kind_of[first_kept:])]


def lay_out(kinds: Sequence[Hashable], num_idle: int = 0) -> Layout:
    """Choose one layer of each kind, the last one.

    Args:
        kinds: The kind of each layer of the model.
        num_idle: So many of the first layers have no backward.
    """
    last = {kind: index for index, kind in enumerate(kinds)}
    order = list(last)
    return Layout(tuple(last.values()), tuple(order.index(kind) for kind in kinds), num_idle)


def split_passes(segments: Sequence[Segment], num_layers: int) -> tuple[PassTrace, ...]:
    """Split a step into its passes through the model.

    Args:
        segments: Of one step: one pass or, where a curvature is estimated first, two.
        num_layers: Layers of the model that was run.
    """
    length = _EMBEDDING + _HEAD + _END + 3 * num_layers
    assert segments and len(segments) % length == 0, "the engine's phases are not in the order that is known here"
    changes = [Change(each.phase, minus(each.peak, each.entry), minus(each.exit, each.entry)) for each in segments]
    return tuple(PassTrace(tuple(changes[start : start + length])) for start in range(0, len(changes), length))


def extrapolate(fewer: PassTrace, more: PassTrace, factor: float) -> PassTrace:
    """A pass over more micro-batches than were run: memory is linear in their number.

    Args:
        fewer: A pass over some.
        more: The same over more.
        factor: How far to go beyond `more`, in units of the difference of the two.
    """

    def line(one: Sizes, other: Sizes) -> Sizes:
        return Counter({key: round(other[key] + factor * (other[key] - one[key])) for key in {*one, *other}})

    return PassTrace(
        tuple(
            Change(other.phase, line(one.peak, other.peak), line(one.exit, other.exit))
            for one, other in zip(fewer.changes, more.changes, strict=True)
        )
    )


def follow(standing: Mapping[str, int], changes: Iterable[Change]) -> list[Segment]:
    """Turn changes into segments with absolute sizes.

    Args:
        standing: Bytes by category before the first change.
        changes: What happens.
    """
    level: Sizes = Counter(standing)
    segments: list[Segment] = []
    for change in changes:
        after = plus(level, change.exit)
        segments.append(Segment(change.phase, level, plus(level, change.peak), after))
        level = after
    return segments


def plus(*sizes: Mapping[str, int]) -> Sizes:
    """The sum by category; unlike the `+` of Counters, it keeps what is below zero."""
    total: Sizes = Counter()
    for each in sizes:
        total.update(each)
    return total


def minus(one: Mapping[str, int], other: Mapping[str, int]) -> Sizes:
    """The difference by category."""
    difference: Sizes = Counter(one)
    difference.subtract(other)
    return difference
