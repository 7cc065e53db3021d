"""`sophia-galore compare`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.status import Status

from sophia_galore.cli.arguments import expanded, expanded_paths
from sophia_galore.cli.report import show_report
from sophia_galore.config.problems import show
from sophia_galore.errors import ArgumentError, UserError
from sophia_galore.experiment.children import Stopped, carry_out
from sophia_galore.experiment.design import Trial, design, differences, refuse_incomparable
from sophia_galore.records.files import PLAN
from sophia_galore.report.comparison import compare_runs
from sophia_galore.report.run import read_run
from sophia_galore.report.write import write_report

DEFAULT_OUTPUT = Path("outputs/compare")

# Beginnings of a run's lines that stay on the terminal; other lines are only shown while they are the latest.
_STAYS = ("eval loss", "Ended early", "The final model", "Waiting for", "Going on after", "Error: ")


def compare(
    words: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG... [KEY.PATH=VALUE]...", help="YAML files, then overrides for all of them."),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each configuration: training.seed and the next ones.")] = 1,
    output: Annotated[
        Path, typer.Option(callback=expanded, help="Folder for the runs and the report.")
    ] = DEFAULT_OUTPUT,
) -> int:
    """Run configurations on the same data and tokens, and report what each reached and took."""
    paths, overrides = _sorted(words)
    trials = design(paths, num_seeds=seeds, output=output, overrides=overrides)
    if len(trials) < 2:
        raise ArgumentError("One run is nothing to compare.", "Name two files, or use --seeds 2.")
    command = shlex.join(
        ["sophia-galore", "compare", *map(str, paths), "--seeds", str(seeds), "--output", str(output), *overrides]
    )
    console = Console(highlight=False, soft_wrap=True)
    _show_differences(console, trials)
    fingerprint = refuse_incomparable(trials)
    console.print(f"{len(trials)} runs on the same data ({fingerprint[:12]}), in {output}.", markup=False)
    failures: dict[str, str] = {}
    for number, trial in enumerate(trials, start=1):
        console.print(f"Run {number} of {len(trials)}: {trial.label}", style="bold", markup=False)
        status = console.status("begins")
        try:
            with status:
                reason = carry_out(trial, lambda line, status=status: _show_line(console, status, line))  # type: ignore[misc]
        except Stopped:
            console.print(f"Stopped in {trial.label}. Go on with: {command}", markup=False)
            return 0
        if reason:
            failures[trial.label] = reason
            console.print(f"{trial.label} failed: {reason}", style="bold red", markup=False)
            console.print(f"What it printed: {trial.log}", markup=False)
        # After each run, so that the report can be read while the others are running.
        _report(trials[:number], failures, command, output)
    files = _report(trials, failures, command, output, console)
    console.print("Report: " + ", ".join(map(str, files)), markup=False)
    return 1 if failures else 0


def _report(
    trials: list[Trial], failures: dict[str, str], command: str, output: Path, console: Console | None = None
) -> list[Path]:
    """Write the report on the runs so far; print it if a console is given."""
    began = [trial for trial in trials if (trial.folder / PLAN).exists()]
    if not began:
        if console is None:
            return []
        raise UserError("No run has begun, so there is nothing to report.", "What each printed is in its .log file.")
    runs = [read_run(trial.folder, name=trial.name, failure=failures.get(trial.label, "")) for trial in began]
    absent = {trial.label: failures[trial.label] for trial in trials if trial not in began and trial.label in failures}
    comparison = compare_runs(runs, command=command, failures=absent)
    if console is not None:
        show_report(console, comparison)
    return write_report(comparison, output)


def _sorted(words: list[str]) -> tuple[list[Path], list[str]]:
    """Split words into files and overrides; an override has "=" before any "/"."""
    overrides = [word for word in words if "=" in word and not set(word.partition("=")[0]) & set("/\\")]
    paths = expanded_paths([Path(word) for word in words if word not in overrides])
    if not paths:
        raise ArgumentError("No configuration is named.", "Name YAML files; `sophia-galore init` writes one.")
    return paths, overrides


def _show_differences(console: Console, trials: list[Trial]) -> None:
    if len({trial.name for trial in trials}) < 2:
        return
    found = differences(trials)
    console.print("What differs: " + ("" if found else "nothing."), markup=False)
    for key, values in found.items():
        names: dict[str, list[str]] = {}
        for name, value in values.items():
            names.setdefault(value if isinstance(value, str) else show(value), []).append(name)
        said = "; ".join(f"{value} in {', '.join(where)}" for value, where in names.items())
        console.print(f"  {key}: {said}", markup=False)


def _show_line(console: Console, status: Status, line: str) -> None:
    """Show a line that a run printed."""
    if line.startswith(_STAYS):
        console.print(f"  {line}", markup=False)
    elif line.startswith(("step ", "Probe step", "Loading")):
        status.update(line.replace("[", "\\["))
