"""Update rules of optimizers: pure functions from a gradient and its state to a direction.

    (grad, state, hyper, step) -> (direction, new state)

The weight then changes by `-lr * direction`. A rule has no access to names or weights, so it works on full and on
projected gradients. The state that it needs is declared in `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sophia_galore.numerics.hyper import Hyper

State = dict[str, Tensor]


@dataclass(frozen=True)
class Slot:
    """One state tensor of a rule.

    Args:
        extent: "full": of the gradient's shape (a, b); "rows": (a, 1); "columns": (1, b).
        moment: 1: a mean of gradients; 2: a mean of their squares, never negative.
    """

    extent: Literal["full", "rows", "columns"]
    moment: Literal[1, 2]


@dataclass(frozen=True)
class Rule:
    """An update rule and its properties.

    Args:
        update: The pure function.
        slots: Its state, by name.
        betas: Default decay of the first and the second moment.
        elementwise: Whether blocks of rows can be processed independently.
        column_norm: Whether the direction is divided by the norms of its columns afterwards; the direction is then the
            first moment or the gradient.
    """

    update: Callable[[Tensor, State, Hyper, int], tuple[Tensor, State]]
    slots: Mapping[str, Slot]
    betas: tuple[float, float] = (Hyper.beta1, Hyper.beta2)
    elementwise: bool = True
    column_norm: bool = False


def adamw(grad: Tensor, state: State, hyper: Hyper, step: int) -> tuple[Tensor, State]:
    """Return the direction of Adam with bias correction (Kingma & Ba, arXiv 1412.6980, algorithm 1).

    The decoupled decay of AdamW (arXiv 1711.05101) is not part of the direction: it acts on the weight.

    Args:
        grad: Any shape, float.
        state: `exp_avg` and `exp_avg_sq`, each of the shape of `grad`.
        hyper: beta1, beta2, eps.
        step: Number of this parameter's step, counted from 1.

    Returns:
        The direction m_hat / (sqrt(v_hat) + eps), of the shape of `grad`, and the new state.
    """
    exp_avg = torch.lerp(state["exp_avg"], grad, 1 - hyper.beta1)
    exp_avg_sq = (state["exp_avg_sq"] * hyper.beta2).addcmul_(grad, grad, value=1 - hyper.beta2)
    denominator = exp_avg_sq.sqrt().div_((1 - hyper.beta2**step) ** 0.5).add_(hyper.eps)
    direction = (exp_avg / denominator).div_(1 - hyper.beta1**step)
    return direction, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def sophia(grad: Tensor, state: State, hyper: Hyper, step: int) -> tuple[Tensor, State]:
    """Return the direction of Sophia (Liu et al., arXiv 2305.14342, algorithm 3): clip(m / max(rho h, eps), -1, 1).

    Args:
        grad: Any shape, float.
        state: `exp_avg` and `curvature` (written by `sophia_curvature`), each of the shape of `grad`.
        hyper: beta1, rho, eps.
        step: Not used.

    Returns:
        The direction, entries in [-1, 1], and the new state. Where the curvature is 0 so far, the direction
        is the sign of the first moment.
    """
    exp_avg = torch.lerp(state["exp_avg"], grad, 1 - hyper.beta1)
    denominator = (state["curvature"] * hyper.rho).clamp_min_(hyper.eps)
    return (exp_avg / denominator).clamp_(-1, 1), {"exp_avg": exp_avg}


def sophia_curvature(grad: Tensor, curvature: Tensor | None, hyper: Hyper, num_samples: int) -> Tensor:
    """Return the Gauss-Newton-Bartlett estimate of the Hessian's diagonal, averaged (arXiv 2305.14342, algorithm 2).

    h_hat = B g * g for the gradient g of the mean loss over B labels that were sampled from the model.
    The first estimate is used without averaging: starting from h = 0, as in the paper, the average would be far too low
    for the first 1 / (1 - beta2) estimates, which is longer than many fine-tuning runs.

    Args:
        grad: Any shape, float: the gradient with sampled labels.
        curvature: The current h, of the shape of `grad`; None: this is the first estimate.
        hyper: beta2.
        num_samples: B, the number of labels over which the loss is a mean.

    Returns:
        The new h, of the shape of `grad`.
    """
    estimate = grad.square().mul_(num_samples)
    return estimate if curvature is None else torch.lerp(curvature, estimate, 1 - hyper.beta2)


def adafactor(grad: Tensor, state: State, hyper: Hyper, step: int) -> tuple[Tensor, State]:
    """Return the direction of Adafactor (Shazeer & Stern, arXiv 1804.04235, algorithm 4) with a first moment.

    Row and column means r, c of the squared gradient give V = r c / mean(r); beta2_t = 1 - t^-0.8; the update is
    divided by its root mean square if that is above 1 (d = 1). Step sizes are not relative.

    Args:
        grad: (a, b), float.
        state: `exp_avg` (a, b), `row_sq` (a, 1), `column_sq` (1, b).
        hyper: beta1, eps (added to the squares, squared).
        step: Number of this parameter's step, counted from 1.

    Returns:
        The direction, of the shape of `grad`, and the new state.
    """
    decay = 1 - step**-0.8
    squares = grad.square().add_(hyper.eps**2)
    row_sq = torch.lerp(squares.mean(1, keepdim=True), state["row_sq"], decay)
    column_sq = torch.lerp(squares.mean(0, keepdim=True), state["column_sq"], decay)
    # If eps^2 is too small for float32, a row or column of zeros would give 0 / 0.
    tiny = torch.finfo(row_sq.dtype).tiny
    relative = (row_sq / row_sq.mean().clamp_min(tiny)).clamp_min_(tiny)
    update = grad * relative.rsqrt() * column_sq.clamp_min(tiny).rsqrt()
    update.div_(update.square().mean().sqrt().clamp_min(1.0))
    exp_avg = torch.lerp(state["exp_avg"], update, 1 - hyper.beta1)
    direction = exp_avg / (1 - hyper.beta1**step)
    return direction, {"exp_avg": exp_avg, "row_sq": row_sq, "column_sq": column_sq}


def sgd(grad: Tensor, state: State, hyper: Hyper, step: int) -> tuple[Tensor, State]:
    """Return the direction of SGD with heavy-ball momentum (Polyak 1964, as `torch.optim.SGD`): b <- beta1 b + g.

    Args:
        grad: Any shape, float.
        state: `exp_avg`, of the shape of `grad`.
        hyper: beta1.
        step: Not used.

    Returns:
        The direction b and the new state.
    """
    momentum = (state["exp_avg"] * hyper.beta1).add_(grad)
    return momentum.clone(), {"exp_avg": momentum}


# Newton-Schulz coefficients of Jordan et al.: five rounds map singular values in (0, 1] to about [0.7, 1.2].
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_ROUNDS = 5


def muon(grad: Tensor, state: State, hyper: Hyper, step: int) -> tuple[Tensor, State]:
    """Return the orthogonalised momentum (Jordan et al., "Muon", kellerjordan.github.io/posts/muon; Nesterov form).

    It is computed by a Newton-Schulz iteration and scaled to a root mean square of about 0.2, as AdamW's (Liu et al.,
    arXiv 2502.16982, equation 4), so that the same learning rates can be used.

    Args:
        grad: (a, b), float.
        state: `exp_avg`, of the shape of `grad`.
        hyper: beta1.
        step: Not used.

    Returns:
        The direction, of the shape of `grad`, and the new state.
    """
    exp_avg = torch.lerp(state["exp_avg"], grad, 1 - hyper.beta1)
    direction = _orthogonalised(torch.lerp(exp_avg, grad, 1 - hyper.beta1))
    return direction.mul_(0.2 * max(grad.shape) ** 0.5), {"exp_avg": exp_avg}


def _orthogonalised(matrix: Tensor) -> Tensor:
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    norm = torch.linalg.vector_norm(wide)
    x = torch.where(norm > 0, wide / norm, 0.0)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_NEWTON_SCHULZ_ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if wide is not matrix else x


def gradient(grad: Tensor, state: State, hyper: Hyper, step: int) -> tuple[Tensor, State]:
    """Return the gradient itself.

    Args:
        grad: Any shape.
        state: Empty.
        hyper: Not used.
        step: Not used.

    Returns:
        `grad` and an empty state.
    """
    return grad, {}


def mean_gradient(grad: Tensor, state: State, hyper: Hyper, step: int) -> tuple[Tensor, State]:
    """Return the running mean of gradients, m <- beta1 m + (1 - beta1) g.

    Args:
        grad: Any shape.
        state: `exp_avg`, of the shape of `grad`.
        hyper: beta1.
        step: Not used.

    Returns:
        m and the new state.
    """
    exp_avg = torch.lerp(state["exp_avg"], grad, 1 - hyper.beta1)
    return exp_avg, {"exp_avg": exp_avg}


_FIRST = Slot("full", 1)
_SECOND = Slot("full", 2)

RULES: dict[str, Rule] = {
    "adamw": Rule(adamw, {"exp_avg": _FIRST, "exp_avg_sq": _SECOND}),
    "sophia": Rule(sophia, {"exp_avg": _FIRST, "curvature": _SECOND}, (0.965, 0.99)),
    "adafactor": Rule(
        adafactor, {"exp_avg": _FIRST, "row_sq": Slot("rows", 2), "column_sq": Slot("columns", 2)}, elementwise=False
    ),
    "sgd": Rule(sgd, {"exp_avg": _FIRST}),
    "muon": Rule(muon, {"exp_avg": _FIRST}, (0.95, 0.999), elementwise=False),
    # SCALE (Glentis et al., arXiv 2506.16659, algorithm 1): columns of the gradient divided by their norms; a first
    # moment for the last layer only.
    "scale": Rule(gradient, {}, column_norm=True),
    "scale_momentum": Rule(mean_gradient, {"exp_avg": _FIRST}, column_norm=True),
}
"""Every rule by its name."""
