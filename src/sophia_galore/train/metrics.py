"""The records of a run: `metrics.jsonl`, a line for each."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from sophia_galore.model.disk import reason


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
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    break  # a line cut by the end of the process: the last one
                if record["step"] <= up_to_step:
                    self.records.append(record)
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
            if self.problem is None:
                why = reason(error, self._path)
                self._say(f"{self._path} lags behind: {why}. The run goes on; records follow as soon as they can.")
            self.problem = error

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
