"""The head's logits over the counted tokens of an effective batch, a tile at a time, and their gradient.

Where the store holds the head's weight as it is computed with, a tile is a chunk of tokens by the whole vocabulary:
its loss and gradient come from one computation of its logits. Where the weight must be decoded first, a tile is a
chunk of tokens by a vocabulary slice, so that no more than the slice is ever decoded; the softmax then takes a pass
of its own (`OnlineLoss`), and the logits are computed once more than otherwise.

The gradient of a token's logits is its weight in the objective times (softmax - onehot).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sophia_galore.engine.cross_entropy import (
    TokenWeight,
    blocks,
    chunks,
    draw_labels,
    log_probs,
    loss_sum,
    loss_sum_and_grad,
)
from sophia_galore.engine.observe import Observer
from sophia_galore.engine.online_loss import OnlineLoss
from sophia_galore.weights.store import WeightStore


@dataclass(frozen=True)
class Tile:
    """Gradients of some tokens' logits for a vocabulary slice.

    Args:
        tokens: Which tokens.
        vocab_slice: Which vocabulary entries.
        weight: (vocab_slice, d), the head's rows in compute precision; read only.
        grad: (tokens, vocab_slice) float32, the gradient with respect to the logits.
    """

    tokens: slice
    vocab_slice: slice
    weight: Tensor
    grad: Tensor


@dataclass(frozen=True)
class LossOf:
    """What the loss is made of.

    Args:
        labels: (N,) int64; drawn ones are written here in the first pass.
        softcap: Cap c of logits c * tanh(z / c) (Gemma 2); None: uncapped.
        sampler: Draws the labels from softmax(logits); None: they are given.
        chunk_bytes: Bytes of a tile's float32 logits.
    """

    labels: Tensor
    softcap: float | None
    sampler: torch.Generator | None
    chunk_bytes: int


class Logits(Protocol):
    """Ways to go over the logits."""

    in_parts: bool
    """Whether the gradient of a token comes in several tiles."""

    def loss_sum(self, normed: Tensor) -> float:
        """Summed cross-entropy in nats, not divided.

        Args:
            normed: (N, d), what enters the head, in compute precision.
        """

    def log_probs(self, normed: Tensor) -> Tensor:
        """Log-probabilities of the labels, (N,) float32.

        Args:
            normed: As for `loss_sum`.
        """

    def walk(self, normed: Tensor, weight: TokenWeight, visit: Callable[[Tile], None]) -> float:
        """Go over all tiles; labels are drawn in the first walk, and kept for the later ones.

        Args:
            normed: As for `loss_sum`; the same at each walk.
            weight: What each token adds to the gradient: one number for all of them, or (N,) float32.
            visit: Is shown one tile after the other, and must keep none. All blocks of vocab_slice have the same chunks
                of tokens.

        Returns:
            Summed cross-entropy in nats, not divided.
        """


def logits_of(store: WeightStore, name: str, dtype: torch.dtype, loss: LossOf, observer: Observer) -> Logits:
    """The logits by a stored weight.

    Args:
        store: The weights.
        name: The head's weight, (V, d).
        dtype: Compute precision.
        loss: What the loss is made of.
        observer: Receives the category of each tensor.
    """
    if store[name].is_ready(dtype):
        return WholeLogits(store, name, dtype, loss, observer)
    return BlockLogits(store, name, dtype, loss, observer)


class WholeLogits(Logits):
    """Tiles of all vocab_slice: one computation of the logits gives loss and gradient.

    Args:
        store: The weights.
        name: The head's weight, (V, d).
        dtype: Compute precision, in which it is stored.
        loss: What the loss is made of.
        observer: Receives the category of each tensor.
    """

    in_parts = False

    def __init__(self, store: WeightStore, name: str, dtype: torch.dtype, loss: LossOf, observer: Observer) -> None:
        self._store, self._name, self._dtype, self._loss, self._observer = store, name, dtype, loss, observer
        self._sampler = loss.sampler

    def loss_sum(self, normed: Tensor) -> float:
        """As `Logits` says; of given labels."""
        labels, softcap, total = self._loss.labels, self._loss.softcap, 0.0
        with self._whole() as head:
            for tokens in self._chunks():
                total += float(loss_sum(_product(normed[tokens], head, self._observer), labels[tokens], softcap))
        return total

    def log_probs(self, normed: Tensor) -> Tensor:
        """As `Logits` says."""
        found = torch.empty(len(normed), dtype=torch.float32, device=normed.device)
        with self._whole() as head:
            for tokens in self._chunks():
                logits = self._drawn(normed, tokens, head)
                found[tokens] = log_probs(logits, self._loss.labels[tokens], self._loss.softcap)
        self._sampler = None
        return found

    def walk(self, normed: Tensor, weight: TokenWeight, visit: Callable[[Tile], None]) -> float:
        """As `Logits` says."""
        total = 0.0
        with self._whole() as head:
            for tokens in self._chunks():
                loss, grad = self._grad(normed, tokens, head, weight)
                total += float(loss)
                visit(Tile(tokens, slice(0, head.shape[0]), head, grad))
                del grad
        self._sampler = None
        return total

    def _grad(self, normed: Tensor, tokens: slice, head: Tensor, weight: TokenWeight) -> tuple[Tensor, Tensor]:
        logits = self._drawn(normed, tokens, head)
        of_tokens = weight if isinstance(weight, float) else weight[tokens]
        loss, grad = loss_sum_and_grad(logits, self._loss.labels[tokens], self._loss.softcap, of_tokens)
        self._observer.tag(grad, "logits")
        return loss, grad

    def _drawn(self, normed: Tensor, tokens: slice, head: Tensor) -> Tensor:
        """A chunk's logits; its labels are drawn by them, if that is still to be done."""
        logits = _product(normed[tokens], head, self._observer)
        if self._sampler is not None:
            self._loss.labels[tokens] = draw_labels(logits, self._loss.softcap, self._sampler)
        return logits

    @contextmanager
    def _whole(self) -> Iterator[Tensor]:
        with self._store.borrow(self._name) as borrowed:
            yield borrowed[self._name].values(self._dtype)

    def _chunks(self) -> Iterator[slice]:
        return chunks(len(self._loss.labels), self._store[self._name].shape[0], self._loss.chunk_bytes)


class BlockLogits(Logits):
    """Tiles of a vocabulary slice, whose rows of the weight are decoded for as long as they are worked on.

    Args:
        store: The weights.
        name: The head's weight, (V, d).
        dtype: Compute precision.
        loss: What the loss is made of.
        observer: Receives the category of each tensor.
    """

    in_parts = True

    def __init__(self, store: WeightStore, name: str, dtype: torch.dtype, loss: LossOf, observer: Observer) -> None:
        self._store, self._name, self._dtype, self._loss, self._observer = store, name, dtype, loss, observer
        self._online: OnlineLoss | None = None

    def loss_sum(self, normed: Tensor) -> float:
        """As `Logits` says."""
        return self._survey(normed).total()

    def log_probs(self, normed: Tensor) -> Tensor:
        """As `Logits` says."""
        return self._survey(normed).log_probs()

    def walk(self, normed: Tensor, weight: TokenWeight, visit: Callable[[Tile], None]) -> float:
        """As `Logits` says."""
        online = self._survey(normed)

        def differentiate(tokens: slice, vocab_slice: slice, head: Tensor, logits: Tensor) -> None:
            of_tokens = weight if isinstance(weight, float) else weight[tokens]
            grad = online.grad(tokens, vocab_slice, logits, of_tokens)
            self._observer.tag(grad, "logits")
            visit(Tile(tokens, vocab_slice, head, grad))

        self._each(normed, differentiate)
        return online.total()

    def _survey(self, normed: Tensor) -> OnlineLoss:
        """The first pass, the first time that it is asked for."""
        if self._online is None:
            online = OnlineLoss(self._loss.labels, self._loss.softcap, self._loss.sampler)
            self._each(normed, lambda tokens, vocab_slice, _, logits: online.take(tokens, vocab_slice, logits))
            self._online = online
        return self._online

    def _each(self, normed: Tensor, see: Callable[[slice, slice, Tensor, Tensor], None]) -> None:
        vocab_size, width = self._store[self._name].shape
        every = list(blocks(vocab_size, width * self._dtype.itemsize, self._loss.chunk_bytes))
        # The same tokens with the last block, which is smaller, as with all others.
        together = list(chunks(len(normed), every[0].stop, self._loss.chunk_bytes))
        for vocab_slice in self._observer.parts(every):
            with self._store.borrow_rows(self._name, vocab_slice, self._dtype) as (weight,):
                self._observer.tag(weight, "weights")
                for tokens in together:
                    see(tokens, vocab_slice, weight, _product(normed[tokens], weight, self._observer))
            del weight


def _product(normed: Tensor, weight: Tensor, observer: Observer) -> Tensor:
    """(tokens, vocab_slice) float32, a new tensor."""
    logits = (normed @ weight.T).float()
    observer.tag(logits, "logits")
    return logits
