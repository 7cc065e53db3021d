"""All checks, and their findings as one document without anybody's names in it."""

from __future__ import annotations

import getpass
import os
import platform
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from sophia_galore import __version__
from sophia_galore.doctor import machine, self_test
from sophia_galore.doctor.findings import Finding
from sophia_galore.records.schema import Number, Record

CHECKS = (*machine.CHECKS, *self_test.CHECKS)
"""The table of checks, in their order."""

# Not of a person.
_EVERYBODYS = {"", "root", "user", "users", "admin", "ubuntu", "runner", "home", "localhost"}


class DoctorReport(Record):
    """What `doctor --json` prints and `--output` writes.

    Args:
        version: The version of this program.
        made: When, in UTC, as ISO 8601.
        device: The device that was asked for.
        is_well: Whether nothing is wrong.
        took_s: Seconds in all.
        findings: One for each check, in their order.
    """

    version: str
    made: str
    device: str
    is_well: bool
    took_s: Number
    findings: tuple[Finding, ...]


def report_of(
    findings: Sequence[Finding], device_name: str, took_s: float, places: Sequence[Path] = ()
) -> DoctorReport:
    """Return the document, from which home folder, user name, host name and some folders are taken out.

    Args:
        findings: What was found.
        device_name: The device that was asked for.
        took_s: Seconds in all.
        places: Folders whose names are nobody's business.
    """
    hidden = personal([(str(path), "<folder>") for path in places if _is_below_root(path)])
    return DoctorReport(
        version=__version__,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        device=device_name,
        is_well=is_well(findings),
        took_s=round(took_s, 1),
        findings=tuple(_without(finding, hidden) for finding in findings),
    )


def is_well(findings: Sequence[Finding]) -> bool:
    """Whether nothing is wrong; what could not be tried is not."""
    return all(finding.status != "wrong" for finding in findings)


Hidden = Sequence[tuple[re.Pattern[str], str]]
"""What is replaced, and by what."""


def personal(places: Sequence[tuple[str, str]] = ()) -> Hidden:
    """Return patterns of what identifies a user, the longest first.

    Args:
        places: Further paths, with what replaces them.
    """
    homes = {path for home in _homes() for path in (home, home.resolve()) if _is_below_root(path)}
    paths = [*places, *((str(path), "~") for path in homes)]
    # The same path with the other kind of slashes, as some libraries write it on Windows.
    paths += [(text.replace("\\", "/"), word) for text, word in paths if "\\" in text]
    found = [(re.compile(re.escape(text) + r"(?![\w-])"), word) for text, word in sorted(paths, key=_longest) if text]
    names = [*((name, "<user>") for name in _users()), *((name, "<host>") for name in _hosts())]
    for name, word in sorted(names, key=_longest):
        if name.lower() not in _EVERYBODYS:
            found.append((re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE), word))
    return found


def hide(text: str, hidden: Hidden) -> str:
    """Return a text without what identifies a user."""
    for pattern, word in hidden:
        text = pattern.sub(word, text)
    return text


def _without(finding: Finding, hidden: Hidden) -> Finding:
    figures = {key: hide(value, hidden) if isinstance(value, str) else value for key, value in finding.figures.items()}
    words, remedy = hide(finding.words, hidden), hide(finding.remedy, hidden)
    return finding.model_copy(update={"words": words, "remedy": remedy, "figures": figures})


def _longest(named: tuple[str, str]) -> int:
    return -len(named[0])


def _is_below_root(path: Path) -> bool:
    # A pattern for a root would match every slash.
    return len(path.parts) > 1


def _homes() -> list[Path]:
    try:
        return [Path.home()]
    except RuntimeError:  # a user without one
        return []


def _users() -> set[str]:
    found = {os.environ.get(name, "") for name in ("USER", "USERNAME", "LOGNAME")} | {home.name for home in _homes()}
    with suppress(OSError, KeyError, ImportError):  # a number without a name, as in some containers
        found.add(getpass.getuser())
    return found


def _hosts() -> set[str]:
    names = {socket.gethostname(), platform.node()}
    return names | {name.partition(".")[0] for name in names}
