"""The step of a parameter whose rule sees the full gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from sophia_galore.numerics.int8 import Stored
from sophia_galore.numerics.rules import RULES
from sophia_galore.optim.move import move, row_blocks
from sophia_galore.optim.spec import ParamSpec
from sophia_galore.optim.state import ParamState


def dense_step(
    spec: ParamSpec,
    state: ParamState,
    weight: Stored,
    grad: Tensor,
    *,
    step: int,
    rate: float,
    rounding: torch.Generator,
    state_rounding: torch.Generator,
) -> None:
    """Move a weight by its rule, by blocks of rows where the rule allows.

    Args:
        spec: The parameter.
        state: Its state, changed in place.
        weight: The stored weight, changed in place.
        grad: float32, of the shape of `weight`.
        step: Number of the parameter's step, counted from 1.
        rate: Learning rate.
        rounding: For the weight.
        state_rounding: For the state.
    """
    rule = RULES[spec.rule]
    norms = torch.zeros_like(grad[0]) if rule.column_norm else None
    for rows in row_blocks(weight) if rule.elementwise else [slice(None)]:
        direction, new = rule.update(grad[rows], state.read_all(rows), spec.hyper, step)
        state.write_all(new, state_rounding, rows)
        if norms is None:
            move(weight[rows], direction, rate, spec.weight_decay, rounding)
        else:
            norms += direction.square().sum(0)
    if norms is None:
        return
    # A second pass, since a column's norm is known only when all of its rows were seen.
    inverse = torch.where(norms > 0, norms.rsqrt(), 0.0)
    for rows in row_blocks(weight):
        direction = state.read("exp_avg", rows) if rule.slots else grad[rows]
        move(weight[rows], direction * inverse, rate, spec.weight_decay, rounding)
