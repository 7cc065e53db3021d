"""The embedding, of which only the rows of the batch's own tokens are ever touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from sophia_galore.data.batches import MicroBatch
from sophia_galore.engine.capture import LayerCall, capture_calls
from sophia_galore.model.anatomy import Anatomy
from sophia_galore.model.store import WeightStore


@dataclass(frozen=True)
class Embedded:
    """What enters the first layer.

    Args:
        tokens: (U,) the different token ids of the effective batch, sorted.
        rows: (U, d) their embeddings in compute precision; a leaf of the graph.
        hidden: Per micro-batch (B, T, d), part of the graph of `rows`.
        calls: Per micro-batch one call a layer.
    """

    tokens: Tensor
    rows: Tensor
    hidden: list[Tensor]
    calls: list[list[LayerCall]]

    def rows_grad(self, hidden_grads: Sequence[Tensor], padding_idx: int | None) -> Tensor:
        """Gradient of the looked-up rows.

        Args:
            hidden_grads: Per micro-batch (B, T, d), the gradient by `hidden`.
            padding_idx: Token that gets no gradient; None: all get theirs.

        Returns:
            (U, d) float32.
        """
        total = torch.zeros_like(self.rows, dtype=torch.float32)
        for hidden, grad in zip(self.hidden, hidden_grads, strict=True):
            (rows_grad,) = torch.autograd.grad(hidden, self.rows, grad.to(hidden.dtype))
            total.add_(rows_grad)
        if padding_idx is not None:
            total[self.tokens == padding_idx] = 0
        return total


def embed(anatomy: Anatomy, store: WeightStore, batches: Sequence[MicroBatch], dtype: torch.dtype) -> Embedded:
    """Look up the tokens of an effective batch, and learn how the layers are called.

    Args:
        anatomy: The model.
        store: The weights.
        batches: Micro-batches on the device of the weights.
        dtype: Compute precision.

    Returns:
        Hidden states and calls, with a graph back to the rows if gradients are enabled.
    """
    tokens, places = torch.unique(
        torch.cat([batch.input_ids.flatten() for batch in batches]), sorted=True, return_inverse=True
    )
    rows = store.rows(anatomy.embed_name, tokens, dtype).requires_grad_(torch.is_grad_enabled())
    hidden: list[Tensor] = []
    calls: list[list[LayerCall]] = []
    for batch, places_flat in zip(batches, places.split([b.input_ids.numel() for b in batches]), strict=True):
        embedded = functional_call(anatomy.embed, {"weight": rows}, (places_flat.view_as(batch.input_ids),))
        first, layer_calls = capture_calls(anatomy, embedded, batch)
        hidden.append(first)
        calls.append(layer_calls)
    return Embedded(tokens, rows, hidden, calls)
