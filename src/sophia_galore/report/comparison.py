"""Runs side by side, read from their folders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sophia_galore.errors import UserError
from sophia_galore.report.doubts import Doubt, doubts
from sophia_galore.report.result import Result, result_of
from sophia_galore.report.run import PLAN_FILE, Run, begun, read_run
from sophia_galore.report.summary import Group, summary

RUNS = "runs"
"""Where the runs of a comparison lie, in its folder."""


@dataclass(frozen=True)
class Comparison:
    """Everything that a report of some runs says, as data.

    Args:
        runs: What was read.
        results: The numbers of each run.
        groups: The runs of one name over their seeds.
        doubts: What speaks against believing the numbers.
        command: What the comparison was made by; "" for runs that were there.
    """

    runs: tuple[Run, ...]
    results: tuple[Result, ...]
    groups: tuple[Group, ...]
    doubts: tuple[Doubt, ...]
    command: str

    @property
    def machine(self) -> dict[str, Any]:
        """Of the first run; another one's is a doubt."""
        return dict(self.runs[0].environment.get("machine") or {})

    @property
    def versions(self) -> dict[str, str]:
        """Of the first run; another one's are a doubt."""
        return dict(self.runs[0].environment.get("versions") or {})

    @property
    def date(self) -> str:
        """When the first run was started, UTC."""
        return min((str(run.environment["started"]) for run in self.runs if run.environment.get("started")), default="")

    @property
    def run_commands(self) -> tuple[str, ...]:
        """What the runs were made by."""
        return tuple(str(run.environment["command"]) for run in self.runs if run.environment.get("command"))

    @property
    def data_fingerprint(self) -> str | None:
        """Of the data of all runs; None if they are not the same."""
        found = {str(run.plan["data_fingerprint"]) for run in self.runs}
        return found.pop() if len(found) == 1 else None

    def to_json(self) -> dict[str, Any]:
        """As plain data, for `report.json`."""
        return {
            "runs": [
                {**result.to_json(), "folder": str(run.folder), "command": run.environment.get("command", "")}
                for run, result in zip(self.runs, self.results, strict=True)
            ],
            "summary": [group.to_json() for group in self.groups],
            "warnings": [doubt.to_json() for doubt in self.doubts],
            "machine": self.machine,
            "versions": self.versions,
            "data_fingerprint": self.data_fingerprint,
            "date": self.date,
            "command": self.command,
        }


def compared(runs: Sequence[Run], *, command: str = "", failures: Mapping[str, str] | None = None) -> Comparison:
    """Put runs side by side.

    Args:
        runs: At least one.
        command: What the comparison was made by.
        failures: Why runs that left nothing to read failed, by their labels.
    """
    results = tuple(result_of(run) for run in runs)
    never_began = [
        Doubt("unfinished", (name,), f"{name}: failed before its first step: {reason}")
        for name, reason in (failures or {}).items()
    ]
    return Comparison(tuple(runs), results, tuple(summary(results)), (*doubts(runs), *never_began), command)


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


def holds_runs(folder: Path) -> bool:
    """Whether it is the output of a comparison."""
    return (folder / RUNS).is_dir() and not (folder / PLAN_FILE).exists()


def _runs_in(folder: Path) -> list[Path]:
    """The runs that a folder stands for: itself, or those of a comparison in the order in which they were begun."""
    if not holds_runs(folder):
        return [folder]
    found = [path for path in (folder / RUNS).iterdir() if (path / PLAN_FILE).exists()]
    found = [path for path in found if not re.search(r"\.previous-\d+$", path.name)]
    if not found:
        raise UserError(f"In {folder} no run has begun yet.", "Wait until one has, or name the folder of a run.")
    return sorted(found, key=lambda path: (begun(path), path.name))


def _called(run: Run, depth: int) -> str:
    return "/".join(run.folder.resolve().parts[-depth:]).removesuffix(f"-seed{run.seed}")
