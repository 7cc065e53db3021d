"""`sophia-galore export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sophia_galore.cli.arguments import expanded, expanded_text
from sophia_galore.config.schema import LARGEST_BLOCK, ModelConfig
from sophia_galore.model.source import resolve_model
from sophia_galore.train.convert import convert_folder


def export(
    source: Annotated[
        str,
        typer.Argument(
            callback=expanded_text, help="A run's folder, a checkpoint, a model folder, a hub id or an alias."
        ),
    ],
    to: Annotated[Literal["int8", "bf16", "fp32", "fp16"], typer.Option(help="The format of the weights.")],
    output: Annotated[
        Path, typer.Option(callback=expanded, help="Folder to write; it must not exist yet, or be empty.")
    ],
    block_size: Annotated[
        int, typer.Option(min=0, max=LARGEST_BLOCK, help="For int8: weights of a row that share a scale; 0: all of it.")
    ] = 128,
) -> None:
    """Write a model in another format; of a checkpoint, a checkpoint that can be resumed in that format."""
    folder = resolve_model(ModelConfig(name=source), typer.echo).folder
    words = convert_folder(folder, output, to, block_size=block_size)
    typer.echo(words)
