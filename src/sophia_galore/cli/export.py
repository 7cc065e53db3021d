"""`sophia-galore export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sophia_galore.cli.arguments import expanded, expanded_text
from sophia_galore.config.schema import LARGEST_BLOCK, ModelConfig
from sophia_galore.errors import ArgumentError
from sophia_galore.model.source import resolve_model
from sophia_galore.train.convert import convert_folder
from sophia_galore.train.to_gguf import export_gguf


def export(
    source: Annotated[
        str,
        typer.Argument(
            callback=expanded_text, help="A run's folder, a checkpoint, a model folder, a hub id or an alias."
        ),
    ],
    to: Annotated[
        Literal["int8", "bf16", "fp32", "fp16", "gguf"],
        typer.Option(help="The format of the weights; gguf: a file for llama.cpp, Ollama, LM Studio."),
    ],
    output: Annotated[
        Path, typer.Option(callback=expanded, help="Folder to write; it must not exist yet, or be empty.")
    ],
    block_size: Annotated[
        int, typer.Option(min=0, max=LARGEST_BLOCK, help="For int8: weights of a row that share a scale; 0: all of it.")
    ] = 128,
    type_: Annotated[
        Literal["f16", "bf16", "q8_0"] | None, typer.Option("--type", help="For gguf: the format inside; default: f16.")
    ] = None,
    converter: Annotated[
        str | None,
        typer.Option(
            callback=expanded_text,
            help="For gguf: llama.cpp's converter; default: $CONVERT_HF_TO_GGUF, or what is on the PATH.",
        ),
    ] = None,
) -> None:
    """Write a model in another format; of a checkpoint, a checkpoint that can be resumed in that format."""
    if to != "gguf" and (type_ or converter):
        raise ArgumentError("--type and --converter are for --to gguf.", "Leave them out, or take --to gguf.")
    folder = resolve_model(ModelConfig(name=source), typer.echo).folder
    if to == "gguf":
        title = output.absolute().name
        words = export_gguf(folder, output, type_ or "f16", title=title, converter=converter, say=typer.echo)
    else:
        words = convert_folder(folder, output, to, block_size=block_size)
    typer.echo(words)
