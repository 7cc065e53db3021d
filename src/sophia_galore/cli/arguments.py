"""Arguments that several commands take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from sophia_galore.config import RunConfig, load_config
from sophia_galore.config.paths import expand
from sophia_galore.errors import ArgumentError, ConfigError

DEFAULT_CONFIG = Path("configs/galore_config.yaml")
STARTER = Path("config.yaml")
"""What `init` writes."""


def expanded(path: Path | None) -> Path | None:
    """Expand `~` and variables in a path argument; shells do not in `--option=~/x`."""
    return None if path is None else Path(expand(str(path)))


def expanded_text(text: str | None) -> str | None:
    """Expand `~` and variables in an argument that may be a path or, for example, a hub id."""
    return None if text is None else expand(text)


def expanded_paths(paths: list[Path]) -> list[Path]:
    """Expand `~` and variables in several paths."""
    return [Path(expand(str(path))) for path in paths]


ConfigOption = Annotated[Path, typer.Option("--config", "-c", callback=expanded, help="The run's YAML file.")]
OptimizerOption = Annotated[
    str | None, typer.Option("--optimizer", "-o", help="Short for optimizer.type=...: galore or adamw.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Override keys of the configuration.")
]


def read_config(path: Path, optimizer: str | None, overrides: list[str] | None) -> RunConfig:
    """Load the configuration of a command line."""
    return load_config(there(path), given_overrides({"optimizer.type": optimizer}, overrides))


def there(path: Path) -> Path:
    """Return the configuration's file.

    Raises:
        ConfigError: It is the default file, and does not exist, as outside of a clone.
    """
    if path != DEFAULT_CONFIG or path.exists():
        return path
    write = "" if STARTER.exists() else "Write one with `sophia-galore init`, then name"
    remedy = f"{write or 'Name'} it: --config {STARTER}."
    raise ConfigError(f"No configuration is named, and there is no {DEFAULT_CONFIG} here.", remedy)


def given_overrides(short: Mapping[str, str | None], overrides: list[str] | None) -> list[str]:
    """Return the overrides of a command line, with those given by options such as --model.

    Args:
        short: Values of these options by key; None: not given.
        overrides: KEY.PATH=VALUE words.

    Raises:
        ArgumentError: An option and an override give different values for one key.
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
