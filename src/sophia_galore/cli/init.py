"""`sophia-galore init`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from sophia_galore.cli.arguments import STARTER, expanded
from sophia_galore.cli.write_back import write_new
from sophia_galore.config.load import load_config
from sophia_galore.config.paths import expand
from sophia_galore.config.size import bytes_in_words, parse_size
from sophia_galore.config.starter import formats_for, starter
from sophia_galore.errors import ArgumentError
from sophia_galore.model.aliases import DEFAULT_ALIAS, find_alias
from sophia_galore.model.specifications import find_specification

_SAMPLE_DATA = "data/sample_data.json"


def init(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Hub id, folder, GGUF file or alias (`download --list` shows these)."),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Data file, folder, or hub dataset id.")] = None,
    memory: Annotated[str | None, typer.Option(help="The memory that there is, such as 4GiB; none: no limit.")] = None,
    output: Annotated[Path, typer.Option("--output", callback=expanded, help="The file to write.")] = STARTER,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if there is one.")] = False,
) -> None:
    """Write a configuration to begin with, with a comment on every line; asks for what is not given."""
    if output.exists() and not force:
        raise ArgumentError(f"{output} exists already.", "Give another name with --output, or replace it with --force.")
    model = model or _ask("Model (hub id, folder, GGUF file or alias)", DEFAULT_ALIAS)
    data = data or _ask("Training data (file, folder or hub dataset id)", _SAMPLE_DATA)
    memory = memory or _ask("Memory that there is, such as 4GiB", "none")
    memory_bytes = None if memory.strip().lower() == "none" else parse_size(memory, name="--memory")
    model, data = expand(model), expand(data)
    alias = find_alias(model)
    known = find_specification(alias.hf if alias else model)
    formats = formats_for(memory_bytes, known.num_parameters if known else None)
    words = ["sophia-galore", "init", "--model", model, "--data", data]
    words += ["--memory", memory] if memory_bytes is not None else []
    name = shlex.quote(str(output))
    text = starter(
        model=model,
        data=data,
        memory_bytes=memory_bytes,
        formats=formats,
        command=shlex.join(words),
        name=name,
    )
    write_new(output, text)
    load_config(output)
    print(f"Written: {output}. Weights will be kept in {formats.why}.")
    if memory_bytes is not None:
        print(f"The limit of {bytes_in_words(memory_bytes)} was not tried: sophia-galore plan --config {name} --fit")
    if data == _SAMPLE_DATA and not Path(data).exists():
        print(f"{data} is not there yet: sophia-galore prepare-data makes it.")
    print(f"Train with: sophia-galore train --config {name}")


def _ask(question: str, default: str) -> str:
    """What the user answers; the default where nobody can be asked."""
    if not (sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()):
        return default
    print(f"{question} [{default}]: ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip() or default
