"""Arguments that several commands take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from sophia_galore.config import RunConfig, load_config
from sophia_galore.errors import ArgumentError

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
    return load_config(path, given_overrides({"optimizer.type": optimizer}, overrides))


def given_overrides(short: Mapping[str, str | None], overrides: list[str] | None) -> list[str]:
    """The overrides of a command line, those that have an option of their own among them.

    Args:
        short: Values of such options by the key that they are short for; None: not given.
        overrides: KEY.PATH=VALUE words.

    Raises:
        ArgumentError: An option and a word say different things about the same key.
    """
    words = list(overrides or [])
    for key, value in short.items():
        if value is None:
            continue
        for word in words:
            name, _, other = word.partition("=")
            if name == key and other != value:
                raise ArgumentError(f"{word} contradicts the option that says {key}={value}.", "Leave one of them out.")
    return [*words, *(f"{key}={value}" for key, value in short.items() if value is not None)]
