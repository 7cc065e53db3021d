"""The embedding. Only the rows of tokens that occur in the batch are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call

from sophia_galore.data.batches import MicroBatch
from sophia_galore.engine.capture import LayerCall, capture_calls
from sophia_galore.model.architecture import Architecture
from sophia_galore.numerics.random import generator
from sophia_galore.weights.store import WeightStore


@dataclass(frozen=True)
class Embedded:
    """The embedding's output for an effective batch.

    Args:
        tokens: (U,) int64, the distinct token ids of the effective batch, sorted.
        rows: (U, d) their embeddings in compute precision; a leaf of the autograd graph, unless they are frozen.
        hidden: Per micro-batch (B, T, d), the first layer's input, part of the graph of `rows`.
        calls: Per micro-batch, one call per layer.
    """

    tokens: Tensor
    rows: Tensor
    hidden: list[Tensor]
    calls: list[list[LayerCall]]

    def rows_grad(self, hidden_grads: Sequence[Tensor], padding_idx: int | None) -> Tensor:
        """Compute the gradient of the embedding rows in use.

        Args:
            hidden_grads: Per micro-batch (B, T, d), the gradient with respect to `hidden`.
            padding_idx: Token that gets no gradient; None: every token gets one.

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


@dataclass(frozen=True)
class EmbeddingNoise:
    """Noise on the embeddings during training (NEFTune, Jain et al., arXiv 2310.05914, algorithm 1).

    The noise is uniform in (-1, 1), times alpha / sqrt(L d), where L is the number of tokens of the example without
    padding. It is a function of seed, step and the row's position in the effective batch, so that it is the same
    however rows are padded, split or recomputed, and after a resume. It is a constant in the gradient.

    Args:
        alpha: Its scale.
        seed: The run's seed.
        step: Number of the optimizer step.
        first_row: Number of rows of the effective batch before these, in other processes.
    """

    alpha: float
    seed: int
    step: int
    first_row: int = 0

    @torch.no_grad()
    def add_to(self, embedded: Tensor, batch: MicroBatch, first_row: int) -> None:
        """Add the noise to the embeddings of a micro-batch, in place, except at padding.

        Args:
            embedded: (B, T, d).
            batch: The micro-batch.
            first_row: Number of rows in the micro-batches before it, in this process.
        """
        width = embedded.shape[-1]
        for row, lengths in enumerate(_example_lengths(batch)):
            number = self.first_row + first_row + row
            draw = generator(self.seed, "neftune", self.step, number, device=embedded.device)
            start = 0
            for length in lengths:
                noise = torch.empty(length, width, device=embedded.device).uniform_(-1, 1, generator=draw)
                embedded[row, start : start + length].add_(noise, alpha=self.alpha / math.sqrt(length * width))
                start += length


def _example_lengths(batch: MicroBatch) -> list[tuple[int, ...]]:
    """Return, for each row, the lengths in tokens of the examples in it."""
    if batch.lengths is not None:
        return list(batch.lengths)
    if batch.attention_mask is None:
        return [(batch.input_ids.shape[1],)] * len(batch.input_ids)
    return [(length,) for length in batch.attention_mask.sum(1).tolist()]


def embed(
    architecture: Architecture,
    store: WeightStore,
    batches: Sequence[MicroBatch],
    dtype: torch.dtype,
    *,
    trains: bool = True,
    noise: EmbeddingNoise | None = None,
    first_batch: int = 0,
) -> Embedded:
    """Look up the embeddings of an effective batch, and record the arguments of each layer.

    Args:
        architecture: The model.
        store: The weights.
        batches: Micro-batches on the device of the weights.
        dtype: Compute precision.
        trains: Whether the embedding's weight is trained.
        noise: Noise to add to the embeddings; None: no noise.
        first_batch: Number of micro-batches of the effective batch before these, in other processes.

    Returns:
        Hidden states and calls; the hidden states have a graph back to the rows if gradients are enabled.
    """
    tokens, places = torch.unique(
        torch.cat([batch.input_ids.flatten() for batch in batches]), sorted=True, return_inverse=True
    )
    with store.borrow_rows(architecture.embed_name, tokens, dtype) as (rows,):
        rows.requires_grad_(trains and torch.is_grad_enabled())
    hidden: list[Tensor] = []
    calls: list[list[LayerCall]] = []
    num_rows, of_batches = 0, places.split([batch.input_ids.numel() for batch in batches])
    for number, (batch, places_flat) in enumerate(zip(batches, of_batches, strict=True), first_batch):
        embedded = functional_call(architecture.embed, {"weight": rows}, (places_flat.view_as(batch.input_ids),))
        if noise is not None:
            noise.add_to(embedded, batch, num_rows)
        num_rows += len(batch.input_ids)
        first, layer_calls = capture_calls(architecture, embedded, batch)
        hidden.append(first)
        calls.append([replace(call, micro_batch=number) for call in layer_calls])
    return Embedded(tokens, rows, hidden, calls)
