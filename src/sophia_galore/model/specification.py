"""One built-in specification, and what rows of them are written with.

The rows are in `known_*.py`, one family of models a file. Each is written as its config.json would say it; what a
family has in common stands above its rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Specification:
    """One model, known without its files.

    Attributes:
        name: The short name, as in `aliases.py`.
        num_parameters: Parameters of the model, a tied head counted once.
        config: Keys and values of its Hugging Face configuration; `dtype` is that of the published weights.
        hub_ids: Ids on hubs that have these shapes.
        remark: What to tell a user who plans with it, as a sentence; may be empty.
    """

    name: str
    num_parameters: int
    config: Mapping[str, Any]
    hub_ids: tuple[str, ...]
    remark: str = ""


def sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    """The keys that nearly every config.json has.

    Args:
        hidden: Width of the hidden states.
        intermediate: Width inside of the MLP.
        layers: How many.
        heads: Of queries, in a layer.
        kv_heads: Of keys and values, in a layer.
    """
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


def hub_ids(owners: str, *models: str) -> tuple[str, ...]:
    """Every model under every owner.

    Args:
        owners: Separated by spaces.
        models: Their names on hubs, without the owner.
    """
    return tuple(f"{owner}/{model}" for owner in owners.split() for model in models)


def every_nth(count: int, period: int, others: str) -> list[str]:
    """Kinds of layers of which every n-th attends to all earlier tokens, beginning with the n-th.

    Args:
        count: How many layers.
        period: The n.
        others: What the other layers are.
    """
    return ["full_attention" if number % period == 0 else others for number in range(1, count + 1)]


def layers_at(count: int, indices: Collection[int], kind: str, others: str) -> list[str]:
    """Kinds of layers of which only some are of the first kind.

    Args:
        count: How many layers.
        indices: Which are of the first kind, counted from 0.
        kind: The first kind.
        others: What the other layers are.
    """
    return [kind if index in indices else others for index in range(count)]
