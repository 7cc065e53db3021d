"""Cross-entropy of a chunk of tokens and its gradient with respect to the logits.

torch's own functions are used, so that backward starts from the same bits as ordinary autograd does:
where a layer's gradient nearly cancels (the key biases of Qwen2), a last bit here becomes 1e-6 there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from sophia_galore.numerics.random import draw_classes

TokenWeight = float | Tensor
"""What a token's loss is multiplied by in the gradient: one number for all tokens, or one for each, float32."""

# Bytes of one chunk's float32 logits where the user says nothing; log-probabilities and two gradients of that
# size come on top. A chunk's products read the whole weight of the head, which on a CPU takes longer than the
# arithmetic unless there are some 130 tokens in it: at 152k words, 32 tokens a chunk took 1.8 times as long.
_CHUNK_BYTES = {"cpu": 80 * 2**20, "cuda": 16 * 2**20}
# Below this a chunk's products are bound by reading the weight on any device.
_MIN_TOKENS = 32
# Bytes in compute precision of a block of the head's rows that is decoded at once, and what its rows are a multiple
# of: enough for the products with some hundred tokens to run at full speed.
_BLOCK_BYTES = 8 * 2**20
_MIN_WORDS = 64


def default_chunk_bytes(device: torch.device) -> int:
    """Bytes of the float32 logits that are worked on at once, if the user does not say."""
    return _CHUNK_BYTES[device.type]


def chunks(num_tokens: int, vocab_size: int, chunk_bytes: int) -> Iterator[slice]:
    """Slices over tokens such that one slice's float32 logits take about `chunk_bytes` at most."""
    size = chunk_tokens(vocab_size, chunk_bytes)
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def chunk_tokens(num_words: int, chunk_bytes: int) -> int:
    """How many tokens' float32 logits take about `chunk_bytes` at most, but no fewer than are worth it."""
    return max(_MIN_TOKENS, chunk_bytes // (4 * num_words))


def smaller_chunk_bytes(chunk_bytes: int, num_tokens: int, num_words: int) -> int | None:
    """Half as many bytes of logits at once, down to the fewest tokens.

    Args:
        chunk_bytes: As many as now, where there are enough tokens.
        num_tokens: How many there are.
        num_words: Words by which their logits are.

    Returns:
        At most half of what is worked on at once; None: it is the least.
    """
    least = 4 * num_words * _MIN_TOKENS
    now = min(max(chunk_bytes, least), 4 * num_words * num_tokens)
    return None if now <= least else max(least, now // 2)


def block_words(vocab_size: int, row_bytes: int, chunk_bytes: int) -> int:
    """How many words a block has.

    Args:
        vocab_size: V.
        row_bytes: Bytes of a row of the weight in compute precision.
        chunk_bytes: The float32 logits of the fewest tokens that are taken at once keep to it.
    """
    most = min(_BLOCK_BYTES // row_bytes, chunk_bytes // (4 * _MIN_TOKENS))
    return min(vocab_size, max(1, most // _MIN_WORDS) * _MIN_WORDS)


def blocks(vocab_size: int, row_bytes: int, chunk_bytes: int) -> Iterator[slice]:
    """Slices over the vocabulary, each a few MiB of the head's weight.

    Args:
        vocab_size: V.
        row_bytes: Bytes of a row of the weight in compute precision.
        chunk_bytes: The float32 logits of the fewest tokens that are taken at once keep to it.
    """
    size = block_words(vocab_size, row_bytes, chunk_bytes)
    for start in range(0, vocab_size, size):
        yield slice(start, min(start + size, vocab_size))


def loss_sum(logits: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """Summed cross-entropy in nats.

    Args:
        logits: (N, V) float32.
        labels: (N,) int64, all counted.
        softcap: Cap c of logits c * tanh(z / c) (Gemma 2); None: uncapped.

    Returns:
        Scalar.
    """
    return functional.cross_entropy(_capped(logits, softcap), labels, reduction="sum")


def log_probs(logits: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """(N,) float32: log p of each label; arguments as for `loss_sum`."""
    return functional.cross_entropy(_capped(logits, softcap), labels, reduction="none").neg_()


def loss_sum_and_grad(
    logits: Tensor, labels: Tensor, softcap: float | None, weight: TokenWeight
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy, and the gradient of the weighted sum with respect to the logits.

    Args:
        logits: (N, V) float32, not part of a graph.
        labels: (N,) int64, all counted.
        softcap: As for `loss_sum`.
        weight: One number, or (N,).

    Returns:
        Scalar: the sum of losses without weights; and (N, V) float32.
    """
    reduction = "sum" if isinstance(weight, float) else "none"
    with torch.enable_grad():
        capped = _capped(logits.requires_grad_(), softcap)
        loss = functional.cross_entropy(capped, labels, reduction=reduction)
    factor = torch.as_tensor(weight, dtype=loss.dtype, device=loss.device)
    (grad,) = torch.autograd.grad(loss, logits, factor)
    return loss.detach().sum(), grad


def draw_labels(logits: Tensor, softcap: float | None, generator: torch.Generator) -> Tensor:
    """One label a token from the model's own distribution, softmax(logits).

    Args:
        logits: (N, V) float32.
        softcap: As for `loss_sum`.
        generator: Draws; on the device of `logits`.

    Returns:
        (N,) int64.
    """
    return draw_classes(_capped(logits, softcap), generator)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
