"""Cross-entropy and its gradient from logits that are computed one vocabulary slice at a time.

The softmax needs a sum over the whole vocabulary. A first pass over the slices computes this sum and the label's logit
for each token (Milakov & Gimelshein, arXiv 1805.02867, algorithm 3). A second pass then computes the gradient of each
slice independently.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sophia_galore.engine.cross_entropy import TokenWeight
from sophia_galore.numerics.clocks import Clocks


class OnlineLoss:
    """The cross-entropy of N tokens, computed in two passes over vocabulary slices.

    Args:
        labels: (N,) int64; sampled labels are written here.
        softcap: Cap c of logits c * tanh(z / c) (Gemma 2); None: uncapped.
        clocks: Sample the labels from softmax(logits); None: the labels are given.
    """

    def __init__(self, labels: Tensor, softcap: float | None, clocks: Clocks | None = None) -> None:
        self._labels, self._softcap, self._clocks = labels, softcap, clocks
        self._largest = torch.full(labels.shape, -torch.inf, device=labels.device)
        # The sum of exp(z - largest), which neither overflows nor underflows float32, whatever the logits are.
        self._sum = torch.zeros_like(self._largest)
        self._label_logit = torch.full_like(self._largest, torch.nan)
        self._earliest = torch.full_like(self._largest, -torch.inf)

    def take(self, tokens: slice, vocab_slice: slice, logits: Tensor) -> None:
        """Add a tile to the first pass. Each tile must be added exactly once.

        Args:
            tokens: The t tokens of the tile.
            vocab_slice: Its v vocabulary entries.
            logits: (t, v) float32; used up.
        """
        capped = logits if self._softcap is None else logits.div_(self._softcap).tanh_().mul_(self._softcap)
        if self._clocks is None:
            inside, places = self._places(tokens, vocab_slice)
        else:
            inside, places = self._draw(tokens, vocab_slice, capped, self._clocks)
        found = capped.gather(1, places[:, None])[:, 0]
        self._label_logit[tokens] = torch.where(inside, found, self._label_logit[tokens])
        before = self._largest[tokens]
        largest = torch.maximum(before, capped.amax(1))
        terms = capped.sub_(largest[:, None]).exp_().sum(1)
        self._sum[tokens] = self._sum[tokens] * torch.exp(before - largest) + terms
        self._largest[tokens] = largest

    def total(self) -> float:
        """Return the summed cross-entropy in nats; after the first pass."""
        return float((self._sum.log() + (self._largest - self._label_logit)).sum(dtype=torch.float64))

    def log_probs(self) -> Tensor:
        """Return the log-probabilities of the labels, (N,) float32; after the first pass."""
        return self._label_logit - self._largest - self._sum.log()

    def grad(self, tokens: slice, vocab_slice: slice, logits: Tensor, weight: TokenWeight) -> Tensor:
        """Compute the gradient of the weighted loss with respect to a tile of logits; the second pass.

        Args:
            tokens: The t tokens of the tile.
            vocab_slice: Its v vocabulary entries.
            logits: (t, v) float32, the same as in the first pass; used up.
            weight: Weight of these tokens: one number, or (t,) float32.

        Returns:
            (t, v) float32: weight (softmax - onehot), with the chain rule through the cap.
        """
        slope = None
        if self._softcap is not None:
            slope = logits.div_(self._softcap).tanh_()
            logits = slope * self._softcap
            slope.square_().neg_().add_(1)
        grad = logits.sub_(self._largest[tokens][:, None]).exp_().div_(self._sum[tokens][:, None])
        inside, places = self._places(tokens, vocab_slice)
        grad.scatter_add_(1, places[:, None], -inside[:, None].to(grad.dtype))
        grad.mul_(weight if isinstance(weight, float) else weight[:, None])
        return grad if slope is None else grad.mul_(slope)

    def _places(self, tokens: slice, vocab_slice: slice) -> tuple[Tensor, Tensor]:
        """Return whether each token's label is in the slice, and its index there (arbitrary if it is not)."""
        labels = self._labels[tokens]
        inside = (labels >= vocab_slice.start) & (labels < vocab_slice.stop)
        return inside, (labels - vocab_slice.start).clamp_(0, vocab_slice.stop - vocab_slice.start - 1)

    def _draw(self, tokens: slice, vocab_slice: slice, capped: Tensor, clocks: Clocks) -> tuple[Tensor, Tensor]:
        """Sample labels; return whether each token's label so far is in this slice, and its best entry's index."""
        earliest, places = clocks.sample(capped, tokens, vocab_slice)
        ahead = earliest > self._earliest[tokens]
        self._earliest[tokens] = torch.where(ahead, earliest, self._earliest[tokens])
        self._labels[tokens] = torch.where(ahead, places + vocab_slice.start, self._labels[tokens])
        return ahead, places
