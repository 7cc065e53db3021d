"""`sophia-galore prepare-data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sophia_galore.cli.arguments import expanded
from sophia_galore.data.stdlib_docs import prepare_sample_data
from sophia_galore.data.stdlib_text import prepare_corpus


def prepare_data(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", callback=expanded, help="The file to write; default data/sample_data.json or data/corpus.txt."
        ),
    ] = None,
    corpus: Annotated[
        bool, typer.Option("--corpus", help="Write running text for pre-training instead: the library's source.")
    ] = False,
) -> None:
    """Write instruction examples made from the documentation of this Python's standard library."""
    if corpus:
        text = prepare_corpus(output or Path("data/corpus.txt"))
        print(
            f"{text.num_files} source files of Python {text.python_version}, {text.num_bytes / 1e6:.1f} MB, in "
            f"{text.path} (SHA-256 {text.fingerprint[:16]}...)"
        )
        return
    report = prepare_sample_data(output or Path("data/sample_data.json"))
    print(
        f"{report.num_examples} examples from the documentation of Python {report.python_version} in {report.path} "
        f"(SHA-256 {report.fingerprint[:16]}...)"
    )
