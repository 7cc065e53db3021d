"""Write an update into a weight: read rows, change them, and round them back into the weight's format."""

from __future__ import annotations

import torch
from torch import Tensor

from sophia_galore.numerics.noise import Noise
from sophia_galore.weights.weight import Weight


def read_decayed(weight: Weight, rate: float, weight_decay: float) -> Tensor:
    """Return (1 - rate * weight_decay) weight, to be changed by the caller and written back.

    Args:
        weight: Rows of the stored weight.
        rate: Learning rate.
        weight_decay: Decoupled decay.

    Returns:
        float32, or float64 for a float64 weight. If the weight is stored in this precision, these are the stored rows
        themselves, decayed in place.
    """
    values = weight.values(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    return values.mul_(1 - rate * weight_decay) if weight_decay else values


def move(weight: Weight, direction: Tensor, rate: float, weight_decay: float, noise: Noise) -> None:
    """Update rows in place: weight <- round((1 - rate * weight_decay) weight - rate * direction).

    Args:
        weight: Rows of the stored weight.
        direction: float32, of the same shape.
        rate: Learning rate.
        weight_decay: Decoupled decay.
        noise: Noise for rounding these rows.
    """
    weight.write(read_decayed(weight, rate, weight_decay).sub_(direction, alpha=rate), noise)
