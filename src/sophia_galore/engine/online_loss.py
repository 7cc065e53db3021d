"""Cross-entropy of tokens whose logits are seen a block of the vocabulary at a time, and its gradient.

The softmax needs the sum over all vocab_slice before the first of its values is known. One pass over the blocks
finds, for each token, that sum and the label's logit (Milakov & Gimelshein, arXiv 1805.02867, algorithm 3);
with them a second pass gives the gradient of each block by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sophia_galore.engine.cross_entropy import TokenWeight
from sophia_galore.numerics.random import draw_exponential


class OnlineLoss:
    """Losses of some tokens.

    Args:
        labels: (N,) int64; where a sampler draws them, changed in place.
        softcap: Cap c of logits c * tanh(z / c) (Gemma 2); None: uncapped.
        sampler: Draws the labels from softmax(logits), on the device of `labels`; None: they are given.
    """

    def __init__(self, labels: Tensor, softcap: float | None, sampler: torch.Generator | None = None) -> None:
        self._labels, self._softcap, self._sampler = labels, softcap, sampler
        self._largest = torch.full(labels.shape, -torch.inf, device=labels.device)
        # Of exp(z - largest): a sum that is neither too large nor too small for float32, whatever the logits are.
        self._sum = torch.zeros_like(self._largest)
        self._label_logit = torch.full_like(self._largest, torch.nan)
        self._earliest = torch.full_like(self._largest, -torch.inf)

    def take(self, tokens: slice, vocab_slice: slice, logits: Tensor) -> None:
        """The first pass: take in a tile. Each must come once.

        Args:
            tokens: Which tokens.
            vocab_slice: Which vocab_slice.
            logits: (tokens, vocab_slice) float32; used up.
        """
        capped = logits if self._softcap is None else logits.div_(self._softcap).tanh_().mul_(self._softcap)
        if self._sampler is None:
            inside, places = self._places(tokens, vocab_slice)
        else:
            inside, places = self._draw(tokens, vocab_slice, capped, self._sampler)
        found = capped.gather(1, places[:, None])[:, 0]
        self._label_logit[tokens] = torch.where(inside, found, self._label_logit[tokens])
        before = self._largest[tokens]
        largest = torch.maximum(before, capped.amax(1))
        terms = capped.sub_(largest[:, None]).exp_().sum(1)
        self._sum[tokens] = self._sum[tokens] * torch.exp(before - largest) + terms
        self._largest[tokens] = largest

    def total(self) -> float:
        """After the first pass: the summed cross-entropy in nats."""
        return float((self._sum.log() + (self._largest - self._label_logit)).sum(dtype=torch.float64))

    def log_probs(self) -> Tensor:
        """After the first pass: log-probabilities of the labels, (N,) float32."""
        return self._label_logit - self._largest - self._sum.log()

    def grad(self, tokens: slice, vocab_slice: slice, logits: Tensor, weight: TokenWeight) -> Tensor:
        """The second pass: the gradient of the weighted loss with respect to a tile of logits.

        Args:
            tokens: Which tokens.
            vocab_slice: Which vocab_slice.
            logits: (tokens, vocab_slice) float32, those of the first pass; used up.
            weight: Of these tokens: one number, or (tokens,) float32.

        Returns:
            (tokens, vocab_slice) float32: weight (softmax - onehot), by the chain rule through the cap.
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
        """Whether a token's label is one of the vocab_slice, and its place among them; if it is not, any place."""
        labels = self._labels[tokens]
        inside = (labels >= vocab_slice.start) & (labels < vocab_slice.stop)
        return inside, (labels - vocab_slice.start).clamp_(0, vocab_slice.stop - vocab_slice.start - 1)

    def _draw(
        self, tokens: slice, vocab_slice: slice, capped: Tensor, sampler: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Whether one of the vocab_slice is the label as far as is known, and the place of the one that would be."""
        # The first of all clocks to ring, clock j at rate exp(z_j), has the label. The largest z_j - log(clock at
        # rate 1) is the earliest.
        rings = draw_exponential(capped, sampler).log_().neg_().add_(capped)
        earliest, places = rings.max(1)
        ahead = earliest > self._earliest[tokens]
        self._earliest[tokens] = torch.where(ahead, earliest, self._earliest[tokens])
        self._labels[tokens] = torch.where(ahead, places + vocab_slice.start, self._labels[tokens])
        return ahead, places
