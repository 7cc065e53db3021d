"""`sophia-galore generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sophia_galore.config.schema import ModelConfig
from sophia_galore.engine.generate import stream_answer
from sophia_galore.model.source import resolve_model


def generate(
    model: Annotated[str, typer.Argument(help="A run's folder, a checkpoint, a model folder, a hub id or an alias.")],
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="For temperatures above 0.")] = 42,
) -> None:
    """Answer a question with a model, token by token."""
    folder = resolve_model(ModelConfig(name=model), typer.echo).folder
    stream_answer(Path(folder), prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
