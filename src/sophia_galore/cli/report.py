"""`sophia-galore report`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sophia_galore.cli.arguments import expanded, expanded_paths
from sophia_galore.cli.report_tables import show_report
from sophia_galore.report.comparison import compared, read_runs
from sophia_galore.report.write import write_report

DEFAULT_OUTPUT = Path("outputs/report")


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", callback=expanded_paths, help="Folders of runs, or of a comparison."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            callback=expanded,
            help="Folder for the report; left out: that of a single run or comparison, else outputs/report.",
        ),
    ] = None,
) -> None:
    """Report on runs that exist, finished or running, from their files alone."""
    words = ["sophia-galore", "report", *map(str, runs), *(["--output", str(output)] if output else [])]
    comparison = compared(read_runs(runs), command=shlex.join(words))
    console = Console(highlight=False, soft_wrap=True)
    show_report(console, comparison)
    files = write_report(comparison, output or (runs[0] if len(runs) == 1 else DEFAULT_OUTPUT))
    console.print("Report: " + ", ".join(map(str, files)), markup=False)
