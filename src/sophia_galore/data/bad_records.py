"""Records that can't be used: collected from reading to rendering, so that one attempt shows all of them.

A single broken record is the user's to mend or to leave out. What is wrong with a whole file, with the model's
tokenizer or with its chat template is not: such errors are raised where they are found and never come here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from sophia_galore.errors import DataError
from sophia_galore.records.run import BadRecord

SHOWN = 5
"""Places that a message names."""

SKIP = "`data.on_bad_record: skip` leaves such records out, counts them and lists them in the run's folder."

Report = Callable[[str, DataError], None]
"""Takes the place of a record that can't be used, and why."""


def stop_at_once(where: str, error: DataError) -> None:
    """The report of those who want the first error as it is."""
    raise error


class BadRecords:
    """Collects them, and stops or goes on as it was asked to.

    Args:
        policy: ``stop`` or ``skip``.
    """

    def __init__(self, policy: Literal["stop", "skip"] = "stop") -> None:
        self._skips = policy == "skip"
        self._found: dict[str, BadRecord] = {}

    @property
    def found(self) -> tuple[BadRecord, ...]:
        """All of them so far, file by file in the order in which something was found there; each place once."""
        files: dict[str, int] = {}
        for where in self._found:
            files.setdefault(_place(where)[0], len(files))

        def order(record: BadRecord) -> tuple[int, int]:
            file, number = _place(record.where)
            return files[file], number

        return tuple(sorted(self._found.values(), key=order))

    @property
    def num_found(self) -> int:
        """How many there are so far."""
        return len(self._found)

    @property
    def stops(self) -> bool:
        """Whether the run is going to be stopped because of them."""
        return bool(self._found) and not self._skips

    def report(self, where: str, error: DataError) -> None:
        """Takes a record that can't be used.

        Args:
            where: Its place.
            error: Why.
        """
        reason = error.cause.removeprefix(where).lstrip(": ")
        self._found.setdefault(where, BadRecord(where=where, reason=reason, remedy=error.remedy))

    def refuse(self, num_records: int, *, at_any_rate: bool = False) -> None:
        """Does nothing if there are none, or if they are to be left out and others are there.

        Args:
            num_records: Records that were read, with the bad ones.
            at_any_rate: Refuse even if they are to be left out, since what is left does not suffice.

        Raises:
            DataError: Some were found and the run is to stop; or nothing but such records was.
        """
        everything = at_any_rate or len(self._found) >= num_records
        if not self._found or (self._skips and not everything):
            return
        bad = self.found
        skip = "" if everything else f" {SKIP}"
        if len(bad) == 1:
            raise DataError(_sentence(bad[0]), f"{bad[0].remedy}{skip}".strip())
        lines = [f"{len(bad)} of {num_records} records can't be used:"]
        lines += [f"- {_sentence(record)}" for record in bad[:SHOWN]]
        if len(bad) > SHOWN:
            lines.append(f"- and {len(bad) - SHOWN} more")
        remedies = {record.remedy for record in bad}
        remedy = remedies.pop() if len(remedies) == 1 else "Repair or remove them."
        raise DataError("\n".join(lines), f"{remedy}{skip}".strip())


def _place(where: str) -> tuple[str, int]:
    """The file and the number of the line or record in it."""
    found = re.fullmatch(r"(.*?)(?::|, record )(\d+)", where, re.DOTALL)
    return (found[1], int(found[2])) if found else (where, 0)


def _sentence(record: BadRecord) -> str:
    return f"{record.where}: {record.reason}"
