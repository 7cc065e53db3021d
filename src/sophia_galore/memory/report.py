"""The peaks of a memory report, by phase, category and step, and the size of the process."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import psutil

from sophia_galore.engine.observe import Category, Phase

STEP_PHASES: tuple[Phase, ...] = ("forward", "head", "backward", "step")
"""The phases of an optimizer step."""
_PEAKS = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_process_bytes")


def process_bytes() -> int:
    """Return the resident size of this process."""
    return int(psutil.Process().memory_info().rss)


def peak_process_bytes() -> int:
    """Return the largest resident size of this process so far."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


@dataclass
class Peaks:
    """The highest values so far.

    Args:
        allocated_bytes: Most bytes of tensors at once.
        reserved_bytes: Most bytes that the allocator held for them.
        step_bytes: Most bytes of tensors in the phases of the current step.
        phases: Most bytes of tensors by phase.
        categories: The highest tracked peak by category.
        steps: A record for each step.
    """

    allocated_bytes: int = 0
    reserved_bytes: int = 0
    step_bytes: int = 0
    phases: dict[str, int] = field(default_factory=dict)
    categories: Mapping[str, int] = field(default_factory=dict)
    steps: list[dict[str, int | None]] = field(default_factory=list)

    def add(self, phase: Phase | None, allocated_bytes: int, reserved_bytes: int) -> None:
        """Add the peaks since the last change of phase.

        Args:
            phase: The phase; None between phases.
            allocated_bytes: Most bytes of tensors at once.
            reserved_bytes: Most bytes that the allocator held.
        """
        self.allocated_bytes = max(self.allocated_bytes, allocated_bytes)
        self.reserved_bytes = max(self.reserved_bytes, reserved_bytes)
        if phase is not None:
            self.phases[phase] = max(self.phases.get(phase, 0), allocated_bytes)
        if phase in STEP_PHASES:
            self.step_bytes = max(self.step_bytes, allocated_bytes)

    def take_step(self) -> int | None:
        """Return the peak of the step that ends, and start the next one; None if nothing was measured."""
        peak_bytes, self.step_bytes = self.step_bytes, 0
        return peak_bytes or None

    def as_json(self) -> dict[str, Any]:
        """Return the fields of a memory report; if no tensors were measured, with the size of the process instead."""
        return {
            "peak_allocated_bytes": self.allocated_bytes or peak_process_bytes(),
            "peak_reserved_bytes": self.reserved_bytes or peak_process_bytes(),
            "peak_process_bytes": peak_process_bytes(),
            "phases": {phase: self.phases.get(phase, 0) for phase in get_args(Phase)},
            "categories": {category: self.categories.get(category, 0) for category in get_args(Category)},
            "steps": self.steps,
        }


def merge_reports(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the reports of both parts of a resumed run.

    Peaks are the larger ones. Categories and prediction come from the part with the higher peak.

    Args:
        earlier: The memory report in the checkpoint that the run was resumed from.
        later: The report after that.
    """
    highest = max((earlier, later), key=lambda part: part.get("peak_allocated_bytes") or 0)
    phases = [part.get("phases") or {} for part in (earlier, later)]
    adaptations = [*(earlier.get("adaptations") or []), *(later.get("adaptations") or [])]
    return {
        **later,
        **{key: highest.get(key) for key in ("categories", "timeline", "predicted_peak_bytes", "predicted_ratio")},
        **{key: max(earlier.get(key) or 0, later.get(key) or 0) or None for key in _PEAKS},
        "measured_by": later["measured_by"] if highest is later else earlier.get("measured_by", ""),
        "phases": {name: max(part.get(name) or 0 for part in phases) for name in {**phases[0], **phases[1]}},
        "adaptations": list(dict.fromkeys(adaptations)),
        "steps": [*(earlier.get("steps") or []), *(later.get("steps") or [])],
    }
