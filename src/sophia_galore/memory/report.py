"""What a memory report is made of: peaks by phase, category and step, and the size of the process."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import psutil

from sophia_galore.engine.observe import Category, Phase

STEP_PHASES: tuple[Phase, ...] = ("forward", "head", "backward", "step")
"""What happens within an optimizer step; loading and evaluation are not a step's memory."""
_PEAKS = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_process_bytes")


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


@dataclass
class Peaks:
    """The highest numbers so far.

    Args:
        allocated_bytes: Most bytes of tensors at once.
        reserved_bytes: Most bytes that the allocator held for them.
        step_bytes: Most bytes of tensors in the phases of the current step.
        phases: Most bytes of tensors by phase.
        categories: What the highest peak that was tracked consists of.
        steps: A record for each step.
    """

    allocated_bytes: int = 0
    reserved_bytes: int = 0
    step_bytes: int = 0
    phases: dict[str, int] = field(default_factory=dict)
    categories: Mapping[str, int] = field(default_factory=dict)
    steps: list[dict[str, int | None]] = field(default_factory=list)

    def add(self, phase: Phase | None, allocated_bytes: int, reserved_bytes: int) -> None:
        """Take in what was measured since the last change of phase.

        Args:
            phase: The phase that it belongs to; None: between phases.
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
        """The peak of the step that ends here; None: nothing was measured."""
        peak_bytes, self.step_bytes = self.step_bytes, 0
        return peak_bytes or None

    def as_json(self) -> dict[str, Any]:
        """As in a memory report; where nothing was measured, the process's size stands for that of tensors."""
        return {
            "peak_allocated_bytes": self.allocated_bytes or peak_process_bytes(),
            "peak_reserved_bytes": self.reserved_bytes or peak_process_bytes(),
            "peak_process_bytes": peak_process_bytes(),
            "phases": {phase: self.phases.get(phase, 0) for phase in get_args(Phase)},
            "categories": {category: self.categories.get(category, 0) for category in get_args(Category)},
            "steps": self.steps,
        }


def joined(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """The report of a run that was stopped and went on: one over both of its parts.

    Peaks are the larger ones. What a peak consists of, and what was predicted for it, comes from the part that had it.

    Args:
        earlier: The memory report so far, as it lies in the checkpoint that the run went on from.
        later: The report of what came after.
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
