"""A configuration with some of the experts of another one."""

from __future__ import annotations

import copy
from typing import Any


def with_experts(config: Any, num_experts: int, count: int) -> Any:
    """Return a configuration whose layers have fewer experts.

    Args:
        config: The Hugging Face configuration; not changed.
        num_experts: Number of experts that it has. Every key about experts with this value is about their number.
        count: The number to have instead; at least as many as are chosen for a token.
    """
    few = copy.deepcopy(config)
    for key, value in vars(config).items():
        if value == num_experts and "expert" in key and "per_tok" not in key and not isinstance(value, bool):
            setattr(few, key, count)
    return few
