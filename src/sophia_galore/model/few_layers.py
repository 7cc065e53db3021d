"""A configuration with some of the layers of another one."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Any


def layer_kinds(config: Any) -> list[Hashable]:
    """Return what a configuration says of each layer apart; layers of which it says the same are of one kind.

    Args:
        config: The Hugging Face configuration.
    """
    count = config.num_hidden_layers
    lists, overrides = _lists(config), layer_overrides(config)
    return [
        (
            *(str(values[index]) for values in lists.values()),
            str(overrides.get(index)),
            index >= count - num_sharing(config),
        )
        for index in range(count)
    ]


def num_sharing(config: Any) -> int:
    """Return how many of the last layers use keys and values of earlier ones."""
    return getattr(config, "num_kv_shared_layers", None) or 0


def with_layers(config: Any, chosen: Sequence[int]) -> Any:
    """Return a configuration with some of the layers.

    Args:
        config: The Hugging Face configuration; not changed.
        chosen: The layers, by number; one may come twice.
    """
    few = copy.deepcopy(config)
    for key, values in _lists(config).items():
        if _is_derived(config, key):
            continue
        setattr(few, key, [values[index] for index in chosen])
    if num_sharing(config):
        few.num_kv_shared_layers = sum(index >= config.num_hidden_layers - num_sharing(config) for index in chosen)
    few.num_hidden_layers = len(chosen)
    if overrides := layer_overrides(config):
        few.per_layer_config = {place: overrides[index] for place, index in enumerate(chosen) if index in overrides}
    return few


def _lists(config: Any) -> dict[str, list[Any]]:
    """Return the values that are lists with an entry for each layer."""
    count = config.num_hidden_layers
    found = {key: value for key, value in vars(config).items() if isinstance(value, list) and len(value) == count > 1}
    types = getattr(config, "layer_types", None)  # may be kept under another name
    return found | ({"layer_types": list(types)} if types and len(types) == count else {})


def _is_derived(config: Any, key: str) -> bool:
    """Return whether a value is computed from others, as Mamba 2's list of equal layers is from their number."""
    known = getattr(type(config), config.attribute_map.get(key, key), None)
    return isinstance(known, property) and known.fset is None


def layer_overrides(config: Any) -> dict[int, dict[str, Any]]:
    """Return the values that a configuration has for single layers, by their numbers."""
    spec = vars(config).get("_heterogeneity_spec")
    return {} if spec is None else {int(number): dict(values) for number, values in spec.per_layer_overrides.items()}
