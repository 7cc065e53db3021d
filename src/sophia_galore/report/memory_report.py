"""Where the memory of a run went, read back from `memory_report.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sophia_galore.errors import UserError
from sophia_galore.report.json_fields import optional_bytes, optional_number, sizes, whole_number
from sophia_galore.report.timeline import Timeline, timeline_of

MEMORY_FILE = "memory_report.json"


@dataclass(frozen=True)
class MemoryStep:
    """Peaks of one step in bytes; None where it was not measured."""

    step: int
    allocated_bytes: int | None
    reserved_bytes: int | None
    process_bytes: int | None


@dataclass(frozen=True)
class MemoryReport:
    """The memory of a run.

    Args:
        device: What it ran on; "" if unknown.
        measured_by: How it was measured; "" if unknown.
        peak_allocated_bytes: Most bytes of live tensors at once.
        peak_reserved_bytes: Most bytes that the allocator held.
        peak_process_bytes: Largest resident size of the process.
        phases: Peak within each phase, in bytes.
        categories: What the peak consists of, in bytes.
        steps: Peaks of single steps.
        limit_bytes: What the run may take; None without a limit.
        predicted_peak_bytes: The peak that was predicted before the run; None where it was not.
        predicted_ratio: Predicted over measured; None where one of them is missing.
        timeline: One step from moment to moment; None where it was not followed.
    """

    device: str
    measured_by: str
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    peak_process_bytes: int | None
    phases: dict[str, int]
    categories: dict[str, int]
    steps: tuple[MemoryStep, ...]
    limit_bytes: int | None
    predicted_peak_bytes: int | None
    predicted_ratio: float | None
    timeline: Timeline | None


def read_memory_report(run_dir: Path) -> MemoryReport:
    """Reads the memory report of a run.

    Args:
        run_dir: Folder of the run.

    Raises:
        UserError: If the report is missing or is none.
    """
    path = Path(run_dir) / MEMORY_FILE
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path} can't be read", "It is written by a run; name the folder of one.") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}", "Run again, or restore the file.") from None
    if not isinstance(record, dict):
        raise UserError(f"{path} is not a memory report", "Run again, or restore the file.")
    where = path.name
    return MemoryReport(
        device=str(record.get("device") or ""),
        measured_by=str(record.get("measured_by") or ""),
        peak_allocated_bytes=optional_bytes(record, "peak_allocated_bytes", where),
        peak_reserved_bytes=optional_bytes(record, "peak_reserved_bytes", where),
        peak_process_bytes=optional_bytes(record, "peak_process_bytes", where),
        phases=sizes(record, "phases", where),
        categories=sizes(record, "categories", where),
        steps=_steps(record.get("steps"), f"{where}: steps"),
        limit_bytes=optional_bytes(record, "limit_bytes", where),
        predicted_peak_bytes=optional_bytes(record, "predicted_peak_bytes", where),
        predicted_ratio=optional_number(record, "predicted_ratio", where),
        timeline=timeline_of(record.get("timeline"), f"{where}: timeline"),
    )


def _steps(records: Any, where: str) -> tuple[MemoryStep, ...]:
    if records is None:
        return ()
    if not isinstance(records, list):
        raise UserError(f"{where}: {records!r} is not a list", "Run again, or restore the file.")
    return tuple(_step(record, where) for record in records)


def _step(record: Any, where: str) -> MemoryStep:
    if not isinstance(record, dict):
        raise UserError(f"{where}: {record!r} is not an object", "Run again, or restore the file.")
    return MemoryStep(
        step=whole_number(record, "step", where),
        allocated_bytes=optional_bytes(record, "allocated_bytes", where),
        reserved_bytes=optional_bytes(record, "reserved_bytes", where),
        process_bytes=optional_bytes(record, "process_bytes", where),
    )
