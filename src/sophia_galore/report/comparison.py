"""Runs side by side, read from their folders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sophia_galore.errors import UserError
from sophia_galore.records import files
from sophia_galore.records.report import GroupNumbers, Report, RunNumbers, RunWarning
from sophia_galore.records.run import Environment
from sophia_galore.report.numbers import grouped, numbers_of
from sophia_galore.report.run import Run, read_run
from sophia_galore.report.warnings import warnings_of


@dataclass(frozen=True)
class Comparison:
    """Everything that a report of some runs says, as data.

    Args:
        runs: What was read.
        numbers: The numbers of each run.
        groups: The runs of one name over their seeds.
        warnings: Reasons not to believe the numbers as they stand.
        command: What the comparison was made by; "" for runs that were there.
    """

    runs: tuple[Run, ...]
    numbers: tuple[RunNumbers, ...]
    groups: tuple[GroupNumbers, ...]
    warnings: tuple[RunWarning, ...]
    command: str

    @property
    def environment(self) -> Environment:
        """Of the first run; if another run has another one, there is a warning."""
        return self.runs[0].environment

    @property
    def date(self) -> str:
        """When the first run was started, UTC."""
        return min((run.environment.started for run in self.runs if run.environment.started), default="")

    @property
    def data_fingerprint(self) -> str | None:
        """Of the data of all runs; None if they are not the same."""
        found = {run.plan.data_fingerprint for run in self.runs}
        return found.pop() if len(found) == 1 else None

    def report(self) -> Report:
        """As `report.json` has it."""
        return Report(
            runs=[
                {**numbers.to_json(), "folder": str(run.folder), "command": run.environment.command}
                for run, numbers in zip(self.runs, self.numbers, strict=True)
            ],
            summary=list(self.groups),
            warnings=list(self.warnings),
            machine=self.environment.machine.to_json(),
            versions=self.environment.versions,
            data_fingerprint=self.data_fingerprint,
            date=self.date,
            command=self.command,
        )


def compared(runs: Sequence[Run], *, command: str = "", failures: Mapping[str, str] | None = None) -> Comparison:
    """Put runs side by side.

    Args:
        runs: At least one.
        command: What the comparison was made by.
        failures: Why runs that left nothing to read failed, by their labels.
    """
    numbers = tuple(numbers_of(run) for run in runs)
    never_began = [
        RunWarning(kind="unfinished", runs=[label], message=f"{label}: failed before its first step: {reason}")
        for label, reason in (failures or {}).items()
    ]
    return Comparison(tuple(runs), numbers, tuple(grouped(numbers)), (*warnings_of(runs), *never_began), command)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read runs for a report.

    A run is called as its folder, without an ending such as `-seed42`, so that the runs of several seeds are one group;
    where two would be the same, as much of the path is added as tells them apart.

    Args:
        folders: Their folders; the output of a comparison stands for all of its runs.

    Raises:
        UserError: A folder is named twice, or is no run's.
    """
    found = [run for folder in folders for run in _runs_in(Path(folder))]
    whole = [folder.resolve() for folder in found]
    if len(set(whole)) < len(whole):
        twice = next(folder for place, folder in enumerate(whole) if folder in whole[:place])
        raise UserError(f"{twice} is named twice.", "Name each run once.")
    runs = [read_run(folder) for folder in found]
    deepest = max(len(folder.parts) for folder in whole)
    depth = 1
    while len({(_called(run, depth), run.seed) for run in runs}) < len(runs):
        depth += 1
        if depth > deepest:  # `a` and `a-seed42`, side by side: only the ending tells them apart
            return [replace(run, name=folder.name) for run, folder in zip(runs, whole, strict=True)]
    return [replace(run, name=_called(run, depth)) for run in runs]


def _runs_in(folder: Path) -> list[Path]:
    """The runs that a folder stands for: itself, or those of a comparison in the order in which they were begun."""
    if not (folder / files.RUNS).is_dir() or (folder / files.PLAN).exists():
        return [folder]
    found = [path for path in (folder / files.RUNS).iterdir() if (path / files.PLAN).exists()]
    found = [path for path in found if not re.search(r"\.previous-\d+$", path.name)]
    if not found:
        raise UserError(f"In {folder} no run has begun yet.", "Wait until one has, or name the folder of a run.")
    return sorted(found, key=lambda path: (_begun(path), path.name))


def _begun(folder: Path) -> str:
    """When a run was started, as a text that sorts by time; "" where that is not known."""
    path = folder / files.ENVIRONMENT
    return Environment.read(path).started if path.exists() else ""


def _called(run: Run, depth: int) -> str:
    return "/".join(run.folder.resolve().parts[-depth:]).removesuffix(f"-seed{run.seed}")
