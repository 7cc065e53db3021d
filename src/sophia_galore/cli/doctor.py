"""`sophia-galore doctor`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from sophia_galore.cli.arguments import expanded
from sophia_galore.cli.write_back import refuse_other_than_json, write_new
from sophia_galore.doctor.findings import Finding, Status, examine
from sophia_galore.doctor.report import CHECKS, is_well, report_of
from sophia_galore.doctor.subject import subject_of

RUNS = Path("outputs")
_LABELS: dict[Status, tuple[str, str]] = {
    "well": ("well   ", "green"),
    "wrong": ("WRONG  ", "bold red"),
    "skipped": ("skipped", "yellow"),
}


def doctor(
    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="What is tried; auto: a GPU if there is one.")
    ] = "auto",
    folder: Annotated[
        Path, typer.Option(callback=expanded, help="Where your runs go, which says which disk is tried.")
    ] = RUNS,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything that was found as JSON.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(callback=expanded, help="Also write it to this JSON file, for a bug report; names are left out."),
    ] = None,
) -> None:
    """Find out in a minute whether everything works on this machine: its facts, then tiny runs that are compared."""
    if output is not None:
        refuse_other_than_json(output)
    console = Console(highlight=False, soft_wrap=True)

    def told(finding: Finding) -> None:
        if not as_json:
            _show(console, finding)

    began_s = time.perf_counter()
    with subject_of(device, folder) as subject:
        findings = examine(CHECKS, subject, told)
        hidden = (subject.work, subject.runs.absolute(), Path.cwd())
    report = report_of(findings, device, time.perf_counter() - began_s, hidden).to_json()
    if output is not None:
        write_new(output, json.dumps(report, indent=2) + "\n")
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _sum_up(console, findings, report["took_s"], output)
    if not is_well(findings):
        raise typer.Exit(1)


def _show(console: Console, finding: Finding) -> None:
    label, style = _LABELS[finding.status]
    console.print(label, style=style, end=" ")
    console.print(f"{finding.title}: {finding.words}", markup=False)


def _sum_up(console: Console, findings: Sequence[Finding], took_s: float, output: Path | None) -> None:
    by_status = {status: [each for each in findings if each.status == status] for status in _LABELS}
    console.print()
    console.print(f"Well ({took_s:.0f} s): {_titles(by_status['well'])}.", markup=False)
    for finding in by_status["well"]:
        if finding.remedy:
            console.print(f"  {finding.title}: {finding.remedy}", markup=False)
    if by_status["skipped"]:
        console.print(f"Not tried: {_titles(by_status['skipped'])}.", markup=False)
    for finding in by_status["wrong"]:
        console.print(f"Wrong: {finding.title}. {finding.words}", style="bold red", markup=False)
        console.print(f"  What to do: {finding.remedy}", markup=False)
    if output is not None:
        console.print(f"Written, for a bug report: {output}", markup=False)
    elif by_status["wrong"]:
        console.print("For a bug report, write all of this to a file: --output doctor.json", markup=False)
    if any(finding.name == "cuda" and finding.status == "well" for finding in findings):
        console.print(
            "Few cards were tried so far. Please share the result, well or not: run it with --output doctor.json, and "
            "attach that file to an issue.",
            markup=False,
        )


def _titles(findings: Sequence[Finding]) -> str:
    return ", ".join(finding.title for finding in findings) or "nothing"
