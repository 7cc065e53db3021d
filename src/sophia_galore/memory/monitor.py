"""The memory monitor: how much, in which phase, and what for.

A tracker follows every tensor storage during loading, the probe step, the first evaluation and the
first steps; it tells what the memory is for. How much it is, on CUDA the allocator tells (allocated, reserved), all
the time. On a CPU there is no such allocator: there the tracker's sum is the peak, and after it was
taken off only the resident size of the process is read. On a CPU nothing is kept in reserve beyond
what is allocated, so both numbers are the same there.

A limit is kept by the allocator on CUDA, and on a CPU by the tracker, which then stays to the end. Copies
that are made to read or write a checkpoint or a model are not counted: on a GPU they are in host memory.
When memory runs out, what was in it is noted where that happens, since it is gone when the run ends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, get_args

import psutil
import torch
from torch import Tensor

from sophia_galore.config.schema import MemoryConfig
from sophia_galore.config.size import bytes_in_words
from sophia_galore.engine.observe import PHASE_CATEGORY, Category, Observer, Phase
from sophia_galore.engine.probe import WHAT_HELPS
from sophia_galore.errors import OutOfMemory, SophiaGaloreError, lacks_memory
from sophia_galore.memory.budget import allocator_bytes
from sophia_galore.memory.out_of_memory import Shortage
from sophia_galore.memory.report import joined
from sophia_galore.memory.timeline import StepCourse
from sophia_galore.memory.tracker import StorageTracker

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
        asked: What was asked for: for how many steps storages are followed, and the limit.
    """

    def __init__(self, device: torch.device, asked: MemoryConfig) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._track_steps = asked.track_steps
        self._limit_bytes, self._reserve_bytes = asked.limit, asked.reserve
        # To the end, since what is not seen can't be refused.
        self._stays = asked.limit is not None and not self._cuda
        self._tracker = StorageTracker(device) if asked.track_steps or self._stays else None
        self._course = StepCourse(self._tracker) if self._tracker is not None else None
        self._entered = False
        self.predicted_bytes: int | None = None
        """What was expected to be the peak of tensors."""
        self.expected_step: int | None = None
        """The step that was expected to need most: its storages are followed too."""
        self.earlier: Mapping[str, Any] = {}
        """The report of what the run did before the checkpoint that it goes on from; {}: nothing."""
        self.adaptations: list[str] = []
        """What was changed when memory ran out, in sentences."""
        self._phases: dict[str, int] = {}
        self._current: list[Phase] = []
        self._began: list[Mapping[str, int]] = []
        self._shortage: Shortage | None = None
        self.names: Callable[[], Mapping[int, str]] = dict
        """Gives the names of storages that have one."""
        self.advice: Callable[[], str] = self._usual_advice
        """Says what to do when memory ran out; what it allocates for that is not counted."""
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
        """Begin to follow storages, where that is what is done, and put the limit into force.

        Raises:
            EnvironmentProblem: The limit is more than the GPU has, or leaves nothing to tensors.
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

    def _follow(self) -> None:
        if self._tracker is not None and not self._entered:
            self._tracker.__enter__()
            self._entered = True

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self._cuda and self._limit_bytes is not None:
            torch.cuda.set_per_process_memory_fraction(1.0, self._device)

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
        self._began.append(dict(self._tracker.by_category) if self._tracker is not None else {})
        self._shortage = None  # whatever there was before has been overcome
        self._open()
        if self._course is not None and self._entered and name in _STEP_PHASES:
            self._course.enter(name)
        try:
            yield
        except Exception as error:
            if self._shortage is None and lacks_memory(error):
                self._shortage = self._look(error)
            raise
        finally:
            if self._course is not None and self._entered and name in _STEP_PHASES:
                self._course.leave(name)
            self._settle()
            self._current.pop()
            self._began.pop()
            self._open()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside the context tensors are not counted, such as those that are made to read or write a file."""
        entered = self._entered
        self.stop()
        try:
            yield
        finally:
            if entered:
                self._follow()

    @contextmanager
    def explaining(self, more: Callable[[], str] = str) -> Iterator[None]:
        """Explain it if memory runs out inside the context.

        Args:
            more: Gives a sentence that is added to what the user can do.

        Raises:
            OutOfMemory: Instead of an error that only says that memory ran out.
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
        """Say where memory ran out, what grew and what was largest.

        Args:
            error: What was raised.
            what: What happened, in words that a place follows.

        Returns:
            An error for the user, with what can be done about it.
        """
        shortage = self._shortage or self._look(error)
        limit = "" if self._limit_bytes is None else f"memory.limit ({bytes_in_words(self._limit_bytes)})"
        if limit and self._reserve_bytes:
            limit += f" less memory.reserve ({bytes_in_words(self._reserve_bytes)})"
        with self.apart():  # advice may be found by trying things out
            return OutOfMemory(what + shortage.in_words(error, limit), self.advice())

    def _look(self, error: BaseException) -> Shortage:
        """How things stand; at the moment of the refusal, if it was one."""
        counts = self._tracker is not None and self._entered
        refusal = self._tracker.refusal if self._tracker is not None and isinstance(error, OutOfMemory) else None
        held = refusal.held if refusal else self._tracker.held() if self._tracker is not None and counts else None
        phase, before = (self._current[-1], self._began[-1]) if self._current else (None, {})
        return Shortage(phase, before, held, refusal, self.names())

    def _usual_advice(self) -> str:
        if self._limit_bytes is None:
            return WHAT_HELPS
        return f"Raise memory.limit, or {WHAT_HELPS[0].lower()}{WHAT_HELPS[1:]}"

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
        if self._course is not None:
            self._course.end_step(step)
        self._step_peak_bytes = 0
        if (
            self._stays
            or len(self._steps) < self._track_steps
            or (self._track_steps and step + 1 == self.expected_step)
        ):
            self._follow()
        else:
            self.stop()
        return record

    def end_probe(self) -> int | None:
        """Let what came so far count to the report, but not to the memory of the step that comes next.

        Returns:
            Most bytes that were allocated in the phases of a step; None where they were not measured.
        """
        self._settle()
        if self._course is not None:
            self._course.forget()
        peak, self._step_peak_bytes = self._step_peak_bytes, 0
        return peak or None

    def report(self) -> dict[str, Any]:
        """Everything that was measured in all parts of the run, as plain data."""
        report = self._report()
        return joined(self.earlier, report) if self.earlier else report

    def _report(self) -> dict[str, Any]:
        self._settle()
        if self._cuda:
            measured_by = "CUDA allocator (categories: storage tracker, loading to the first steps)"
        elif self._stays:
            measured_by = "storage tracker (the whole run)"
        elif self._tracker is not None:
            measured_by = f"storage tracker (loading, probe, first evaluation, first {self._track_steps} steps"
            later = self.expected_step if (self.expected_step or 0) > self._track_steps else None
            measured_by += f", step {later})" if later else ")"
        else:
            measured_by = "resident size of the process"
        return {
            "device": torch.cuda.get_device_name(self._device) if self._cuda else "cpu",
            "measured_by": measured_by,
            "limit_bytes": self._limit_bytes,
            "predicted_peak_bytes": self.predicted_bytes,
            "predicted_ratio": self._ratio(),
            "adaptations": self.adaptations,
            "peak_allocated_bytes": self._peak_bytes or peak_process_bytes(),
            "peak_reserved_bytes": (self._peak_reserved_bytes if self._cuda else self._peak_bytes)
            or peak_process_bytes(),
            "peak_process_bytes": peak_process_bytes(),
            "phases": {phase: self._phases.get(phase, 0) for phase in get_args(Phase)},
            "categories": {category: self._categories.get(category, 0) for category in get_args(Category)},
            "steps": self._steps,
            "timeline": self._course.highest if self._course is not None else None,
        }

    def _ratio(self) -> float | None:
        """What was expected, as a multiple of what was measured.

        None where tensors were not measured, the step that was expected to need most was not among them, or less was
        taken at once than had been expected.
        """
        measured = {record["step"] for record in self._steps if record["allocated_bytes"] is not None}
        if self.predicted_bytes is None or self.expected_step not in measured or self.adaptations:
            return None
        return round(self.predicted_bytes / self._peak_bytes, 4)

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
