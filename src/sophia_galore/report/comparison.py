"""Comparison of runs, read from their folders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sophia_galore.errors import UserError
from sophia_galore.records import files
from sophia_galore.records.report import GroupNumbers, Report, RunNumbers, RunWarning
from sophia_galore.records.run import Environment
from sophia_galore.report.numbers import group_by_name, run_numbers
from sophia_galore.report.run import Run, read_run
from sophia_galore.report.warnings import find_warnings


@dataclass(frozen=True)
class Comparison:
    """The contents of a report, as data.

    Args:
        runs: The runs.
        numbers: The numbers of each run.
        groups: The numbers of the runs of one name, over their seeds.
        warnings: Reasons to doubt the numbers.
        command: Command that made the comparison; "" if there is none.
    """

    runs: tuple[Run, ...]
    numbers: tuple[RunNumbers, ...]
    groups: tuple[GroupNumbers, ...]
    warnings: tuple[RunWarning, ...]
    command: str

    @property
    def environment(self) -> Environment:
        """Environment of the first run; if another run has a different one, there is a warning."""
        return self.runs[0].environment

    @property
    def date(self) -> str:
        """Start of the earliest run, UTC."""
        return min((run.environment.started for run in self.runs if run.environment.started), default="")

    @property
    def data_fingerprint(self) -> str | None:
        """Fingerprint of the data; None if the runs have different ones."""
        found = {run.plan.data_fingerprint for run in self.runs}
        return found.pop() if len(found) == 1 else None

    def report(self) -> Report:
        """Return the contents of `report.json`."""
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


def compare_runs(runs: Sequence[Run], *, command: str = "", failures: Mapping[str, str] | None = None) -> Comparison:
    """Compare runs.

    Args:
        runs: At least one.
        command: Command that made the comparison.
        failures: For each run without records, by label: why it failed.
    """
    numbers = tuple(run_numbers(run) for run in runs)
    never_began = [
        RunWarning(kind="unfinished", runs=[label], message=f"{label}: failed before its first step: {reason}")
        for label, reason in (failures or {}).items()
    ]
    return Comparison(
        tuple(runs), numbers, tuple(group_by_name(numbers)), (*find_warnings(runs), *never_began), command
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read runs for a report.

    A run is named after its folder, without an ending such as `-seed42`, so that the runs of several seeds form one
    group. If two runs would have the same name and seed, parent folders are added until the names differ.

    Args:
        folders: Folders of runs, or of comparisons, which stand for all of their runs.

    Raises:
        UserError: A folder is named twice or holds no run.
    """
    found = [run for folder in folders for run in _runs_in(Path(folder))]
    whole = [folder.resolve() for folder in found]
    if len(set(whole)) < len(whole):
        twice = next(folder for place, folder in enumerate(whole) if folder in whole[:place])
        raise UserError(f"{twice} is named twice.", "Name each run once.")
    runs = [read_run(folder) for folder in found]
    deepest = max(len(folder.parts) for folder in whole)
    depth = 1
    while len({(_name(run, depth), run.seed) for run in runs}) < len(runs):
        depth += 1
        if depth > deepest:  # such as `a` and `a-seed42` in one folder: their whole names differ
            return [replace(run, name=folder.name) for run, folder in zip(runs, whole, strict=True)]
    return [replace(run, name=_name(run, depth)) for run in runs]


def _runs_in(folder: Path) -> list[Path]:
    """Return the folder itself or, of a comparison, its runs in the order of their start."""
    if not (folder / files.RUNS).is_dir() or (folder / files.PLAN).exists():
        return [folder]
    found = [
        path
        for path in (folder / files.RUNS).iterdir()
        if (path / files.PLAN).exists() and not re.search(r"\.previous-\d+$", path.name)
    ]
    if not found:
        raise UserError(f"No run has started in {folder} yet.", "Wait for the first, or name the folder of a run.")
    return sorted(found, key=lambda path: (_start_time(path), path.name))


def _start_time(folder: Path) -> str:
    """Return when a run was started, as text that sorts by time; "" if unknown."""
    environment = Environment.find(folder / files.ENVIRONMENT)
    return environment.started if environment else ""


def _name(run: Run, depth: int) -> str:
    return "/".join(run.folder.resolve().parts[-depth:]).removesuffix(f"-seed{run.seed}")
