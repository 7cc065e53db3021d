"""The course of memory through a step, cut where the engine says that something else begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from sophia_galore.engine.observe import PHASE_CATEGORY, Category, Observer, Phase
from sophia_galore.engine.tracker import StorageTracker

Sizes = Counter[str]
"""Bytes by category; differences may be negative."""


@dataclass(frozen=True)
class Segment:
    """What happens from the beginning of one phase to that of the next.

    Args:
        phase: Which phase.
        entry: What is alive at the beginning.
        peak: What is alive when most is.
        exit: What is alive at the end.
    """

    phase: Phase
    entry: Sizes
    peak: Sizes
    exit: Sizes


class Recorder(Observer):
    """Writes down segments; what precedes the first phase is in none. For steps whose numbers do not matter.

    Args:
        tracker: Counts; is entered while the engine runs.
    """

    watches_tensors = True

    def __init__(self, tracker: StorageTracker) -> None:
        self._tracker = tracker
        self._begun: tuple[Phase, Sizes] | None = None
        self._segments: list[Segment] = []

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """A new segment begins."""
        self._end_segment()
        self._begun = name, Counter(self._tracker.by_category)
        self._tracker.default = PHASE_CATEGORY[name]
        try:
            yield
        finally:
            self._tracker.default = "other"

    def tag(self, tensor: Tensor, category: Category) -> None:
        """Count this tensor under `category`."""
        self._tracker.tag(tensor, category)

    def parts(self, parts: Sequence[slice]) -> Sequence[slice]:
        """The first two: what is left over from one may still be there while the next begins."""
        return parts[:2]

    def take(self) -> list[Segment]:
        """The segments since this was last asked, the last one ended now."""
        self._end_segment()
        self._begun = None
        taken, self._segments = self._segments, []
        return taken

    def _end_segment(self) -> None:
        if self._begun is not None:
            phase, entry = self._begun
            peak, left = Counter(self._tracker.peak_by_category), Counter(self._tracker.by_category)
            self._segments.append(Segment(phase, entry, peak, left))
        self._tracker.reset_peak()
