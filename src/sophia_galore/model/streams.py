"""Models whose layers get several hidden states for each token.

With AltUp (Baykal et al., arXiv 2301.13310; Gemma 3n), a layer computes on one of P hidden states of a token and
predicts the others from it. The model makes the P of them from the embedding, and one of all of them behind the last
layer.

The engine keeps them side by side, as one hidden state that is P times as wide. So it divides, packs and keeps them as
those of any other model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_LEAST_SQUARE = 1e-5  # what the mean square of a hidden state is at least taken for


def count_streams(config: Any) -> int:
    """Return P, from a Hugging Face configuration."""
    return int(getattr(config, "altup_num_inputs", 1))


def side_by_side(streams: Tensor) -> Tensor:
    """Return (..., P * d) for P hidden states, (P, ..., d)."""
    return streams.movedim(0, -2).flatten(-2)


def apart(hidden: Tensor, count: int) -> Tensor:
    """Return (P, ..., d) for hidden states that are side by side, (..., P * d).

    Args:
        hidden: The hidden states.
        count: P.
    """
    parted: Tensor = hidden.unflatten(-1, (count, -1))
    return parted.movedim(-2, 0).contiguous()


class JoinedStreams(nn.Module):
    """What makes one hidden state of P behind the last layer, and the norm behind it.

    All but the first are projected and scaled to the first one's root mean square; then the mean is taken.

    Args:
        projections: The P - 1 projections, in the order of the hidden states.
        norm: The last norm.
    """

    def __init__(self, projections: nn.ModuleList, norm: nn.Module) -> None:
        super().__init__()
        self.projections, self.norm = projections, norm

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (..., d) for (..., P * d)."""
        first, *others = apart(hidden, len(self.projections) + 1)
        size = first.square().mean(-1, keepdim=True).sqrt()
        parts = [first]
        for projection, other in zip(self.projections, others, strict=True):
            projected = projection(other)
            own_size = projected.square().mean(-1, keepdim=True).clamp(min=_LEAST_SQUARE).sqrt()
            parts.append(projected * size / own_size)
        joined: Tensor = self.norm(torch.stack(parts).mean(0))
        return joined
