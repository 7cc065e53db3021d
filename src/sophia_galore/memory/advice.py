"""What helps a run that ran out of memory: settings that fit, in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sophia_galore.config import RunConfig
from sophia_galore.config.size import bytes_in_words
from sophia_galore.engine.probe import WHAT_HELPS
from sophia_galore.memory.fitting import Fitter
from sophia_galore.memory.planner import Planner


def advice(planner: Planner, config: RunConfig) -> str:
    """What to change.

    Args:
        planner: Knows what settings need.
        config: What was asked.
    """
    budget = planner.budget(config)
    if budget is None:
        return WHAT_HELPS
    found = Fitter(planner).fit(config, budget, fills=False)  # somebody waits
    needed = bytes_in_words(found.forecast.peak_bytes)
    if found.config is None:
        enough = bytes_in_words(found.forecast.peak_bytes + budget.reserve_bytes)
        return (
            f"No settings fit into memory.limit: with {in_words(found.changes)} {needed} would still be needed. Raise "
            f"memory.limit to {enough} or more, lower training.max_length, or take a smaller model."
        )
    if not found.changes:
        return f"By the plan {needed} are enough, so something else takes memory: set memory.reserve, or {_lowered()}"
    return f"These settings are expected to fit, with {needed}: {in_words(found.changes)}."


def in_words(changes: Mapping[str, Any]) -> str:
    """Settings as the command line takes them.

    Args:
        changes: Values by dotted key.
    """
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in changes.items()}
    return " ".join(f"{key}={value}" for key, value in values.items())


def _lowered() -> str:
    return WHAT_HELPS[0].lower() + WHAT_HELPS[1:]
