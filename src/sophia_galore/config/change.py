"""A configuration with other values for some keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from sophia_galore.config.fields import Section
from sophia_galore.config.schema import RunConfig

S = TypeVar("S", bound=Section)


def changed(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The same configuration but for some keys, which count as given.

    Args:
        config: The configuration.
        values: What the keys are to be, by dotted key; valid ones.
    """
    for name, value in values.items():
        config = _with(config, name.split("."), value)
    return config


def _with(section: S, path: list[str], value: Any) -> S:
    first, *rest = path
    return section.model_copy(update={first: _with(getattr(section, first), rest, value) if rest else value})
