"""A small twin of a model: the same architecture, with few layers of each kind and small widths.

Widths that depend on one another are divided by the same number, so that their ratios, which code checks, stay as they
are. What can't be made smaller in this way keeps its size.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

VOCABULARY = 96
"""Tokens that a twin knows."""

_HIDDEN = 64  # about the width of a twin's hidden states
_EXPERTS = 8
_LEAST_WIDTH = 128  # smaller numbers are no widths that count
# What an integer of a configuration means, by a part of its name.
_PATTERNS = ("interval", "period", "freq", "sparse_step", "first_k", "offset", "pattern", "n_dense", "num_dense_layers")
_NOT_WIDTHS = ("token", "position", "window", "length", "theta", "layer", "max_", "expert", "chunk", "vocab", "rank")
_HEAD_COUNTS = ("heads", "n_head", "num_groups", "n_groups")


def twins(config: Any) -> Iterator[Any]:
    """Yield configurations of twins: small ones first, then such that keep the widths.

    Args:
        config: The Hugging Face configuration of a causal language model; not changed.
    """
    for ratio in _ratios(config):
        for is_whole in (False, True):
            twin = _with_few_layers(copy.deepcopy(config), whole_pattern=is_whole)
            for key, value in _smaller(twin, ratio).items():
                setattr(twin, key, value)
            yield twin


def _ratios(config: Any) -> Iterator[Fraction]:
    """Yield numbers by which widths and numbers of heads are multiplied."""
    counts = (getattr(config, key, None) for key in ("num_attention_heads", "num_heads"))
    width, heads = config.hidden_size, next((count for count in counts if isinstance(count, int)), 1)
    fits = (divisor for divisor in (64, 32, 16, 8, 4, 2) if width % divisor == 0 and width // divisor >= _HIDDEN // 2)
    yield from itertools.islice((Fraction(1, divisor) for divisor in fits if heads >= divisor), 2)
    yield from (Fraction(few, heads) for few in (2, 4) if heads > few)
    yield Fraction(1)


def _with_few_layers(config: Any, *, whole_pattern: bool) -> Any:
    """Leave a few layers of each kind; with `whole_pattern`, the first ones up to and with one of each kind."""
    count = config.num_hidden_layers
    lists = {key: value for key, value in vars(config).items() if isinstance(value, list) and len(value) == count > 1}
    kinds = [tuple(str(value[index]) for value in lists.values()) for index in range(count)]
    first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
    patterns = [
        value
        for key, value in vars(config).items()
        if type(value) is int and any(part in key for part in _PATTERNS) and 0 < value < count
    ]
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    if shared:
        kept = [*sorted(first.values()), *(count - 1 - index for index in reversed(range(len(first))))]
        config.num_kv_shared_layers = len(first)
    elif patterns or whole_pattern:
        kept = list(range(min(count, max([1, *first.values(), *patterns]) + 1)))
    else:
        kept = sorted({*first.values(), *(min(count - 1, index + 1) for index in first.values())})
    for key, value in lists.items():
        setattr(config, key, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)
    return config


def _smaller(config: Any, ratio: Fraction) -> dict[str, Any]:
    """Return the changed values of a configuration."""
    changes: dict[str, Any] = {}
    for key, value in vars(config).items():
        if isinstance(value, float) and ("drop" in key or "jitter" in key):
            changes[key] = 0.0
        elif key.endswith("token_id") and value is not None:
            changes[key] = [2] if isinstance(value, list) else 2
        elif type(value) is int and value > 1:
            smaller = _smaller_number(key, value, ratio)
            if smaller != value:
                changes[key] = smaller
    return changes


def _smaller_number(key: str, value: int, ratio: Fraction) -> int:
    if "vocab_size" in key:
        return VOCABULARY
    if "group" in key and ("n_group" in key or "expert" in key or "topk" in key):
        return 1
    if "expert" in key and "per_tok" not in key and "size" not in key and "dim" not in key:
        return min(value, _EXPERTS)
    if "per_tok" in key or key in ("moe_topk", "moe_k", "num_experts_per_token"):
        return min(value, 2)
    product = value * ratio
    if any(part in key for part in _HEAD_COUNTS):
        return max(1, math.floor(product))
    is_width = value >= _LEAST_WIDTH and product.denominator == 1 and product >= 2
    if is_width and ("expert" in key or not any(part in key for part in _NOT_WIDTHS)) and "head_dim" not in key:
        return int(product)
    return value
