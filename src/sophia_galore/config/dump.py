"""Convert a configuration: to YAML, to flat values, to a reference table; and change its values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from sophia_galore.config.field_types import Section
from sophia_galore.config.keys import keys
from sophia_galore.config.paths import PATH_KEYS, escape_path, expand_all
from sophia_galore.config.problems import show
from sophia_galore.config.schema import RunConfig
from sophia_galore.config.yaml_core import dump

S = TypeVar("S", bound=Section)


def dump_config(config: RunConfig) -> str:
    """Return the complete configuration as YAML; `load_config` reads back an equal one."""
    values = config.model_dump(mode="json")
    for key in PATH_KEYS:
        section, name = key.split(".")
        values[section][name] = expand_all(values[section][name], escape_path)
    if "eval_fraction" not in config.data.model_fields_set:
        # Written down, the default would count as given: it contradicts `eval`, and replaces a folder's own split.
        del values["data"]["eval_fraction"]
    if not config.training.gradient_checkpointing:
        # Likewise: written down, the default number would contradict.
        del values["engine"]["keep_layers"]
    return dump(values)


def flatten(config: RunConfig) -> dict[str, Any]:
    """Return every value by its dotted key, in the schema's order."""
    return {name: _at(config, name) for name in keys()}


def config_reference() -> str:
    """Return a Markdown table of every key: accepted values, default, meaning."""
    rows = ["| key | accepts | default | meaning |", "|---|---|---|---|"]
    for key in keys().values():
        cells = (f"`{key.name}`", key.accepts, f"`{show(key.default)}`", key.description)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def changed(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return a copy of a configuration with some keys changed; these count as given.

    Args:
        config: The configuration.
        values: The new, valid values by dotted key.
    """
    for name, value in values.items():
        config = _with(config, name.split("."), value)
    return config


def _with(section: S, path: list[str], value: Any) -> S:
    first, *rest = path
    return section.model_copy(update={first: _with(getattr(section, first), rest, value) if rest else value})


def _at(config: RunConfig, name: str) -> object:
    value: Any = config
    for word in name.split("."):
        value = value[word] if isinstance(value, Mapping) else getattr(value, word)
    if isinstance(value, tuple):
        return tuple(item.model_dump() if isinstance(item, BaseModel) else item for item in value)
    return value
