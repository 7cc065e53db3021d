"""A report on the terminal: the page's finding, warnings and first tables."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from sophia_galore.report import document
from sophia_galore.report.comparison import Comparison
from sophia_galore.report.sections import document_of

_SHOWN = ("Eval loss", "Memory", "Time")


def show_report(console: Console, comparison: Comparison) -> None:
    """Print what was found; everything else is in the files.

    Args:
        console: Where to.
        comparison: The runs.
    """
    page = document_of(comparison)
    tables = [
        part
        for section in page.sections
        if section.heading in _SHOWN
        for part in section.parts
        if isinstance(part, document.Table)
    ]
    for table in tables:
        console.print(_table(table))
    for part in page.opening:
        if isinstance(part, document.Points):
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
