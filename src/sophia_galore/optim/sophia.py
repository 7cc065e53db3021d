"""`Sophia` as a `torch.optim` class: a curvature in place of squared gradients, without projection."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sophia_galore.numerics.hyper import Hyper
from sophia_galore.numerics.rules import RULES
from sophia_galore.optim.arguments import Group
from sophia_galore.optim.groups import Betas
from sophia_galore.optim.recipes import CURVATURE_EVERY, STATE_BITS, StateBits
from sophia_galore.optim.torch_optimizer import TorchOptimizer


class Sophia(TorchOptimizer):
    """Sophia-G (Liu et al., arXiv 2305.14342): the first moment divided by a curvature, each entry clipped to 1.

    The curvature is estimated before the first step and then every `curvature_every` steps, from labels that are
    sampled from the model: call `sophia_galore.watch(optimizer, model)` once, or `observe_curvature` yourself.
    Parameters and groups work as in `GaLore`; nothing is projected.

    Args:
        params: As for `GaLore`.
        lr: Learning rate, which is also the largest change of a weight in a step.
        betas: Decay rates of the first moment (per step) and of the curvature (per estimate).
        rho: Factor on the curvature (gamma in the paper); smaller: more entries of a step are clipped.
        eps: Smallest denominator.
        weight_decay: Decoupled weight decay, not applied to vectors and scalars.
        state_bits: Format of moment and curvature: float32, bfloat16, or eight-bit blocks; small tensors stay float32.
        curvature_every: Steps between two estimates of the curvature.
        seed: Seed of all random numbers.

    Raises:
        ArgumentError: A setting or a parameter can't be used; it is a `ValueError` too.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: Betas = RULES["sophia"].betas,
        rho: float = Hyper.rho,
        eps: float = Hyper.eps,
        weight_decay: float = 0.0,
        state_bits: StateBits = STATE_BITS,
        curvature_every: int = CURVATURE_EVERY,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "state_bits": state_bits,
        }
        super().__init__(params, defaults, seed=seed, curvature_every=curvature_every)

    def _rule(self, group: Group, is_projected: bool) -> str:
        return "sophia"
