"""`sophia-galore push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sophia_galore.cli.arguments import expanded
from sophia_galore.model.cache import format_bytes
from sophia_galore.model.hub_push import files_to_push, push, refuse_hub_id
from sophia_galore.train.trained import refuse_unfinished


def push_model(
    folder: Annotated[
        Path, typer.Argument(callback=expanded, help="A finished run's folder, a checkpoint or what `export` wrote.")
    ],
    hub_id: Annotated[str, typer.Argument(help="Where to: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Nobody else may see it.")] = False,
) -> None:
    """Upload a model to the Hugging Face hub: its model files, none of the run's records."""
    refuse_hub_id(hub_id)
    refuse_unfinished(folder)
    files = files_to_push(folder)
    typer.echo(f"To {hub_id}{', private' if private else ''}:")
    for file in files:
        typer.echo(f"  {file.name}  {format_bytes(file.stat().st_size)}")
    typer.echo(push(folder, files, hub_id, private=private))
