"""Rules: pure functions from a gradient and its state to a direction.

    (grad, state, hyper, step) -> (direction, new state)

A weight then moves by `-lr * direction`. A rule knows neither names nor weights, so the same one
works on a full gradient and on one in a subspace. What state it needs is declared beside it as data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]

ADAMW_STATE: tuple[str, ...] = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class AdamWHyper:
    """Hyper-parameters of AdamW.

    Args:
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


def adamw(grad: Tensor, state: State, hyper: AdamWHyper, step: int) -> tuple[Tensor, State]:
    """The direction of Adam with bias correction (Kingma & Ba, arXiv 1412.6980, algorithm 1).

    The decoupled decay of AdamW (arXiv 1711.05101) is not part of the direction: it acts on the weight.

    Args:
        grad: Any shape, float.
        state: `exp_avg` and `exp_avg_sq`, each of the shape of `grad`.
        hyper: Hyper-parameters.
        step: Number of this parameter's step, counted from 1.

    Returns:
        The direction m_hat / (sqrt(v_hat) + eps), of the shape of `grad`, and the new state.
    """
    exp_avg = torch.lerp(state["exp_avg"], grad, 1 - hyper.beta1)
    exp_avg_sq = (state["exp_avg_sq"] * hyper.beta2).addcmul_(grad, grad, value=1 - hyper.beta2)
    denominator = exp_avg_sq.sqrt().div_((1 - hyper.beta2**step) ** 0.5).add_(hyper.eps)
    direction = (exp_avg / denominator).div_(1 - hyper.beta1**step)
    return direction, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
