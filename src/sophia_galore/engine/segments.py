"""Attention within each of the examples that lie side by side in a row.

All of a layer but its attention works on each token by itself and does not mind what lies beside it. So only the
attention is called anew for every example, on its own queries, keys and values: exactly what the model does with that
example alone, in whatever way it attends (sliding windows, capped scores), and no work for pairs of tokens that don't
see each other. A mask over the whole row would come to the same numbers, at the cost of the square of the row's length.

Transformers lets a model's attention be chosen by name, and hands on to it what a layer is given as its mask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sophia_galore.model.architecture import Architecture

_NAME = "within_examples"


@dataclass(frozen=True, eq=False)
class Segments:
    """What a layer is given in place of a mask.

    Args:
        lengths: For each row, the lengths of its examples; what is left of the row is padding.
        mask: How the model masks the longest of them, (1, 1, L, L); None: by no tensor, its attention is causal. The
            masks of shorter ones are its beginnings.
        attention: The name of the model's own attention.
    """

    lengths: tuple[tuple[int, ...], ...]
    mask: Tensor | None
    attention: str

    def mask_of(self, length: int) -> Tensor | None:
        """How the model masks one of the examples, (1, 1, length, length)."""
        return None if self.mask is None else self.mask[..., :length, :length]


def own_attention(architecture: Architecture) -> str:
    """What a model calls its attention, such as sdpa or eager."""
    name: str = architecture.base.config._attn_implementation  # type: ignore[union-attr, assignment]
    return name


@contextmanager
def attending_within(architecture: Architecture) -> Iterator[None]:
    """While it is entered, the model's layers take `Segments` for a mask.

    Args:
        architecture: The model.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attend)
    config: Any = architecture.base.config
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Segments, **settings: Any
) -> tuple[Tensor, None]:
    """The attention of one layer, in the form in which transformers asks for it.

    Args:
        module: The layer's attention.
        query: (B, heads, T, k).
        key: (B, key heads, T, k).
        value: (B, key heads, T, v).
        attention_mask: Where the examples are.
        settings: Further arguments of the model's own attention.

    Returns:
        (B, T, heads, v), zeros where there is padding; and no weights.
    """
    segments = attention_mask
    attend = _function(segments.attention, module)
    outputs: list[Tensor] = []
    for lengths, *of_row in zip(segments.lengths, query.split(1), key.split(1), value.split(1), strict=True):
        padding = query.shape[2] - sum(lengths)
        parts = [tensor.split([*lengths, padding], dim=2) for tensor in of_row]
        for length, *of_example in zip(lengths, *parts, strict=False):
            outputs.append(attend(module, *of_example, segments.mask_of(length), **settings)[0])
        if padding:
            outputs.append(outputs[-1].new_zeros(1, padding, *outputs[-1].shape[2:]))
    whole = torch.cat(outputs, dim=1)  # (1, B T, heads, v)
    return whole.view(len(query), -1, *whole.shape[2:]), None


def _function(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """The model's own attention: every model's code brings the plain form of its own."""
    from transformers import AttentionInterface

    eager = sys.modules[type(module).__module__].eager_attention_forward
    found: Callable[..., tuple[Tensor, Any]] = AttentionInterface().get_interface(name, eager)
    return found
