"""The records of a run: `metrics.jsonl`, a line for each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from sophia_galore.model.disk import reason
from sophia_galore.records.durable import flush_folder


class MetricsLog:
    """Appends records to `metrics.jsonl`; each line is handed to the system before the next step begins.

    On a full disk, records are kept in memory and written as soon as there is room, so the run is not lost.

    Args:
        path: The file; None: records are only kept, for a process that writes none.
        up_to_step: When resuming, the step of the checkpoint: later lines will be written again and are
            dropped. None: a new file.
        say: Takes a sentence for the user.
    """

    def __init__(self, path: Path | None, up_to_step: int | None, say: Callable[[str], None] = lambda _: None) -> None:
        self.records: list[dict[str, Any]] = []
        self.problem: OSError | None = None
        """The error because of which the file lacks records; None: it has all."""
        self._path, self._say = path, say
        self._file: TextIO | None = None
        if path is None:
            return
        if up_to_step is not None and path.exists():
            self.records = self._read(path, up_to_step)
        self._write_all()

    def add(self, record: dict[str, Any]) -> None:
        """Append one record, which has at least a `step`."""
        self.records.append(record)
        if self._path is None:
            return
        try:
            if self.problem is None and self._file is not None:
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()
            else:
                self._write_all()
                self.problem = None
        except OSError as error:
            self._lag(error)

    def settle(self) -> None:
        """Wait until all records are on the disk; a checkpoint that is made then does not lack those before it."""
        if self._file is None or self.problem is not None:
            return
        try:
            os.fsync(self._file.fileno())
            if self._path is not None:
                flush_folder(self._path.parent)
        except OSError as error:
            self._lag(error)

    def close(self) -> None:
        """Close the file.

        Raises:
            OSError: There are records that it lacks, and there still is no room for them.
        """
        if self.problem is not None:
            self._write_all()
            self.problem = None
        if self._file is not None:
            self._file.close()

    def _read(self, path: Path, up_to_step: int) -> list[dict[str, Any]]:
        """Return the records of an earlier part of the run; say which lines are damaged."""
        found, damaged = [], []
        lines = path.read_bytes().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                damaged.append(number)
            elif record["step"] <= up_to_step:
                found.append(record)
        if damaged[:1] not in ([], [len(lines)]):  # the last one was cut by the end of the process
            more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
            self._say(f"Line {damaged[0]}{more} of {path} is damaged, so the records of the run will lack it.")
        return found

    def _lag(self, error: OSError) -> None:
        if self.problem is None:
            why = reason(error, self._path or Path())
            self._say(f"{self._path} lags behind: {why}. The run goes on; records follow as soon as they can.")
        self.problem = error

    def _write_all(self) -> None:
        assert self._path is not None
        # Written beside and renamed: a kill or a full disk in between leaves the old file.
        beside = self._path.with_suffix(".tmp")
        try:
            beside.write_text("".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8")
            beside.replace(self._path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise
        if self._file is not None:
            with suppress(OSError):  # what is left in its buffer has been written here
                self._file.close()
        self._file = self._path.open("a", encoding="utf-8")
