"""The embedding. Only the rows of tokens that occur in the batch are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call

from sophia_galore.data.batches import MicroBatch, by_block
from sophia_galore.engine.capture import Entering, LayerCall, capture_calls
from sophia_galore.engine.determinism import seeded
from sophia_galore.engine.layer_graph import Tensors
from sophia_galore.model.architecture import Architecture
from sophia_galore.numerics.random import generator, key
from sophia_galore.weights.store import WeightStore


@dataclass(frozen=True)
class TokenRows:
    """The gradient of an embedding's weight, of which few rows are not zero.

    Args:
        tokens: (U,) int64, distinct token ids: the numbers of these rows.
        grad: (U, d) float32, the rows.
    """

    tokens: Tensor
    grad: Tensor


@dataclass(frozen=True)
class Embedded:
    """The embedding's output for an effective batch, or for a block of its micro-batches.

    Args:
        tokens: (U,) int64, the distinct token ids that occur, sorted.
        rows: (U, d) their embeddings in compute precision, by the name of the embedding's weight; leaves of the
            autograd graph, unless they are frozen.
        weights: The other weights before the first layer in compute precision, by name; leaves as well.
        hidden: Per micro-batch (B, T, d), the first layer's input, part of the graph of `rows` and `weights`.
        calls: Per micro-batch, one call per layer.
    """

    tokens: Tensor
    rows: dict[str, Tensor]
    weights: dict[str, Tensor]
    hidden: list[Tensor]
    calls: list[list[LayerCall]]

    def grads(self, hidden_grads: Sequence[Tensor], padding: Mapping[str, int | None]) -> tuple[Tensors, Tensors]:
        """Compute the gradients of the rows in use and of the other weights.

        Args:
            hidden_grads: Per micro-batch (B, T, d), the gradient with respect to `hidden`; those with respect to what
                layers got besides are in the calls.
            padding: For each embedding, the token that gets no gradient; None: every token gets one.

        Returns:
            The gradients of the rows of each trained embedding, (U, d) float32; and those of the other trained
            weights, float32.
        """
        leaves = {name: leaf for name, leaf in (self.rows | self.weights).items() if leaf.requires_grad}
        totals = {name: torch.zeros_like(leaf, dtype=torch.float32) for name, leaf in leaves.items()}
        for hidden, grad, calls in zip(self.hidden, hidden_grads, self.calls, strict=True):
            shared = {id(each): each for call in calls for each in call.inputs if each.grad is not None}
            outputs = [hidden, *(each.source for each in shared.values())]
            grads = [grad.to(hidden.dtype), *(each.grad.to(each.source.dtype) for each in shared.values())]  # type: ignore[union-attr]
            found = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
            for total, part in zip(totals.values(), found, strict=True):
                if part is not None:
                    total.add_(part)
        for name in self.rows:
            if name in totals and padding[name] is not None:
                totals[name][self.tokens == padding[name]] = 0
        rows = {name: totals.pop(name) for name in self.rows if name in totals}
        return rows, totals


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


def _real_tokens(batch: MicroBatch) -> Tensor | None:
    """Return which tokens of a micro-batch are no padding, (B * T,) bool; None: all."""
    if batch.attention_mask is not None:
        return batch.attention_mask.flatten().bool()
    if batch.lengths is None:
        return None
    ends = torch.tensor([sum(row) for row in batch.lengths], device=batch.input_ids.device)
    return (torch.arange(batch.input_ids.shape[1], device=ends.device) < ends[:, None]).flatten()


def embed_blocks(
    embed_block: Callable[..., Embedded], batches: Sequence[MicroBatch], *, first_batch: int = 0
) -> list[Embedded]:
    """Look up the embeddings of each block of micro-batches apart.

    Args:
        embed_block: `embed`, with the arguments that are the same for all blocks.
        batches: Micro-batches on the device of the weights, in the order of their blocks.
        first_batch: Number of micro-batches of the effective batch before these, in other processes.

    Returns:
        For each block, in order, what `embed` returns.
    """
    parts: list[Embedded] = []
    first_row = 0
    for of_block in by_block(batches):
        parts.append(embed_block(of_block, first_batch=first_batch, first_row=first_row))
        first_batch += len(of_block)
        first_row += sum(len(batch.input_ids) for batch in of_block)
    return parts


def embed(
    architecture: Architecture,
    store: WeightStore,
    batches: Sequence[MicroBatch],
    dtype: torch.dtype,
    *,
    frozen: Collection[str] = (),
    noise: EmbeddingNoise | None = None,
    first_batch: int = 0,
    first_row: int = 0,
    seed: int = 0,
    step: int = 0,
) -> Embedded:
    """Look up the embeddings of some micro-batches, and record the arguments of each layer.

    Args:
        architecture: The model.
        store: The weights.
        batches: Micro-batches on the device of the weights.
        dtype: Compute precision.
        frozen: Names of the weights that are not trained.
        noise: Noise to add to the embeddings; None: no noise.
        first_batch: Number of micro-batches of the effective batch before these.
        first_row: Number of rows in this process's micro-batches before these.
        seed: The run's seed, for dropout before the first layer.
        step: Number of the optimizer step, for the same.

    Returns:
        Hidden states and calls; the hidden states have a graph back to the rows if gradients are enabled.
    """
    tokens, places = torch.unique(
        torch.cat([batch.input_ids.flatten() for batch in batches]), sorted=True, return_inverse=True
    )
    embeddings = {architecture.embed_name: architecture.embed, **architecture.lookups}
    rows: Tensors = {}
    for name in embeddings:
        with store.borrow_rows(name, tokens, dtype) as (read,):
            rows[name] = read.requires_grad_(name not in frozen and torch.is_grad_enabled())
    weights: Tensors = {}
    for name in architecture.entry_names:
        with store.borrow(name) as borrowed:
            # A copy: the stored weight itself may change before its gradient is computed.
            copy = borrowed[name].values(dtype).detach().clone()
            weights[name] = copy.requires_grad_(name not in frozen and torch.is_grad_enabled())
    # What an embedding's own code does to the rows it looked up, such as a norm.
    inside = {name: _weights_inside(name.removesuffix("weight"), weights) for name in embeddings}
    hidden: list[Tensor] = []
    calls: list[list[LayerCall]] = []
    num_rows, of_batches = first_row, places.split([batch.input_ids.numel() for batch in batches])
    for number, (batch, places_flat) in enumerate(zip(batches, of_batches, strict=True), first_batch):
        looked_up = {
            name: functional_call(
                module, {"weight": rows[name], **inside[name]}, (places_flat.view_as(batch.input_ids),)
            )
            for name, module in embeddings.items()
        }
        embedded = looked_up.pop(architecture.embed_name)
        if noise is not None:
            noise.add_to(embedded, batch, num_rows)
        num_rows += len(batch.input_ids)
        entering = Entering(batch.input_ids, embedded, looked_up, weights)
        dropout_seed = key(seed, "dropout", step, "embedding", number)
        with seeded(tokens.device, dropout_seed) if architecture.has_dropout else nullcontext():
            first, layer_calls = capture_calls(architecture, entering, batch)
        hidden.append(first)
        real = _real_tokens(batch) if any(architecture.routers) else None
        calls.append([replace(call, micro_batch=number, real=real, block=batch.block) for call in layer_calls])
    return Embedded(tokens, rows, weights, hidden, calls)


def _weights_inside(prefix: str, weights: Tensors) -> Tensors:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
