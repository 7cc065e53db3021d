"""`sophia-galore prepare-data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sophia_galore.cli.arguments import expanded
from sophia_galore.data.stdlib_docs import prepare_sample_data


def prepare_data(
    output: Annotated[Path, typer.Option("--output", callback=expanded, help="The file to write.")] = Path(
        "data/sample_data.json"
    ),
) -> None:
    """Write instruction examples made from the documentation of this Python's standard library."""
    report = prepare_sample_data(output)
    print(
        f"{report.num_examples} examples from the documentation of Python {report.python_version} in {report.path} "
        f"(SHA-256 {report.fingerprint[:16]}...)"
    )
