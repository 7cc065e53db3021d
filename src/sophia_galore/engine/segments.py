"""Attention within each example, for rows into which several examples are packed.

Every part of a layer except attention treats each token independently. So only the attention is called separately for
each example, on its queries, keys and values. This computes exactly what the model computes for that example alone,
for any kind of attention (sliding windows, capped scores), and does no work for pairs of tokens of different examples.
A mask over the whole row would give the same numbers, at a cost that grows with the square of the row's length.

Transformers selects a model's attention function by name, and passes the layer's mask argument on to it.
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
    """The positions of the examples in packed rows; layers receive it in place of a mask.

    Args:
        lengths: For each row, the lengths of its examples in tokens; the rest of the row is padding.
        mask: The model's mask for the longest example, (1, 1, L, L); None: attention is causal without a mask tensor.
            The mask of a shorter example is the top left part of it.
        attention: Name of the model's own attention function.
    """

    lengths: tuple[tuple[int, ...], ...]
    mask: Tensor | None
    attention: str

    def mask_of(self, length: int) -> Tensor | None:
        """Return the mask of an example, (1, 1, length, length), or None."""
        return None if self.mask is None else self.mask[..., :length, :length]


def own_attention(architecture: Architecture) -> str:
    """Return the name of a model's attention function, such as sdpa or eager."""
    name: str = architecture.base.config._attn_implementation  # type: ignore[union-attr, assignment]
    return name


@contextmanager
def attending_within(architecture: Architecture) -> Iterator[None]:
    """Let the model's layers accept `Segments` in place of a mask, inside the context.

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
    """Compute the attention of one layer, example by example; an attention function for transformers.

    Args:
        module: The layer's attention module.
        query: (B, heads, T, k).
        key: (B, key heads, T, k).
        value: (B, key heads, T, v).
        attention_mask: The positions of the examples.
        settings: Further arguments of the model's own attention.

    Returns:
        The output, (B, T, heads, v), with zeros at padding; and None for the attention weights.
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
    """Return the model's own attention function; its eager form is defined in the model's module."""
    from transformers import AttentionInterface

    eager = sys.modules[type(module).__module__].eager_attention_forward
    found: Callable[..., tuple[Tensor, Any]] = AttentionInterface().get_interface(name, eager)
    return found
