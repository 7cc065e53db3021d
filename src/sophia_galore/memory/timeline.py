"""Memory over one step, cut into segments where the engine enters another phase."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sophia_galore.engine.observe import PHASE_CATEGORY, Category, Observer, Phase
from sophia_galore.memory.tracker import StorageTracker

Sizes = Counter[str]
"""Bytes by category; differences may be negative."""


@dataclass(frozen=True)
class Segment:
    """One phase of a step.

    Args:
        phase: Which phase.
        entry: What is alive at its beginning.
        peak: What is alive when most is.
        exit: What is alive at its end.
        times_s: When it begins and ends, in seconds since the step began; None: not known.
    """

    phase: Phase
    entry: Sizes
    peak: Sizes
    exit: Sizes
    times_s: tuple[float, float] | None = None


class Recorder(Observer):
    """Records segments of simulated steps; what precedes the first phase is in none.

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
        """A new segment begins; it lasts until the next one does."""
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
            peak, left = Counter(self._tracker.peak_by_category), Counter(self._tracker.by_category)
            self._segments.append(Segment(*self._begun, peak, left))
        self._tracker.reset_peak()


class StepTimeline:
    """Memory and time over a step of a real run; of several steps, the one with the highest peak is kept.

    Args:
        tracker: Counts; whoever enters a segment resets its peak.
    """

    def __init__(self, tracker: StorageTracker) -> None:
        self._tracker = tracker
        self._begun_s: float | None = None
        self._segments: list[Segment] = []
        self._highest_bytes = 0
        self.highest: dict[str, Any] | None = None
        """`step` and `points` of the step with the highest peak; None: there is none."""

    @contextmanager
    def segment(self, phase: Phase) -> Iterator[None]:
        """A phase of a step lasts as long as the context; these contexts do not nest."""
        entered_s, entry = time.perf_counter(), Counter(self._tracker.by_category)
        if self._begun_s is None:
            self._begun_s = entered_s
        begun_s = self._begun_s
        try:
            yield
        finally:
            peak, left = Counter(self._tracker.peak_by_category), Counter(self._tracker.by_category)
            times_s = entered_s - begun_s, time.perf_counter() - begun_s
            self._segments.append(Segment(phase, entry, peak, left, times_s))

    def end_step(self, step: int) -> None:
        """All phases of a step are over."""
        peak_bytes = max((segment.peak.total() for segment in self._segments), default=0)
        if peak_bytes > self._highest_bytes:
            self._highest_bytes = peak_bytes
            self.highest = {"step": step, "points": points_of(self._segments)}
        self.forget()

    def forget(self) -> None:
        """What came so far belongs to no step."""
        self._begun_s, self._segments = None, []


def points_of(segments: Sequence[Segment]) -> list[dict[str, Any]]:
    """A step as plain data, for files and pictures: three points a segment.

    Args:
        segments: Of one step, in their order.

    Returns:
        For each point its `phase`, its `categories` in bytes and, where that is known, its `time_s`. When a segment
        has its peak is not known: the middle stands for it.
    """
    points: list[dict[str, Any]] = []
    for segment in segments:
        times: list[dict[str, Any]] = [{}, {}, {}]
        if segment.times_s is not None:
            begin_s, end_s = segment.times_s
            times = [{"time_s": round(moment_s, 6)} for moment_s in (begin_s, (begin_s + end_s) / 2, end_s)]
        for moment, sizes in zip(times, (segment.entry, segment.peak, segment.exit), strict=True):
            alive = {category: size for category, size in sizes.items() if size > 0}
            points.append({**moment, "phase": segment.phase, "categories": alive})
    return points
