"""The memory monitor: measures a run's memory by phase and category, and enforces its limit.

A tracker counts every tensor storage by category during loading, the probe step, the first evaluation and the first
steps. On CUDA the allocator reports the total (allocated and reserved) all the time. A CPU has no such allocator: there
the tracker's sum is the peak, and later only the resident size of the process is read. On a CPU nothing is reserved
beyond what is allocated, so both numbers are equal.

On CUDA the allocator enforces the limit. On a CPU the tracker does, and then counts until the end of the run. Copies
for reading or writing a checkpoint or a model are not counted: on a GPU they are in host memory. When memory runs out,
a snapshot is taken at once, before anything is freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor

from sophia_galore.config.schema import MemoryConfig
from sophia_galore.config.size import bytes_in_words
from sophia_galore.engine.observe import PHASE_CATEGORY, Category, Observer, Phase
from sophia_galore.engine.probe import WHAT_HELPS
from sophia_galore.errors import OutOfMemory, SophiaGaloreError, lacks_memory
from sophia_galore.memory.budget import allocator_bytes
from sophia_galore.memory.out_of_memory import Snapshot, with_usual_remedies
from sophia_galore.memory.report import STEP_PHASES, Peaks, merge_reports, process_bytes
from sophia_galore.memory.timeline import StepTimeline
from sophia_galore.memory.tracker import StorageTracker, state_category


class MemoryMonitor(Observer):
    """Measures memory through a run; a context manager.

    Args:
        device: The device of the run's tensors.
        asked: The limit, and for how many steps storages are counted.
    """

    def __init__(self, device: torch.device, asked: MemoryConfig) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._track_steps = asked.track_steps
        self._limit_bytes, self._reserve_bytes = asked.limit, asked.reserve
        # Until the end, since only counted allocations can be refused.
        self._stays = asked.limit is not None and not self._cuda
        self._tracker = StorageTracker(device) if asked.track_steps or self._stays else None
        self._timeline = StepTimeline(self._tracker) if self._tracker is not None else None
        self._entered: StorageTracker | None = None  # the tracker, while it counts
        self.predicted_bytes: int | None = None
        """The forecast peak of tensors."""
        self.expected_step: int | None = None
        """The step with the forecast peak: its storages are counted too."""
        self.earlier: Mapping[str, Any] = {}
        """The report in the checkpoint that the run was resumed from; {} without one."""
        self.adaptations: list[str] = []
        """What was changed when memory ran out, in sentences."""
        self.processes: list[dict[str, Any]] = []
        """The peaks of all processes of the run; empty for a single one."""
        self.names: Callable[[], Mapping[int, str]] = dict
        """Returns names of storages, by key."""
        self.advice: Callable[[], str] = self._usual_advice
        """Returns what to do after memory ran out; its allocations are not counted."""
        self._current: list[tuple[Phase, Mapping[str, int]]] = []  # with the bytes by category at its beginning
        self._snapshot: Snapshot | None = None
        self._peaks = Peaks()
        self._tracked_peak_bytes = 0

    @property
    def watches_tensors(self) -> bool:  # type: ignore[override]
        """Whether tensors are counted at the moment."""
        return self._entered is not None

    def __enter__(self) -> Self:
        """Begin to count storages and enforce the limit.

        Raises:
            EnvironmentProblem: The limit exceeds the GPU's memory, or leaves nothing for tensors.
        """
        if self._limit_bytes is not None:
            room_bytes = allocator_bytes(self._device, self._limit_bytes, self._reserve_bytes)
            if self._cuda:
                total_bytes = torch.cuda.mem_get_info(self._device)[1]
                torch.cuda.set_per_process_memory_fraction(room_bytes / total_bytes, self._device)
            elif self._tracker is not None:
                self._tracker.limit_bytes = room_bytes
        self._follow()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self._cuda and self._limit_bytes is not None:
            torch.cuda.set_per_process_memory_fraction(1.0, self._device)

    def _follow(self) -> None:
        if self._tracker is not None and self._entered is None:
            self._tracker.__enter__()
            self._entered = self._tracker

    def stop(self) -> None:
        """Stop counting storages; resident size is still read."""
        if self._entered is not None:
            self._entered.__exit__(None, None, None)
            self._entered = None

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Attribute peaks to this phase inside the context."""
        self._settle()
        self._current.append((name, dict(self._tracker.by_category) if self._tracker is not None else {}))
        self._snapshot = None  # an earlier shortage was recovered from
        self._open()
        timeline = self._timeline if self._entered is not None and name in STEP_PHASES else None
        try:
            with timeline.segment(name) if timeline is not None else nullcontext():
                yield
        except Exception as error:
            if self._snapshot is None and lacks_memory(error):
                self._snapshot = self._look(error)
            raise
        finally:
            self._settle()
            self._current.pop()
            self._open()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Do not count tensors inside the context, such as copies for reading or writing a file."""
        was_entered = self.watches_tensors
        self.stop()
        try:
            yield
        finally:
            if was_entered:
                self._follow()

    @contextmanager
    def explaining(self, more: Callable[[], str] = str) -> Iterator[None]:
        """Explain where and why if memory runs out inside the context.

        Args:
            more: Returns a sentence to add to the remedy.

        Raises:
            OutOfMemory: Memory ran out; it replaces the original error.
        """
        try:
            yield
        except Exception as error:
            ours = isinstance(error, SophiaGaloreError) and not isinstance(error, OutOfMemory)
            if ours or not lacks_memory(error):
                raise
            told = error if isinstance(error, OutOfMemory) and error.remedy else self.explain(error)
            raise OutOfMemory(told.cause, f"{told.remedy} {more()}".strip()) from error

    def explain(self, error: BaseException, what: str = "Out of memory") -> OutOfMemory:
        """Return an error that says where memory ran out, what grew, what was largest, and what to do.

        Args:
            error: The error that was raised.
            what: What happened; the place is appended.
        """
        snapshot = self._snapshot or self._look(error)
        limit = "" if self._limit_bytes is None else f"memory.limit ({bytes_in_words(self._limit_bytes)})"
        if limit and self._reserve_bytes:
            limit += f" less memory.reserve ({bytes_in_words(self._reserve_bytes)})"
        with self.apart():  # the advice may simulate other settings
            return OutOfMemory(what + snapshot.explain(error, limit), self.advice())

    def _look(self, error: BaseException) -> Snapshot:
        """Return the current state of memory, or that of the refusal."""
        refusal = self._tracker.refusal if self._tracker is not None and isinstance(error, OutOfMemory) else None
        held = refusal.held if refusal else self._entered.held() if self._entered is not None else None
        phase, before = self._current[-1] if self._current else (None, {})
        return Snapshot(phase, before, held, refusal, self.names())

    def _usual_advice(self) -> str:
        return WHAT_HELPS if self._limit_bytes is None else with_usual_remedies("Raise memory.limit")

    def tag(self, tensor: Tensor, category: Category) -> None:
        """Count this tensor under `category`."""
        if self._entered is not None:
            self._entered.tag(tensor, category)

    def tag_state(self, named_state: Iterable[tuple[str, Tensor]]) -> None:
        """Count an optimizer's state tensors as state or as projections."""
        for name, tensor in named_state:
            self.tag(tensor, state_category(name))

    def end_step(self, step: int) -> dict[str, int | None]:
        """Record a step's peak.

        Args:
            step: Its number.

        Returns:
            `allocated_bytes` and `reserved_bytes` (None where they were not measured), `process_bytes`.
        """
        self._settle()
        allocated = self._peaks.take_step()
        record: dict[str, int | None] = {
            "allocated_bytes": allocated,
            "reserved_bytes": int(torch.cuda.memory_reserved(self._device)) if self._cuda else allocated,
            "process_bytes": process_bytes(),
        }
        self._peaks.steps.append({"step": step, **record})
        if self._timeline is not None:
            self._timeline.end_step(step)
        is_expected = self._track_steps > 0 and step + 1 == self.expected_step
        if self._stays or is_expected or len(self._peaks.steps) < self._track_steps:
            self._follow()
        else:
            self.stop()
        return record

    def end_probe(self) -> int | None:
        """End the probe step: its peak counts for the report, but not for the next step.

        Returns:
            Most bytes that were allocated in its phases; None if they were not measured.
        """
        self._settle()
        if self._timeline is not None:
            self._timeline.forget()
        return self._peaks.take_step()

    def report(self) -> dict[str, Any]:
        """Return the memory report of all parts of the run, as plain data."""
        self._settle()
        report = {
            "device": torch.cuda.get_device_name(self._device) if self._cuda else "cpu",
            "measured_by": self._measured_by(),
            "limit_bytes": self._limit_bytes,
            "predicted_peak_bytes": self.predicted_bytes,
            "predicted_ratio": self._ratio(),
            "adaptations": self.adaptations,
            **self._peaks.as_json(),
            "timeline": self._timeline.highest if self._timeline is not None else None,
            **({"processes": self.processes} if self.processes else {}),
        }
        return merge_reports(self.earlier, report) if self.earlier else report

    def _measured_by(self) -> str:
        if self._cuda:
            return "CUDA allocator (categories: storage tracker, loading to the first steps)"
        if self._stays:
            return "storage tracker (the whole run)"
        if self._tracker is None:
            return "resident size of the process"
        expected = self.expected_step or 0
        later = f", step {expected}" if expected > self._track_steps else ""
        return f"storage tracker (loading, probe, first evaluation, first {self._track_steps} steps{later})"

    def _ratio(self) -> float | None:
        """Return the forecast peak divided by the measured one.

        It is None if the step with the forecast peak was not measured, or if chunks were made smaller than forecast.
        """
        measured = {record["step"] for record in self._peaks.steps if record["allocated_bytes"] is not None}
        if self.predicted_bytes is None or self.expected_step not in measured or self.adaptations:
            return None
        return round(self.predicted_bytes / self._peaks.allocated_bytes, 4)

    def _settle(self) -> None:
        """Assign the peak since the last change of phase to the phase that ends."""
        tracker = self._entered
        if tracker is not None and tracker.peak_bytes > self._tracked_peak_bytes:
            self._tracked_peak_bytes, self._peaks.categories = tracker.peak_bytes, dict(tracker.peak_by_category)
        phase = self._current[-1][0] if self._current else None
        if self._cuda:
            allocated, reserved = torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved
            self._peaks.add(phase, int(allocated(self._device)), int(reserved(self._device)))
        elif tracker is not None:
            self._peaks.add(phase, tracker.peak_bytes, tracker.peak_bytes)

    def _open(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        if self._tracker is not None:
            self._tracker.default = PHASE_CATEGORY[self._current[-1][0]] if self._current else "other"
            if self._entered is not None:
                self._tracker.reset_peak()
