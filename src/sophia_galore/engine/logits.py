"""The head's logits and their gradient over the counted tokens of an effective batch, tile by tile.

If the head's weight is stored in compute precision and not very large, a tile is a chunk of tokens by the whole
vocabulary; one computation of its logits gives loss and gradient. Else a tile is a chunk of tokens by a vocabulary
slice, so that only one slice is decoded, or on the device, at a time. The softmax then needs a pass of its own
(`OnlineLoss`), and the logits are computed once more, unless all of them fit into the bytes that a chunk may take: then
they are kept.

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
    cap,
    chunks,
    log_probs,
    loss_sum,
    loss_sum_and_grad,
)
from sophia_galore.engine.observe import Observer
from sophia_galore.engine.online_loss import OnlineLoss
from sophia_galore.numerics.clocks import Clocks
from sophia_galore.weights.store import WeightStore
from sophia_galore.weights.weight import Weight

# A larger head's weight is used slice by slice even in compute precision: where it streams, only slices of it are on
# the device, and a run must have the same bits wherever its weights live.
_MOST_WHOLE_BYTES = 512 * 2**20
_ALL = slice(None)


@dataclass(frozen=True)
class Tile:
    """The gradient with respect to the logits of t tokens and v vocabulary entries.

    Args:
        tokens: The tokens, a slice of the counted tokens.
        vocab_slice: The vocabulary entries.
        weight: (v, d), their rows of the head's weight in compute precision; read only.
        grad: (t, v) float32, the gradient with respect to the logits.
    """

    tokens: slice
    vocab_slice: slice
    weight: Tensor
    grad: Tensor


@dataclass(frozen=True)
class LossOf:
    """The settings of the loss.

    Args:
        labels: (N,) int64; sampled labels are written here in the first pass.
        softcap: Cap c of logits c * tanh(z / c) (Gemma 2); None: uncapped.
        clocks: Sample the labels from softmax(logits); None: the labels are given.
        chunk_bytes: Size of a tile's float32 logits in bytes.
        bias: (V,) float32, the head's bias; None: it has none.
    """

    labels: Tensor
    softcap: float | None
    clocks: Clocks | None
    chunk_bytes: int
    bias: Tensor | None = None

    def logits(self, normed: Tensor, weight: Tensor, vocab_slice: slice, observer: Observer) -> Tensor:
        """Return the float32 logits of some tokens and vocabulary entries before the cap, as a new tensor.

        Args:
            normed: (t, d), the normed hidden states.
            weight: (v, d), rows of the head's weight.
            vocab_slice: Which rows these are.
            observer: Receives the category of the tensor.
        """
        logits = (normed @ weight.T).float()
        observer.tag(logits, "logits")
        return logits if self.bias is None else logits.add_(self.bias[vocab_slice])


class Logits(Protocol):
    """Passes over the logits of all counted tokens."""

    in_parts: bool
    """Whether the logits of one token are divided among several tiles."""

    def loss_sum(self, normed: Tensor) -> float:
        """Compute the summed cross-entropy in nats.

        Args:
            normed: (N, d), the normed hidden states, in compute precision.
        """

    def log_probs(self, normed: Tensor) -> Tensor:
        """Compute the log-probabilities of the labels, (N,) float32.

        Args:
            normed: As for `loss_sum`.
        """

    def walk(self, normed: Tensor, weight: TokenWeight, visit: Callable[[Tile], None]) -> float:
        """Go over all tiles. Labels are sampled in the first pass and kept for later ones.

        Args:
            normed: As for `loss_sum`; the same in each pass.
            weight: Factor of each token's loss in the gradient: one number for all tokens, or (N,) float32.
            visit: Receives one tile after the other, and must keep none. All vocabulary slices have the same chunks of
                tokens.

        Returns:
            The summed cross-entropy in nats.
        """


def comes_whole(weight: Weight, dtype: torch.dtype) -> bool:
    """Return whether a head's weight is used as a whole; else slice by slice of the vocabulary.

    Args:
        weight: The head's weight.
        dtype: Compute precision.
    """
    return weight.is_ready(dtype) and weight.num_bytes <= _MOST_WHOLE_BYTES


def keeps_logits(num_tokens: int, vocab_size: int, chunk_bytes: int) -> bool:
    """Return whether tiles over vocabulary slices keep their logits from the first pass for the second one.

    Args:
        num_tokens: Number of counted tokens.
        vocab_size: V.
        chunk_bytes: As in `LossOf`.
    """
    return 4 * num_tokens * vocab_size <= chunk_bytes


def logits_of(store: WeightStore, name: str, dtype: torch.dtype, loss: LossOf, observer: Observer) -> Logits:
    """Return the logits for a head's weight, with tiles that suit its format.

    Args:
        store: The weights.
        name: Name of the head's weight, (V, d).
        dtype: Compute precision.
        loss: The settings of the loss.
        observer: Receives the category of each tensor.
    """
    if comes_whole(store[name], dtype):
        return WholeLogits(store, name, dtype, loss, observer)
    return BlockLogits(store, name, dtype, loss, observer)


class WholeLogits(Logits):
    """Tiles over the whole vocabulary: one computation of the logits gives loss and gradient.

    Args:
        store: The weights.
        name: Name of the head's weight, (V, d).
        dtype: Compute precision, in which it is stored.
        loss: The settings of the loss.
        observer: Receives the category of each tensor.
    """

    in_parts = False

    def __init__(self, store: WeightStore, name: str, dtype: torch.dtype, loss: LossOf, observer: Observer) -> None:
        self._store, self._name, self._dtype, self._loss, self._observer = store, name, dtype, loss, observer
        self._clocks = loss.clocks

    def loss_sum(self, normed: Tensor) -> float:
        """See `Logits`; for given labels only."""
        labels, softcap, total = self._loss.labels, self._loss.softcap, 0.0
        with self._whole() as head:
            for tokens in self._chunks():
                # No name for the logits: they would live while the next ones are computed.
                total += float(
                    loss_sum(self._loss.logits(normed[tokens], head, _ALL, self._observer), labels[tokens], softcap)
                )
        return total

    def log_probs(self, normed: Tensor) -> Tensor:
        """See `Logits`."""
        found = torch.empty(len(normed), dtype=torch.float32, device=normed.device)
        with self._whole() as head:
            for tokens in self._chunks():
                logits = self._drawn(normed, tokens, head)
                found[tokens] = log_probs(logits, self._loss.labels[tokens], self._loss.softcap)
        self._clocks = None
        return found

    def walk(self, normed: Tensor, weight: TokenWeight, visit: Callable[[Tile], None]) -> float:
        """See `Logits`."""
        total = 0.0
        with self._whole() as head:
            for tokens in self._chunks():
                loss, grad = self._grad(normed, tokens, head, weight)
                total += float(loss)
                visit(Tile(tokens, slice(0, head.shape[0]), head, grad))
                del grad
        self._clocks = None
        return total

    def _grad(self, normed: Tensor, tokens: slice, head: Tensor, weight: TokenWeight) -> tuple[Tensor, Tensor]:
        logits = self._drawn(normed, tokens, head)
        token_weight = weight if isinstance(weight, float) else weight[tokens]
        loss, grad = loss_sum_and_grad(logits, self._loss.labels[tokens], self._loss.softcap, token_weight)
        self._observer.tag(grad, "logits")
        return loss, grad

    def _drawn(self, normed: Tensor, tokens: slice, head: Tensor) -> Tensor:
        """Return the logits of a chunk; sample its labels from them if they are to be sampled."""
        logits = self._loss.logits(normed[tokens], head, _ALL, self._observer)
        if self._clocks is not None:
            every_entry = slice(0, logits.shape[1])
            self._loss.labels[tokens] = self._clocks.sample(cap(logits, self._loss.softcap), tokens, every_entry)[1]
        return logits

    @contextmanager
    def _whole(self) -> Iterator[Tensor]:
        with self._store.borrow(self._name) as borrowed:
            yield borrowed[self._name].values(self._dtype)

    def _chunks(self) -> Iterator[slice]:
        return chunks(len(self._loss.labels), self._store[self._name].shape[0], self._loss.chunk_bytes)


class BlockLogits(Logits):
    """Tiles over vocabulary slices; the rows of a slice are decoded only while its tiles are computed.

    Args:
        store: The weights.
        name: Name of the head's weight, (V, d).
        dtype: Compute precision.
        loss: The settings of the loss.
        observer: Receives the category of each tensor.
    """

    in_parts = True

    def __init__(self, store: WeightStore, name: str, dtype: torch.dtype, loss: LossOf, observer: Observer) -> None:
        self._store, self._name, self._dtype, self._loss, self._observer = store, name, dtype, loss, observer
        self._online: OnlineLoss | None = None
        self._kept: Tensor | None = None  # (N, V) float32, between the first pass and the end of the first walk

    def loss_sum(self, normed: Tensor) -> float:
        """See `Logits`."""
        return self._first_pass(normed, keeps=False).total()

    def log_probs(self, normed: Tensor) -> Tensor:
        """See `Logits`."""
        return self._first_pass(normed).log_probs()

    def walk(self, normed: Tensor, weight: TokenWeight, visit: Callable[[Tile], None]) -> float:
        """See `Logits`."""
        online = self._first_pass(normed)

        def differentiate(tokens: slice, vocab_slice: slice, head: Tensor, logits: Tensor) -> None:
            token_weight = weight if isinstance(weight, float) else weight[tokens]
            grad = online.grad(tokens, vocab_slice, logits, token_weight)
            self._observer.tag(grad, "logits")
            visit(Tile(tokens, vocab_slice, head, grad))

        self._for_each_tile(normed, differentiate)
        self._kept = None  # a tied head lives until the last layer's backward, and may walk again after it
        return online.total()

    def _first_pass(self, normed: Tensor, *, keeps: bool = True) -> OnlineLoss:
        """Return the result of the first pass, which runs at the first call; keep the logits if they are few."""
        if self._online is not None:
            return self._online
        online = OnlineLoss(self._loss.labels, self._loss.softcap, self._loss.clocks)
        kept, shape = None, (len(normed), self._store[self._name].shape[0])
        if keeps and keeps_logits(*shape, self._loss.chunk_bytes):
            kept = torch.empty(shape, dtype=torch.float32, device=normed.device)
            self._observer.tag(kept, "logits")

        def take(tokens: slice, vocab_slice: slice, _: Tensor, logits: Tensor) -> None:
            if kept is not None:
                kept[tokens, vocab_slice] = logits
            online.take(tokens, vocab_slice, logits)

        self._for_each_tile(normed, take)
        self._online, self._kept = online, kept
        return online

    def _for_each_tile(self, normed: Tensor, use: Callable[[slice, slice, Tensor, Tensor], None]) -> None:
        vocab_size, width = self._store[self._name].shape
        slices = list(blocks(vocab_size, width * self._dtype.itemsize, self._loss.chunk_bytes))
        # The last slice may be smaller, but has the same chunks of tokens as the others.
        token_chunks = list(chunks(len(normed), slices[0].stop, self._loss.chunk_bytes))
        for vocab_slice in self._observer.parts(slices):
            with self._store.borrow_rows(self._name, vocab_slice, self._dtype) as (weight,):
                self._observer.tag(weight, "weights")
                for tokens in token_chunks:
                    if self._kept is None:
                        logits = self._loss.logits(normed[tokens], weight, vocab_slice, self._observer)
                    else:
                        logits = self._kept[tokens, vocab_slice].clone(memory_format=torch.contiguous_format)
                        self._observer.tag(logits, "logits")
                    use(tokens, vocab_slice, weight, logits)
                    del logits
            del weight
