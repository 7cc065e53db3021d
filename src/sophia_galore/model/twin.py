"""A small twin of a model: the same architecture, with few layers of each kind and small widths.

Widths that depend on one another are divided by the same number, so that their ratios, which code checks, stay as they
are. What can't be made smaller in this way keeps its size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from sophia_galore.model.few_layers import layer_kinds, layer_overrides, num_sharing, with_layers

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
            twin = _with_few_layers(config, whole_pattern=is_whole)
            for key, value in _smaller(twin, ratio).items():
                setattr(twin, key, value)
            if overrides := layer_overrides(twin):
                twin.per_layer_config = {
                    number: {key: _smaller_number(key, value, ratio) for key, value in values.items()}
                    for number, values in overrides.items()
                }
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
    count, kinds = config.num_hidden_layers, layer_kinds(config)
    first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
    # Some kinds are not listed, but follow from a number such as "every fourth layer".
    patterns = [
        value
        for key, value in vars(config).items()
        if type(value) is int and any(part in key for part in _PATTERNS) and 0 < value < count
    ]
    if num_sharing(config):
        # The last of each kind that does not share lends to those that do.
        last = {kind: index for index, kind in enumerate(kinds)}
        return with_layers(config, sorted({*first.values(), *last.values()}))
    if patterns or whole_pattern:
        return with_layers(config, range(min(count, max([1, *first.values(), *patterns]) + 1)))
    return with_layers(config, sorted({*first.values(), *(min(count - 1, index + 1) for index in first.values())}))


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


def _smaller_number(key: str, value: Any, ratio: Fraction) -> Any:
    if type(value) is not int:
        return value
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
