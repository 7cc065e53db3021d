"""Cross-entropy of a chunk of tokens, whose gradient is written over the logits themselves:

    loss = sum(logsumexp(z) - z[label])        dz = (softmax(z) - onehot(label)) / divisor

With a soft cap c (Gemma 2), z = c tanh(y / c), the gradient is multiplied by 1 - (z / c)^2.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes of one chunk's float32 logits: 32 MiB is some 170 tokens at 49k words, 55 at 152k.
_CHUNK_BYTES = 32 * 2**20


def chunks(num_tokens: int, vocab_size: int) -> Iterator[slice]:
    """Slices over tokens such that one slice's float32 logits take at most about 32 MiB."""
    size = max(16, _CHUNK_BYTES // (4 * vocab_size))
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def chunk_logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """Logits of a chunk.

    Args:
        hidden: (N, d) normed hidden states in compute precision.
        weight: (V, d) head weight in compute precision.
        softcap: The cap, or None.

    Returns:
        (N, V) float32.
    """
    logits = (hidden @ weight.T).float()
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy in nats; `logits` is destroyed.

    Args:
        logits: (N, V) float32.
        labels: (N,) int64, all counted.

    Returns:
        Scalar, float64.
    """
    return _softmax_(logits, labels)


def loss_sum_and_grad_(logits: Tensor, labels: Tensor, softcap: float | None, divisor: float) -> Tensor:
    """Summed cross-entropy; `logits` becomes the gradient of loss / divisor by the uncapped logits.

    Args:
        logits: (N, V) float32, capped; overwritten.
        labels: (N,) int64, all counted.
        softcap: The cap that was applied, or None.
        divisor: What the loss is divided by, such as the counted tokens of the effective batch.

    Returns:
        Scalar, float64: the sum of losses, not divided.
    """
    slope = None if softcap is None else logits.div(softcap).square_().neg_().add_(1)
    loss = _softmax_(logits, labels)
    logits[torch.arange(len(labels), device=labels.device), labels] -= 1
    logits.div_(divisor)
    if slope is not None:
        logits.mul_(slope)
    return loss


def _softmax_(logits: Tensor, labels: Tensor) -> Tensor:
    """Turn logits to probabilities in place; the summed cross-entropy, float64."""
    logits.sub_(logits.amax(1, keepdim=True))
    target = logits.gather(1, labels[:, None]).squeeze(1)
    total = logits.exp_().sum(1)
    logits.div_(total[:, None])
    return (total.log() - target).sum(dtype=torch.float64)
