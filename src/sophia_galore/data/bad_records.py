"""Collect the records that can't be used, from reading to tokenising, so that one attempt shows all of them.

Only errors of single records are collected, which the user can repair or skip. An error of a whole file, of the
tokenizer or of the chat template is raised where it is found.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from sophia_galore.errors import DataError
from sophia_galore.records.run import BadRecord

SHOWN = 5
"""Number of records that a message lists."""

SKIP = "`data.on_bad_record: skip` leaves such records out, counts them and lists them in the run's folder."

Report = Callable[[str, DataError], None]
"""Called with the location of a record that can't be used, and the error."""


def stop_at_once(where: str, error: DataError) -> None:
    """Raise the first error: the default report."""
    raise error


class BadRecords:
    """The records that can't be used, and whether they stop the run.

    Args:
        policy: ``stop`` or ``skip``.
    """

    def __init__(self, policy: Literal["stop", "skip"] = "stop") -> None:
        self._skips = policy == "skip"
        self._found: dict[str, BadRecord] = {}

    @property
    def found(self) -> tuple[BadRecord, ...]:
        """All bad records so far, each location once: by file in the order found, then by position in the file."""
        files: dict[str, int] = {}
        for where in self._found:
            files.setdefault(_location(where)[0], len(files))

        def order(record: BadRecord) -> tuple[int, int]:
            file, number = _location(record.where)
            return files[file], number

        return tuple(sorted(self._found.values(), key=order))

    @property
    def num_found(self) -> int:
        """Number of bad records so far."""
        return len(self._found)

    @property
    def stops(self) -> bool:
        """Whether the run will stop because of bad records."""
        return bool(self._found) and not self._skips

    def report(self, where: str, error: DataError) -> None:
        """Add a record that can't be used.

        Args:
            where: Its location.
            error: What is wrong with it.
        """
        reason = error.cause.removeprefix(where).lstrip(": ")
        self._found.setdefault(where, BadRecord(where=where, reason=reason, remedy=error.remedy))

    def refuse(self, num_records: int, *, at_any_rate: bool = False) -> None:
        """Raise an error if there are bad records and the run must not skip them.

        Args:
            num_records: Number of records that were read, including the bad ones.
            at_any_rate: Also refuse under the policy ``skip``, because too few records remain.

        Raises:
            DataError: There are bad records and the policy is ``stop``, or all records are bad.
        """
        everything = at_any_rate or len(self._found) >= num_records
        if not self._found or (self._skips and not everything):
            return
        bad = self.found
        skip = "" if everything else f" {SKIP}"
        if len(bad) == 1:
            raise DataError(f"{bad[0].where}: {bad[0].reason}", f"{bad[0].remedy}{skip}".strip())
        lines = [f"{len(bad)} of {num_records} records can't be used:"]
        lines += [f"- {record.where}: {record.reason}" for record in bad[:SHOWN]]
        if len(bad) > SHOWN:
            lines.append(f"- and {len(bad) - SHOWN} more")
        remedies = {record.remedy for record in bad}
        remedy = remedies.pop() if len(remedies) == 1 else "Repair or remove them."
        raise DataError("\n".join(lines), f"{remedy}{skip}".strip())


def _location(where: str) -> tuple[str, int]:
    """Return the file and the number of the line or record in it."""
    found = re.fullmatch(r"(.*?)(?::|, record )(\d+)", where, re.DOTALL)
    return (found[1], int(found[2])) if found else (where, 0)
