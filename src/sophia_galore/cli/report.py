"""`sophia-galore report`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from sophia_galore.cli.arguments import expanded, expanded_paths
from sophia_galore.report import document
from sophia_galore.report.comparison import Comparison, compare_runs, read_runs
from sophia_galore.report.sections import build_document
from sophia_galore.report.write import write_report

DEFAULT_OUTPUT = Path("outputs/report")

_SHOWN = ("Eval loss", "Memory", "Time")
"""Sections whose tables are shown on the terminal."""


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
    comparison = compare_runs(read_runs(runs), command=shlex.join(words))
    console = Console(highlight=False, soft_wrap=True)
    show_report(console, comparison)
    files = write_report(comparison, output or (runs[0] if len(runs) == 1 else DEFAULT_OUTPUT))
    console.print("Report: " + ", ".join(map(str, files)), markup=False)


def show_report(console: Console, comparison: Comparison) -> None:
    """Print the finding, the warnings and the main tables of a report.

    Args:
        console: The console.
        comparison: The runs.
    """
    page = build_document(comparison)
    for section in page.sections:
        for part in section.parts:
            if section.heading in _SHOWN and isinstance(part, document.Table):
                console.print(_table(part))
    for part in page.opening:
        if isinstance(part, document.Bullets):
            for item in part.items:
                console.print(f"Warning: {item}", style="bold yellow", markup=False)
        elif isinstance(part, document.Paragraph):
            console.print(part.text, style="bold", markup=False)


def _table(table: document.Table) -> Table:
    shown = Table(box=box.SIMPLE_HEAD)
    for place, column in enumerate(table.columns):
        if place == 0:
            shown.add_column(column, overflow="fold")
        else:  # a heading may be broken, a number not
            shown.add_column(column, justify="right", min_width=max(len(row[place]) for row in table.rows))
    for row in table.rows:
        shown.add_row(*(cell.replace("[", "\\[") for cell in row))
    return shown
