"""Cross-entropy of a chunk of tokens and its gradient with respect to the logits.

PyTorch's functions are used, so that backward starts from the same bits as ordinary autograd: where a layer's gradient
nearly cancels (the key biases of Qwen2), a difference in the last bit here becomes 1e-6 there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

TokenWeight = float | Tensor
"""The factor of a token's loss in the gradient: one number for all tokens, or (N,) float32, one per token."""

# Default size of one chunk's float32 logits, in bytes; log-probabilities and two gradients of that size come on top.
# A chunk's matrix products read the whole head weight. On a CPU, this takes longer than the arithmetic unless a chunk
# has about 130 tokens: at a vocabulary of 152k, 32 tokens per chunk took 1.8 times as long.
_CHUNK_BYTES = {"cpu": 80 * 2**20, "cuda": 16 * 2**20}
# With fewer tokens per chunk, reading the weight is the bottleneck on any device.
_MIN_TOKENS = 32
# Size of a vocabulary slice of the head that is decoded at once: bytes in compute precision, and the number that its
# rows are a multiple of. Large enough for matrix products with about a hundred tokens to run at full speed.
_BLOCK_BYTES = 8 * 2**20
_MIN_ENTRIES = 64


def default_chunk_bytes(device: torch.device) -> int:
    """Return the default size of the float32 logits that are computed at once, in bytes."""
    return _CHUNK_BYTES[device.type]


def chunks(num_tokens: int, vocab_size: int, chunk_bytes: int) -> Iterator[slice]:
    """Yield slices over tokens; the float32 logits of a slice take about `chunk_bytes` at most."""
    size = chunk_tokens(vocab_size, chunk_bytes)
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def chunk_tokens(num_entries: int, chunk_bytes: int) -> int:
    """Return the number of tokens whose float32 logits take about `chunk_bytes`, but at least 32."""
    return max(_MIN_TOKENS, chunk_bytes // (4 * num_entries))


def smaller_chunk_bytes(chunk_bytes: int, num_tokens: int, num_entries: int) -> int | None:
    """Return about half the chunk size, down to the smallest useful number of tokens.

    Args:
        chunk_bytes: The current chunk size in bytes.
        num_tokens: Number of counted tokens; a chunk never has more.
        num_entries: Vocabulary entries per token.

    Returns:
        At most half of the bytes that are in use now; None: the chunk is already as small as possible.
    """
    least = 4 * num_entries * _MIN_TOKENS
    now = min(max(chunk_bytes, least), 4 * num_entries * num_tokens)
    return None if now <= least else max(least, now // 2)


def block_entries(vocab_size: int, row_bytes: int, chunk_bytes: int) -> int:
    """Return the number of vocabulary entries in a slice.

    Args:
        vocab_size: V.
        row_bytes: Bytes of a row of the weight in compute precision.
        chunk_bytes: Limit for the float32 logits of the smallest chunk of tokens.
    """
    most = min(_BLOCK_BYTES // row_bytes, chunk_bytes // (4 * _MIN_TOKENS))
    return min(vocab_size, max(1, most // _MIN_ENTRIES) * _MIN_ENTRIES)


def blocks(vocab_size: int, row_bytes: int, chunk_bytes: int) -> Iterator[slice]:
    """Yield slices over the vocabulary, each a few MiB of the head's weight.

    Args:
        vocab_size: V.
        row_bytes: Bytes of a row of the weight in compute precision.
        chunk_bytes: Limit for the float32 logits of the smallest chunk of tokens.
    """
    size = block_entries(vocab_size, row_bytes, chunk_bytes)
    for start in range(0, vocab_size, size):
        yield slice(start, min(start + size, vocab_size))


def loss_sum(logits: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """Compute the summed cross-entropy in nats.

    Args:
        logits: (N, V) float32.
        labels: (N,) int64, all counted.
        softcap: Cap c of logits c * tanh(z / c) (Gemma 2); None: uncapped.

    Returns:
        Scalar.
    """
    return functional.cross_entropy(cap(logits, softcap), labels, reduction="sum")


def log_probs(logits: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """Compute log p of each label, (N,) float32; arguments as for `loss_sum`."""
    return functional.cross_entropy(cap(logits, softcap), labels, reduction="none").neg_()


def loss_sum_and_grad(
    logits: Tensor, labels: Tensor, softcap: float | None, weight: TokenWeight
) -> tuple[Tensor, Tensor]:
    """Compute the summed cross-entropy, and the gradient of its weighted sum with respect to the logits.

    Args:
        logits: (N, V) float32, not part of a graph.
        labels: (N,) int64, all counted.
        softcap: As for `loss_sum`.
        weight: One number for all tokens, or (N,) float32.

    Returns:
        The sum of the unweighted losses, a scalar; and the gradient, (N, V) float32.
    """
    reduction = "sum" if isinstance(weight, float) else "none"
    with torch.enable_grad():
        capped = cap(logits.requires_grad_(), softcap)
        loss = functional.cross_entropy(capped, labels, reduction=reduction)
    factor = torch.as_tensor(weight, dtype=loss.dtype, device=loss.device)
    (grad,) = torch.autograd.grad(loss, logits, factor)
    return loss.detach().sum(), grad


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    """Return softcap * tanh(logits / softcap); None: the logits themselves.

    Args:
        logits: Any shape.
        softcap: As for `loss_sum`.
    """
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
