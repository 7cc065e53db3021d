"""Whether anything else used the processor while something was measured."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil

DISTURBED_SHARE = 0.05
"""Of all processors' time: if others used more, the measurement was disturbed, and its times are not published."""


@dataclass(frozen=True)
class CpuTimes:
    """Seconds since some beginning.

    Args:
        wall: On the clock.
        used: By all processes on all processors, and what a virtual machine's host took for others.
        own: By this process and those of its children that have ended and were waited for.
    """

    wall: float
    used: float
    own: float


def cpu_times() -> CpuTimes:
    """Read the clocks now. Call it before a measurement and after all child processes have ended."""
    found, own = psutil.cpu_times(), os.times()
    used = sum(getattr(found, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
    return CpuTimes(time.monotonic(), used, sum(own[:4]))


def others_share(begun: CpuTimes, ended: CpuTimes, processors: int | None = None) -> float:
    """Return the share of all processors' time that others used between two readings.

    Args:
        begun: The first reading.
        ended: The second one.
        processors: How many there are; None: those of this machine.

    Returns:
        From 0 to 1.
    """
    whole = (ended.wall - begun.wall) * (processors or os.cpu_count() or 1)
    others = (ended.used - begun.used) - (ended.own - begun.own)
    return min(1.0, max(0.0, others / whole)) if whole > 0 else 0.0


def quietness(begun: CpuTimes) -> dict[str, Any]:
    """Return what a line of results says of the time since a reading: `others_cpu`, and `disturbed` where it is."""
    share = others_share(begun, cpu_times())
    return {"others_cpu": round(share, 3), **({"disturbed": True} if share > DISTURBED_SHARE else {})}


def is_disturbed(line: Mapping[str, Any]) -> bool:
    """Whether a line's times are not to be published."""
    return bool(line.get("disturbed", False))


def warn_if_busy(seconds: float = 1.0) -> None:
    """Look for a moment before a measurement, and say so if something else runs."""
    begun = cpu_times()
    time.sleep(seconds)
    share = others_share(begun, cpu_times())
    if share > DISTURBED_SHARE:
        print(f"Something else uses {share:.0%} of the processors: times will be disturbed.", file=sys.stderr)
