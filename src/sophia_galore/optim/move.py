"""The last step of every route: rows of a weight are read, moved and written back."""

from __future__ import annotations

import torch
from torch import Tensor

from sophia_galore.numerics.noise import Noise
from sophia_galore.weights.weight import Weight


def read_decayed(weight: Weight, rate: float, weight_decay: float) -> Tensor:
    """Rows of a weight, decayed: (1 - rate * weight_decay) weight. To be changed, then written back.

    Args:
        weight: Rows of the stored weight.
        rate: Learning rate.
        weight_decay: Decoupled decay.

    Returns:
        float32, of a float64 weight float64; in these formats the stored rows themselves.
    """
    values = weight.values(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    return values.mul_(1 - rate * weight_decay) if weight_decay else values


def move(weight: Weight, direction: Tensor, rate: float, weight_decay: float, noise: Noise) -> None:
    """weight <- round((1 - rate * weight_decay) weight - rate * direction), in place.

    Args:
        weight: Rows of the stored weight.
        direction: float32, of the same shape.
        rate: Learning rate.
        weight_decay: Decoupled decay.
        noise: For the rounding of these rows.
    """
    weight.write(read_decayed(weight, rate, weight_decay).sub_(direction, alpha=rate), noise)
