"""A check and what it finds.

A check is a small function of the subject. What it raises is a finding too, with its cause: whoever asks what is wrong
with a machine must not be answered by a traceback.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from sophia_galore.doctor.subject import Subject
from sophia_galore.doctor.trials import FailedBefore
from sophia_galore.errors import SophiaGaloreError, short
from sophia_galore.records.schema import Number, Record

Status = Literal["well", "wrong", "skipped"]
Figure = bool | int | float | str | None
"""A measured value; None: it could not be found out."""

_SOURCE = Path(__file__).resolve().parents[1]
_UNEXPECTED = (
    "Write the result to a file with --output, and attach it to an issue; with this cause it is a fault that we want "
    "to know of."
)


@dataclass(frozen=True)
class Outcome:
    """What a check found.

    Args:
        status: Whether it is well, wrong, or could not be tried here.
        words: What was found, in sentences; why, if it was not tried.
        remedy: What to do about it; of what is well, what could be better.
        figures: The measured values by name, with units in the names.
    """

    status: Status
    words: str
    remedy: str = ""
    figures: Mapping[str, Figure] = field(default_factory=dict)


def well(words: str, remedy: str = "", *, figures: Mapping[str, Figure] | None = None) -> Outcome:
    """Return that something works."""
    return Outcome("well", words, remedy, figures or {})


def wrong(words: str, remedy: str, *, figures: Mapping[str, Figure] | None = None) -> Outcome:
    """Return that something does not work, and what to do about it."""
    return Outcome("wrong", words, remedy, figures or {})


def skipped(reason: str) -> Outcome:
    """Return that something can't be tried here."""
    return Outcome("skipped", reason)


@dataclass(frozen=True)
class Check:
    """One row of the table of checks.

    Args:
        name: Its name, in files and tests.
        title: What it is about, for people.
        look: Finds out.
        needs_device: Whether it computes on the chosen device, so that it can't be tried without one.
    """

    name: str
    title: str
    look: Callable[[Subject], Outcome]
    needs_device: bool = True


class Finding(Record):
    """What became of a check.

    Args:
        name: The check's name.
        title: What it is about.
        status: As in `Outcome`.
        words: As in `Outcome`.
        remedy: As in `Outcome`.
        figures: As in `Outcome`.
        raised: Where in our source an unexpected error was raised, outermost first.
        took_s: Seconds that the check took.
    """

    name: str
    title: str
    status: Status
    words: str
    remedy: str = ""
    figures: dict[str, Figure] = Field(default_factory=dict)
    raised: tuple[str, ...] = ()
    took_s: Number = 0.0


def examine(
    checks: Iterable[Check], subject: Subject, told: Callable[[Finding], object] = lambda finding: None
) -> list[Finding]:
    """Carry out checks in their order.

    Args:
        checks: The checks.
        subject: What is examined.
        told: Called with each finding as soon as there is one.

    Returns:
        A finding for each check.
    """
    found: list[Finding] = []
    for check in checks:
        finding = look(check, subject)
        found.append(finding)
        told(finding)
    return found


def look(check: Check, subject: Subject) -> Finding:
    """Carry out one check; only Ctrl-C gets out of it."""
    began_s = time.perf_counter()
    raised: tuple[str, ...] = ()
    try:
        if check.needs_device and not subject.has_device:
            outcome = skipped(f"The device {subject.device_name} can't be used, as is said above.")
        else:
            outcome = check.look(subject)
    except FailedBefore as error:
        outcome = skipped(str(error))
    except SophiaGaloreError as error:
        outcome = wrong(error.cause, error.remedy or _UNEXPECTED)
    except Exception as error:  # whatever it is, the other checks go on
        outcome = wrong(f"It failed with {type(error).__name__}: {short(error)}.", _UNEXPECTED)
        raised = _places(error)
    return Finding(
        name=check.name,
        title=check.title,
        status=outcome.status,
        words=outcome.words,
        remedy=outcome.remedy,
        figures=dict(outcome.figures),
        raised=raised,
        took_s=round(time.perf_counter() - began_s, 2),
    )


def _places(error: BaseException) -> tuple[str, ...]:
    """Return the lines of our source through which an error went; nobody's folders are in them."""
    places: list[str] = []
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if path.is_relative_to(_SOURCE):
            places.append(f"{path.relative_to(_SOURCE).as_posix()}:{frame.lineno} {frame.name}")
    return tuple(places)
