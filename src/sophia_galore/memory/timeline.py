"""The course of memory through a step, cut where the engine says that something else begins."""

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


class StepCourse:
    """The course of one optimizer step, as the points of a picture; of several steps, that of the highest peak.

    Args:
        tracker: Counts.
    """

    def __init__(self, tracker: StorageTracker) -> None:
        self._tracker = tracker
        self._begun_s: float | None = None
        self._phase_begun_s = 0.0
        self._points: list[dict[str, Any]] = []
        self._peak_bytes = self._highest_bytes = 0
        self.highest: dict[str, Any] | None = None
        """`step`, and `points` of `time_s` since its beginning, `phase`, and bytes by category; None: there is none."""

    def enter(self, phase: Phase) -> None:
        """A phase of a step begins."""
        self._phase_begun_s = time.perf_counter()
        if self._begun_s is None:
            self._begun_s = self._phase_begun_s
        self._add(phase, self._phase_begun_s, self._tracker.by_category)

    def leave(self, phase: Phase) -> None:
        """It ends. At which moment of it most was allocated is not known: the middle stands for it."""
        now = time.perf_counter()
        self._peak_bytes = max(self._peak_bytes, self._tracker.peak_bytes)
        self._add(phase, (self._phase_begun_s + now) / 2, self._tracker.peak_by_category)
        self._add(phase, now, self._tracker.by_category)

    def end_step(self, step: int) -> None:
        """All phases of a step are over."""
        if self._points and self._peak_bytes > self._highest_bytes:
            self._highest_bytes = self._peak_bytes
            self.highest = {"step": step, "points": self._points}
        self.forget()

    def forget(self) -> None:
        """What came so far belongs to no step."""
        self._begun_s, self._points, self._peak_bytes = None, [], 0

    def _add(self, phase: Phase, moment_s: float, sizes: Sizes) -> None:
        assert self._begun_s is not None
        alive = {category: size for category, size in sizes.items() if size > 0}
        self._points.append({"time_s": round(moment_s - self._begun_s, 6), "phase": phase, "categories": alive})


def points_of(segments: Sequence[Segment]) -> list[dict[str, Any]]:
    """The points of a picture of segments whose time is not known, in their order.

    Args:
        segments: Of one step.
    """
    return [
        {"phase": segment.phase, "categories": {key: size for key, size in sizes.items() if size > 0}}
        for segment in segments
        for sizes in (segment.entry, segment.peak, segment.exit)
    ]
