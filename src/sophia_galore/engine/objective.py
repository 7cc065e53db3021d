"""The losses that a step can minimise: functions of the log-probabilities of the counted tokens.

The gradient of such a loss L with respect to the logits of token t is w_t (softmax - onehot) with
w_t = -dL / d log p_t, so the head needs only these weights. A new loss is a new class here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sophia_galore.data.batches import IGNORED, MicroBatch


@dataclass(frozen=True)
class CountedTokens:
    """The tokens of an effective batch whose loss counts, in the order of micro-batches, rows and positions.

    Args:
        labels: (N,) int64, the labels.
        sequences: (N,) int64, the example that each belongs to, numbered over the effective batch.
    """

    labels: Tensor
    sequences: Tensor


class Objective:
    """The base class of all objectives; by itself the mean cross-entropy over the counted tokens.

    Attributes:
        samples_labels: Whether labels are sampled from the model's distribution instead of taken from the data.
        needs_log_probs: Whether the weights depend on the log-probabilities. If so, the head computes these in an extra
            pass and calls `weigh`; if not, every token has the weight 1 / N.
    """

    samples_labels: bool = False
    needs_log_probs: bool = False

    def weigh(self, tokens: CountedTokens, log_probs: Tensor) -> tuple[float, Tensor]:
        """Compute the loss and the token weights. Called only if `needs_log_probs` is true.

        Args:
            tokens: The counted tokens.
            log_probs: (N,) float32, log p of each token's label.

        Returns:
            The loss, and the weights, (N,) float32: minus the derivative of the loss with respect to each
            log-probability.
        """
        return float(-log_probs.mean()), torch.full_like(log_probs, 1 / len(log_probs))


class CrossEntropy(Objective):
    """The mean cross-entropy of the data's labels."""


class SampledCrossEntropy(Objective):
    """The mean cross-entropy of labels that are sampled from the model's distribution.

    Sophia's Gauss-Newton-Bartlett estimate of the curvature is made from its gradient (arXiv 2305.14342, algorithm 2).
    """

    samples_labels = True


def sequence_numbers(batches: Sequence[MicroBatch]) -> Tensor:
    """Return the number of the example that each counted token belongs to, (N,) int64."""
    found, first = [], 0
    for batch in batches:
        lengths = batch.lengths or [(batch.input_ids.shape[1],)] * len(batch.input_ids)
        rows: list[list[int]] = []
        for row in lengths:
            rows.append([first + place for place, length in enumerate(row) for _ in range(length)])
            first += len(row)
        width = batch.input_ids.shape[1]
        numbers = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=batch.labels.device)
        found.append(numbers[batch.labels != IGNORED])
    return torch.cat(found)
