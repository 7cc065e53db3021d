"""The course of memory through a step of the whole model, put together from what single layers were seen to do.

A segment of a step (a phase of one layer) is known by two differences: how much higher than where it begins memory
rises in it, and how much higher it ends. Layers of a kind do the same, so the course of a model with any number of
layers follows from one layer of each kind, exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sophia_galore.engine.observe import Phase
from sophia_galore.memory.timeline import Segment, Sizes


@dataclass(frozen=True)
class Change:
    """What a segment does to memory, wherever it begins.

    Args:
        phase: Which phase.
        peak: Bytes by category at its peak, less those at its beginning.
        exit: Bytes by category at its end, less those at its beginning.
    """

    phase: Phase
    peak: Sizes
    exit: Sizes


@dataclass(frozen=True)
class PassTrace:
    """What one pass through a model does: forward, head, backward, and what is done with the gradients.

    Args:
        embedding: Up to the first layer.
        forward: A layer's forward, by the layer's number among those that were run.
        head: The head, and what is done with its gradients.
        backward: A layer's backward, and what is done with its gradients, by its number.
        end: Embedding, tied head, and what is done at the end.
    """

    embedding: tuple[Change, ...]
    forward: tuple[tuple[Change, ...], ...]
    head: tuple[Change, ...]
    backward: tuple[tuple[Change, ...], ...]
    end: tuple[Change, ...]

    def changes(self, layout: Layout, keep_layers: int) -> list[Change]:
        """The changes of a model's pass in their order.

        Args:
            layout: Which layers stand for which.
            keep_layers: So many of the model's last layers keep their graphs.
        """
        places = layout.places(keep_layers)
        first_kept = max(layout.num_idle, len(places) - keep_layers)
        there = [change for place in places for change in self.forward[place]]
        back: list[Change] = []
        for index in reversed(range(len(places))):
            passed, *more = self.backward[places[index]]
            # What a layer was given by one that forgets is gone when its backward is over. What one gave that keeps
            # its graph stays in that, and so it was where the layer that stands for this one was seen.
            if index == first_kept > 0 and keep_layers:
                passed = replace(passed, exit=minus(passed.exit, self.forward[0][0].exit))
            back += [passed, *more]
        changes = [*self.embedding, *there, *self.head, *back, *self.end]
        # At the end all is let go of that was kept of any layer, be it one of those that were run or not.
        left = self._sum_of_exits()
        for change in changes[:-1]:
            left = minus(left, change.exit)
        return [*changes[:-1], replace(changes[-1], exit=left)]

    def _sum_of_exits(self) -> Sizes:
        """What a pass leaves behind."""
        layers = [change for layer in (*self.forward, *self.backward) for change in layer]
        left: Sizes = Counter()
        for change in (*self.embedding, *self.head, *layers, *self.end):
            left = plus(left, change.exit)
        return left


@dataclass(frozen=True)
class Layout:
    """Which layers stand for which.

    Args:
        chosen: For each kind of layer, the number of the one that stands for it.
        kind_of: For each layer of the model, its kind.
        num_idle: So many of the first layers are not gone back through, and keep no graph. They share no kind with the
            others.
    """

    chosen: tuple[int, ...]
    kind_of: tuple[int, ...]
    num_idle: int = 0

    def run(self, *, keeps: bool) -> tuple[int, ...]:
        """Numbers of the layers to be run: the first one, one of each kind and, if wanted, each of these once more.

        Args:
            keeps: Whether layers are to be seen that keep their graphs, each after another one that does.
        """
        active = self._active
        return (0, *self.chosen, active[-1], *active) if keeps and active else (0, *self.chosen)

    @property
    def num_kept(self) -> int:
        """How many of the layers that are run, the last ones, are to keep their graphs if any are."""
        return 1 + len(self._active) if self._active else 0

    @property
    def _active(self) -> tuple[int, ...]:
        """Those of the chosen ones that may keep their graphs."""
        return tuple(index for index in self.chosen if index >= self.num_idle)

    def places(self, keep_layers: int) -> list[int]:
        """For each layer of the model, the place of the one that stands for it among those that were run.

        Args:
            keep_layers: So many of the model's last layers keep their graphs.
        """
        first_kept = max(self.num_idle, len(self.kind_of) - keep_layers)
        first = [0] if first_kept else []
        forgetting = [1 + kind for kind in self.kind_of[len(first) : first_kept]]
        # The kinds of idle layers come first, and are not among those that are run once more.
        before = 2 + len(self._active)
        keeping = [before + kind for kind in self.kind_of[first_kept:]]
        return [*first, *forgetting, *keeping]


def lay_out(kinds: Sequence[Hashable], num_idle: int = 0) -> Layout:
    """Choose one layer of each kind, the last one.

    Args:
        kinds: The kind of each layer of the model.
        num_idle: So many of the first layers are not gone back through.
    """
    last = {kind: index for index, kind in enumerate(kinds)}
    order = list(last)
    return Layout(tuple(last.values()), tuple(order.index(kind) for kind in kinds), num_idle)


def parse_passes(segments: Sequence[Segment], num_layers: int) -> tuple[PassTrace, ...]:
    """Tell from the engine's phases what belongs to which layer, as `LayerwiseEngine` orders them.

    Args:
        segments: Of one step: one pass or, where a curvature is estimated first, two.
        num_layers: Layers of the model that was run.
    """
    length = 1 + num_layers + 2 + 2 * num_layers + 3
    assert segments and len(segments) % length == 0, "the engine's phases are not in the order that is known here"
    passes = (segments[start : start + length] for start in range(0, len(segments), length))
    return tuple(_parse([_change(segment) for segment in each], num_layers) for each in passes)


def _parse(changes: list[Change], num_layers: int) -> PassTrace:
    first_back = 1 + num_layers + 2
    backward = tuple(tuple(changes[first_back + 2 * k : first_back + 2 * k + 2]) for k in range(num_layers))
    return PassTrace(
        embedding=(changes[0],),
        forward=tuple((change,) for change in changes[1 : 1 + num_layers]),
        head=tuple(changes[1 + num_layers : first_back]),
        backward=backward[::-1],
        end=tuple(changes[-3:]),
    )


def _change(segment: Segment) -> Change:
    return Change(segment.phase, minus(segment.peak, segment.entry), minus(segment.exit, segment.entry))


def extrapolate(fewer: PassTrace, more: PassTrace, factor: float) -> PassTrace:
    """A pass over more micro-batches than were run, by what each further one adds.

    Args:
        fewer: A pass over some.
        more: The same over more.
        factor: How far to go beyond `more`, in units of the difference of the two.
    """

    def line(one: Change, other: Change) -> Change:
        return Change(
            other.phase,
            _beyond(one.peak, other.peak, factor),
            _beyond(one.exit, other.exit, factor),
        )

    def lines(one: Iterable[Change], other: Iterable[Change]) -> tuple[Change, ...]:
        return tuple(line(a, b) for a, b in zip(one, other, strict=True))

    return PassTrace(
        lines(fewer.embedding, more.embedding),
        tuple(lines(a, b) for a, b in zip(fewer.forward, more.forward, strict=True)),
        lines(fewer.head, more.head),
        tuple(lines(a, b) for a, b in zip(fewer.backward, more.backward, strict=True)),
        lines(fewer.end, more.end),
    )


def _beyond(fewer: Sizes, more: Sizes, factor: float) -> Sizes:
    return Counter({key: round(more[key] + factor * (more[key] - fewer[key])) for key in {*fewer, *more}})


def follow(standing: Mapping[str, int], changes: Iterable[Change]) -> list[Segment]:
    """The course of memory.

    Args:
        standing: Bytes by category before the first change.
        changes: What happens.

    Returns:
        The same with absolute sizes.
    """
    level: Sizes = Counter(standing)
    segments: list[Segment] = []
    for change in changes:
        after = plus(level, change.exit)
        segments.append(Segment(change.phase, level, plus(level, change.peak), after))
        level = after
    return segments


def plus(one: Mapping[str, int], other: Mapping[str, int]) -> Sizes:
    """The sum by category; unlike that of two Counters, it keeps what is below zero."""
    return Counter({key: one.get(key, 0) + other.get(key, 0) for key in {*one, *other}})


def minus(one: Mapping[str, int], other: Mapping[str, int]) -> Sizes:
    """The difference by category."""
    return Counter({key: one.get(key, 0) - other.get(key, 0) for key in {*one, *other}})
