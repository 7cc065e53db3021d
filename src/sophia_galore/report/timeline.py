"""Moments of one optimizer step: what was allocated at each of them, and what for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from sophia_galore.errors import UserError
from sophia_galore.report.json_fields import FOREIGN, number, sizes, whole_number


@dataclass(frozen=True)
class Moment:
    """A moment of a step.

    Args:
        time_s: Seconds since the step began; None where it was planned and not measured.
        phase: What the engine was doing; "" if unknown.
        categories: What was allocated, in bytes.
    """

    time_s: float | None
    phase: str
    categories: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """Everything that was allocated."""
        return sum(self.categories.values())


@dataclass(frozen=True)
class Timeline:
    """The course of memory over one step.

    Args:
        step: Its number, counted from 1; None if it is no step in particular.
        moments: In order of time; every one has a time or none has.
    """

    step: int | None
    moments: tuple[Moment, ...]

    @property
    def timed(self) -> bool:
        """Whether it is known when the moments were."""
        return bool(self.moments) and self.moments[0].time_s is not None

    @property
    def peak_bytes(self) -> int:
        """The largest total of a moment; 0 without moments."""
        return max((moment.total_bytes for moment in self.moments), default=0)


def timeline_of(record: Any, where: str) -> Timeline | None:
    """A timeline out of plain data.

    Args:
        record: `{"step": 2, "points": [{"time_s": 0.0, "phase": "forward", "categories": {"weights": 5}}, ...]}`,
            without `time_s` where it was planned; None if there is none.
        where: "memory_report.json: timeline", for the message.

    Returns:
        The timeline; None where there is none, or nothing was allocated in it.

    Raises:
        UserError: If it is something else.
    """
    if record is None:
        return None
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: {record!r} is not an object", FOREIGN)
    points = record.get("points")
    if points is None:
        return None
    if not isinstance(points, list | tuple):
        raise UserError(f"{where}: 'points' is not a list", FOREIGN)
    moments = tuple(_moment(point, f"{where}: point {index}") for index, point in enumerate(points))
    if len({moment.time_s is None for moment in moments}) == 2:
        raise UserError(f"{where}: some points have a 'time_s' and some have none", FOREIGN)
    step = None if record.get("step") is None else whole_number(dict(record), "step", where)
    found = Timeline(step, moments)
    return found if found.peak_bytes else None


def _moment(point: Any, where: str) -> Moment:
    if not isinstance(point, Mapping):
        raise UserError(f"{where}: {point!r} is not an object", FOREIGN)
    fields = dict(point)
    time_s = None if fields.get("time_s") is None else number(fields, "time_s", where)
    if time_s is not None and not isfinite(time_s):
        raise UserError(f"{where}: 'time_s' is {time_s!r}, not a time", FOREIGN)
    categories = sizes(fields, "categories", where)
    for name, size in categories.items():
        if size < 0:
            raise UserError(f"{where}: '{name}' is {size}, but no size is negative", FOREIGN)
    return Moment(time_s, str(fields.get("phase") or ""), categories)
