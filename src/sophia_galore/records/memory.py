"""`memory_report.json`: where the memory of a run went."""

from __future__ import annotations

from math import isfinite
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from sophia_galore.records.schema import Number, Record, Size, Sizes, Text, Whole


def _list(value: Any) -> Any:
    return () if value is None else value


def _time(value: float) -> float:
    if not isfinite(value):
        raise ValueError("not a time")
    return value


class Moment(Record):
    """A moment of a step.

    Args:
        time_s: Seconds since the step began; None where it was planned and not measured.
        phase: What the engine was doing; "" if unknown.
        categories: What was allocated, in bytes.
    """

    time_s: Annotated[Number, AfterValidator(_time)] | None = None
    phase: Text = ""
    categories: Sizes = Field(default_factory=dict)

    @field_validator("categories")
    @classmethod
    def _not_negative(cls, sizes: dict[str, int]) -> dict[str, int]:
        if any(size < 0 for size in sizes.values()):
            raise ValueError("but no size is negative")
        return sizes

    @property
    def total_bytes(self) -> int:
        """Everything that was allocated."""
        return sum(self.categories.values())


class Timeline(Record):
    """The course of memory over one optimizer step.

    Args:
        step: Its number, counted from 1; None if it is no step in particular.
        moments: In order of time; every one has a time or none has.
    """

    step: Whole | None = None
    moments: Annotated[tuple[Moment, ...], BeforeValidator(_list)] = Field(default=(), alias="points")

    @model_validator(mode="after")
    def _all_or_none_timed(self) -> Self:
        if len({moment.time_s is None for moment in self.moments}) == 2:
            raise ValueError("but some points have a 'time_s' and some have none")
        return self

    @property
    def timed(self) -> bool:
        """Whether it is known when the moments were."""
        return bool(self.moments) and self.moments[0].time_s is not None

    @property
    def peak_bytes(self) -> int:
        """The largest total of a moment; 0 without moments."""
        return max((moment.total_bytes for moment in self.moments), default=0)


class MemoryStep(Record):
    """Peaks of one step in bytes; None where it was not measured."""

    step: Whole
    allocated_bytes: Size = None
    reserved_bytes: Size = None
    process_bytes: Size = None


class ProcessMemory(Record):
    """The memory of one of several processes; None where it was not measured.

    Args:
        machine: Name of its machine.
        peak_allocated_bytes: Most bytes of live tensors at once.
        peak_process_bytes: Largest resident size.
    """

    machine: Text = ""
    peak_allocated_bytes: Size = None
    peak_process_bytes: Size = None


class MemoryReport(Record):
    """The memory of a run.

    Args:
        device: What it ran on; "" if unknown.
        measured_by: How it was measured; "" if unknown.
        limit_bytes: What the run may take; None without a limit.
        predicted_peak_bytes: The peak that was predicted before the run; None where it was not.
        predicted_ratio: Predicted over measured; None where one of them is missing.
        adaptations: What was changed when memory ran out, in sentences.
        peak_allocated_bytes: Most bytes of live tensors at once.
        peak_reserved_bytes: Most bytes that the allocator held.
        peak_process_bytes: Largest resident size of the process.
        phases: Peak within each phase, in bytes.
        categories: What the peak consists of, in bytes.
        steps: Peaks of single steps.
        timeline: One step from moment to moment; None where nothing was followed.
        processes: The processes of a run with several, by rank; empty for one.
    """

    device: Text = ""
    measured_by: Text = ""
    limit_bytes: Size = None
    predicted_peak_bytes: Size = None
    predicted_ratio: Number | None = None
    adaptations: Annotated[tuple[str, ...], BeforeValidator(_list)] = ()
    peak_allocated_bytes: Size = None
    peak_reserved_bytes: Size = None
    peak_process_bytes: Size = None
    phases: Sizes = Field(default_factory=dict)
    categories: Sizes = Field(default_factory=dict)
    steps: Annotated[tuple[MemoryStep, ...], BeforeValidator(_list)] = ()
    timeline: Annotated[
        Timeline | None, AfterValidator(lambda found: found if found and found.peak_bytes else None)
    ] = None
    processes: Annotated[tuple[ProcessMemory, ...], BeforeValidator(_list)] = ()
