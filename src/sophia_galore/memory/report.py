"""The memory report of a run that was stopped and went on: one report over all of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PEAKS = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_process_bytes")


def joined(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """The report of two parts of a run.

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
