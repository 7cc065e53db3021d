"""The update of a parameter from its full gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from sophia_galore.numerics.noise import Noise
from sophia_galore.numerics.row_blocks import row_blocks
from sophia_galore.numerics.rules import RULES
from sophia_galore.optim.move import move
from sophia_galore.optim.spec import ParamSpec
from sophia_galore.optim.state import ParamState
from sophia_galore.weights.weight import Weight


def dense_step(
    spec: ParamSpec,
    state: ParamState,
    weight: Weight,
    grad: Tensor,
    *,
    step: int,
    rate: float,
    noise: Noise,
    state_noise: Noise,
) -> None:
    """Update a weight from its full gradient, by blocks of rows if the rule works elementwise.

    Args:
        spec: The parameter.
        state: Its state, changed in place.
        weight: The stored weight, changed in place.
        grad: float32, of the shape of `weight`.
        step: Number of the parameter's step, counted from 1.
        rate: Learning rate.
        noise: Noise for rounding the weight.
        state_noise: Noise for rounding the state.
    """
    rule = RULES[spec.rule]
    columns = grad[0].numel()
    norms = torch.zeros_like(grad[0]) if rule.column_norm else None
    for rows in row_blocks(weight.shape) if rule.elementwise else [slice(None)]:
        direction, new = rule.update(grad[rows], state.read_all(rows), spec.hyper, step)
        state.write_all(new, state_noise, rows)
        if norms is None:
            move(weight[rows], direction, rate, spec.weight_decay, noise.rows(rows, columns))
        else:
            norms += direction.square().sum(0)
    if norms is None:
        return
    # A second pass, since a column's norm is known only after all of its rows.
    inverse = torch.where(norms > 0, norms.rsqrt(), 0.0)
    for rows in row_blocks(weight.shape):
        direction = state.read("exp_avg", rows) if rule.slots else grad[rows]
        move(weight[rows], direction * inverse, rate, spec.weight_decay, noise.rows(rows, columns))
