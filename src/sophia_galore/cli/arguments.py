"""Arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sophia_galore.config import RunConfig, load_config

DEFAULT_CONFIG = Path("configs/galore_config.yaml")

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The run's YAML file.")]
OptimizerOption = Annotated[
    str | None, typer.Option("--optimizer", "-o", help="Short for optimizer.type=...: galore or adamw.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Override keys of the configuration.")
]


def read_config(path: Path, optimizer: str | None, overrides: list[str] | None) -> RunConfig:
    """The configuration that a command line asks for."""
    words = list(overrides or [])
    if optimizer is not None:
        words.append(f"optimizer.type={optimizer}")
    return load_config(path, words)
