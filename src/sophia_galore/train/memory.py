"""The memory monitor: how much, in which phase, and what for.

A tracker follows every tensor storage during loading, the probe step, the first evaluation and the
first steps; it tells what the memory is for. How much it is, on CUDA the allocator tells (allocated, reserved), all
the time. On a CPU there is no such allocator: there the tracker's sum is the peak, and after it was
taken off only the resident size of the process is read. On a CPU nothing is kept in reserve beyond
what is allocated, so both numbers are the same there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self, get_args

import psutil
import torch
from torch import Tensor

from sophia_galore.engine.observe import PHASE_CATEGORY, Category, Observer, Phase
from sophia_galore.engine.tracker import StorageTracker

# What happens within an optimizer step; loading and evaluation are not a step's memory.
_STEP_PHASES = ("forward", "head", "backward", "step")


def process_bytes() -> int:
    """Resident size of this process, now."""
    return int(psutil.Process().memory_info().rss)


def peak_process_bytes() -> int:
    """Largest resident size of this process so far."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


class MemoryMonitor(Observer):
    """Follows memory through a run; a context manager.

    Args:
        device: Where the run's tensors live.
        track_steps: Steps during which every storage is followed; 0: none.
    """

    def __init__(self, device: torch.device, track_steps: int) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._track_steps = track_steps
        self._tracker = StorageTracker(device) if track_steps else None
        self._entered = False
        self._phases: dict[str, int] = {}
        self._current: list[Phase] = []
        self._peak_bytes = 0
        self._peak_reserved_bytes = 0
        self._categories: dict[str, int] = {}
        self._tracked_peak_bytes = 0
        self._step_peak_bytes = 0
        self._steps: list[dict[str, int | None]] = []

    @property
    def watches_tensors(self) -> bool:  # type: ignore[override]
        """Whether tags are of use at the moment."""
        return self._entered

    def __enter__(self) -> Self:
        """Begin to follow storages, where that is what is done."""
        if self._tracker is not None and not self._entered:
            self._tracker.__enter__()
            self._entered = True
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop following storages; resident size is still read."""
        if self._tracker is not None and self._entered:
            self._tracker.__exit__(None, None, None)
            self._entered = False

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Attribute peaks to this phase inside the context."""
        self._settle()
        self._current.append(name)
        self._open()
        try:
            yield
        finally:
            self._settle()
            self._current.pop()
            self._open()

    def tag(self, tensor: Tensor, category: Category) -> None:
        """Count this tensor under `category`."""
        if self._entered and self._tracker is not None:
            self._tracker.tag(tensor, category)

    def tag_state(self, named_state: Iterable[tuple[str, Tensor]]) -> None:
        """Count an optimizer's state tensors as state or as projections."""
        for name, tensor in named_state:
            self.tag(tensor, "projections" if "/basis" in name else "optimizer state")

    def end_step(self, step: int) -> dict[str, int | None]:
        """Note a step's peak.

        Args:
            step: Its number.

        Returns:
            `allocated_bytes` and `reserved_bytes` (None where they were not measured), `process_bytes`.
        """
        self._settle()
        allocated: int | None = self._step_peak_bytes or None
        reserved = int(torch.cuda.memory_reserved(self._device)) if self._cuda else allocated
        record: dict[str, int | None] = {
            "allocated_bytes": allocated,
            "reserved_bytes": reserved,
            "process_bytes": process_bytes(),
        }
        self._steps.append({"step": step, **record})
        self._step_peak_bytes = 0
        if len(self._steps) >= self._track_steps:
            self.stop()
        return record

    def end_probe(self) -> int | None:
        """Let what came so far count to the report, but not to the memory of the step that comes next.

        Returns:
            Most bytes that were allocated in the phases of a step; None where they were not measured.
        """
        self._settle()
        peak, self._step_peak_bytes = self._step_peak_bytes, 0
        return peak or None

    def report(self) -> dict[str, Any]:
        """Everything that was measured, as plain data."""
        self._settle()
        if self._cuda:
            measured_by = "CUDA allocator (categories: storage tracker, loading to the first steps)"
        elif self._tracker is not None:
            measured_by = f"storage tracker (loading, probe, first evaluation, first {self._track_steps} steps)"
        else:
            measured_by = "resident size of the process"
        return {
            "device": torch.cuda.get_device_name(self._device) if self._cuda else "cpu",
            "measured_by": measured_by,
            "peak_allocated_bytes": self._peak_bytes or peak_process_bytes(),
            "peak_reserved_bytes": (self._peak_reserved_bytes if self._cuda else self._peak_bytes)
            or peak_process_bytes(),
            "peak_process_bytes": peak_process_bytes(),
            "phases": {phase: self._phases.get(phase, 0) for phase in get_args(Phase)},
            "categories": {category: self._categories.get(category, 0) for category in get_args(Category)},
            "steps": self._steps,
        }

    def _settle(self) -> None:
        """Credit the peak since the last change of phase to the phase that ends."""
        tracker = self._tracker if self._entered else None
        if tracker is not None and tracker.peak_bytes > self._tracked_peak_bytes:
            self._tracked_peak_bytes, self._categories = tracker.peak_bytes, dict(tracker.peak_by_category)
        if self._cuda:
            peak = int(torch.cuda.max_memory_allocated(self._device))
            self._peak_reserved_bytes = max(
                self._peak_reserved_bytes, int(torch.cuda.max_memory_reserved(self._device))
            )
        elif tracker is not None:
            peak = tracker.peak_bytes
        else:
            return
        self._peak_bytes = max(self._peak_bytes, peak)
        if self._current:
            phase = self._current[-1]
            self._phases[phase] = max(self._phases.get(phase, 0), peak)
            if phase in _STEP_PHASES:
                self._step_peak_bytes = max(self._step_peak_bytes, peak)

    def _open(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        if self._tracker is not None:
            self._tracker.default = PHASE_CATEGORY[self._current[-1]] if self._current else "other"
            if self._entered:
                self._tracker.reset_peak()
