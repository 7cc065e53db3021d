"""`GaLore` and `Apollo` as `torch.optim` classes: gradients of large matrices are projected.

As in `plan/routes.py`, a matrix with both sides larger than the rank is projected, and everything else (norms, biases,
smaller matrices) is trained by AdamW. Parameter names serve only as keys.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from sophia_galore.numerics.hyper import Hyper
from sophia_galore.numerics.rules import RULES
from sophia_galore.optim import recipes
from sophia_galore.optim.arguments import Group, dense_ratio
from sophia_galore.optim.build import apollo_subspace, galore_subspace
from sophia_galore.optim.groups import Betas
from sophia_galore.optim.members import param_shape
from sophia_galore.optim.recipes import ApolloSettings, GaLoreSettings, settings_among
from sophia_galore.optim.spec import SubspaceSpec
from sophia_galore.optim.torch_optimizer import TorchOptimizer


class _Projecting(TorchOptimizer):
    """The base of the optimizers that project the gradients of large matrices."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], **more: Any) -> None:
        super().__init__(params, defaults, **more)
        matrices = [(group, shape) for group, _, param in self.members() if len(shape := param_shape(param)) == 2]
        if matrices and not any(self._is_projected(shape, group) for group, shape in matrices):
            warnings.warn(
                f"{type(self).__name__} projects nothing: each matrix has a side that is not above the rank "
                f"{defaults['rank']}, so AdamW trains them all. Lower the rank to project them.",
                stacklevel=3,
            )

    def _is_projected(self, shape: tuple[int, ...], group: Group) -> bool:
        return len(shape) == 2 and min(shape) > group["rank"]


class GaLore(_Projecting):
    """GaLore (Zhao et al., arXiv 2403.03507): full-parameter training with moments in a subspace.

    The gradient of each matrix is projected to `rank` columns, `rule` computes an update direction from it, and the
    weight moves by `lr * scale` times this direction, projected back to full size. The subspace is recomputed every
    `update_proj_gap` steps. Matrices with a side that is not above `rank`, and all other parameters, are trained by
    AdamW without projection. bfloat16 weights are rounded stochastically, so that small updates are not lost.

    A parameter without a gradient does not change at a step, nor does its state; each parameter counts its own steps.
    `lr`, `weight_decay`, `betas`, `eps` and `rho` are read from `param_groups` at each step, so schedulers work. Each
    group may set any of the settings below. If two of these optimizers update the same parameter, a warning is given
    once.

    Args:
        params: `model.named_parameters()`; or `model.parameters()`, as trainers hand them over; or a list of groups:
            dicts whose "params" are either. States and random numbers are kept by name. Parameters without names are
            named by their position over all groups, "parameter 0" and so on, and a saved state is restored by position.
            Trained parameters must be float32, bfloat16 or float64; others may have any dtype. With float64, moments
            and directions are float32, and the update is added to the weight in float64. If `fully_shard` sharded
            them, so are the states.
        lr: Learning rate of projected matrices.
        rank: Columns of the basis.
        update_proj_gap: Steps between two refreshes of a basis.
        scale: Factor on the update from the subspace.
        rule: The rule that computes a direction from the projected gradient. "sophia" needs `watch` or
            `observe_curvature`.
        subspace: How a basis is computed: "tracked", one power iteration from the last basis; "svd", singular vectors
            (as published); "randomized", singular vectors from a random sketch; "random", random from the seed, so that
            nothing is stored.
        residual: Use of the gradient outside of the subspace: "none", or "fira" (arXiv 2410.01623).
        moment_transport: Whether moments are transformed to the new basis at a refresh.
        stagger: Whether the refreshes of different matrices are spread over the gap, so that no step is slow.
        adaptive_gap: Whether a matrix's gap doubles while its subspace hardly changes.
        projection_bits: Format of stored bases: float32, bfloat16 or packed four-bit integers.
        state_bits: Format of moments: float32, bfloat16, or eight-bit blocks; small tensors stay float32.
        betas: Decay rates of the first and the second moment; None: the rule's defaults, such as (0.9, 0.999) for
            AdamW, and AdamW's for parameters that are not projected.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay, not applied to vectors and scalars.
        rho: Sophia's factor on the curvature; smaller: more entries of a step are clipped.
        dense_lr: Initial learning rate of parameters that are not projected; it changes in proportion to `lr`. None:
            `lr * scale`.
        curvature_every: Steps between two estimates of the curvature, for the rule "sophia".
        seed: Seed of all random numbers.

    Raises:
        ArgumentError: A setting or a parameter can't be used; it is a `ValueError` too.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        rank: int = GaLoreSettings.rank,
        update_proj_gap: int = GaLoreSettings.update_proj_gap,
        scale: float = GaLoreSettings.scale,
        rule: recipes.RuleName = GaLoreSettings.rule,
        subspace: recipes.SubspaceName = GaLoreSettings.subspace,
        residual: recipes.ResidualName = GaLoreSettings.residual,
        moment_transport: bool = GaLoreSettings.moment_transport,
        stagger: bool = GaLoreSettings.stagger,
        adaptive_gap: bool = GaLoreSettings.adaptive_gap,
        projection_bits: recipes.ProjectionBits = GaLoreSettings.projection_bits,
        state_bits: recipes.StateBits = recipes.STATE_BITS,
        betas: Betas | None = None,
        eps: float = Hyper.eps,
        weight_decay: float = 0.0,
        rho: float = Hyper.rho,
        dense_lr: float | None = None,
        curvature_every: int = recipes.CURVATURE_EVERY,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "rule": rule,
            "subspace": subspace,
            "residual": residual,
            "moment_transport": moment_transport,
            "stagger": stagger,
            "adaptive_gap": adaptive_gap,
            "projection_bits": projection_bits,
            "state_bits": state_bits,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rho": rho,
            "dense_lr": dense_lr,
        }
        super().__init__(params, defaults, seed=seed, curvature_every=curvature_every)

    def _complete(self, group: Group) -> None:
        if group["betas"] is None:
            group["dense_betas"] = RULES["adamw"].betas
        if "dense_ratio" not in group:
            group["dense_ratio"] = dense_ratio(group["lr"], group["dense_lr"], group["scale"], group["rule"])
        super()._complete(group)

    def _rule(self, group: Group, is_projected: bool) -> str:
        return group["rule"] if is_projected else "adamw"

    def _subspace(self, shape: tuple[int, ...], group: Group, place: float) -> SubspaceSpec:
        return galore_subspace(settings_among(GaLoreSettings, group), place)


class Apollo(_Projecting):
    """APOLLO and APOLLO-Mini (Zhu et al., arXiv 2412.05270): SGD-like memory, AdamW-like steps.

    AdamW runs on a random projection of the gradient. The factor by which it scales each channel there (APOLLO), or the
    whole matrix (Mini), is applied to the full gradient. Parameters and groups work as in `GaLore`.

    Args:
        params: As for `GaLore`.
        lr: Learning rate.
        rank: Columns of the random projection; None: 128, or 1 for Mini.
        mini: Whether one factor scales a whole matrix.
        update_proj_gap: Steps between two random projections.
        scale: Factor on the scaled gradient; None: sqrt(shorter side / rank), which makes the update about as long as
            AdamW's.
        betas: Decay rates of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay, not applied to vectors and scalars.
        state_bits: Format of moments: float32, bfloat16, or eight-bit blocks; small tensors stay float32.
        seed: Seed of all random numbers.

    Raises:
        ArgumentError: A setting or a parameter can't be used; it is a `ValueError` too.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        rank: int | None = None,
        mini: bool = ApolloSettings.mini,
        update_proj_gap: int = ApolloSettings.update_proj_gap,
        scale: float | None = ApolloSettings.scale,
        betas: Betas = RULES["adamw"].betas,
        eps: float = Hyper.eps,
        weight_decay: float = 0.0,
        state_bits: recipes.StateBits = recipes.STATE_BITS,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "rank": recipes.apollo_rank(rank, mini=mini),
            "mini": mini,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "state_bits": state_bits,
        }
        super().__init__(params, defaults, seed=seed)

    def _subspace(self, shape: tuple[int, ...], group: Group, place: float) -> SubspaceSpec:
        return apollo_subspace(settings_among(ApolloSettings, group), shape, place)
