"""`GaLore` and `Apollo`, for training loops of your own: gradients of large matrices are projected.

The routes are those of `plan/routes.py`. A matrix with both sides above the rank is projected; what is left (norms,
biases, smaller matrices) is trained by AdamW. Names are keys and are never looked into.
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
from sophia_galore.optim.members import param_shape
from sophia_galore.optim.recipes import ApolloSettings, GaLoreSettings, settings_among
from sophia_galore.optim.spec import SubspaceSpec
from sophia_galore.optim.torch_optimizer import Betas, TorchOptimizer


class _Projecting(TorchOptimizer):
    """Projects the gradients of large matrices."""

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

    The gradient of each matrix is projected to `rank` columns, `rule` turns that into a direction, and the weight
    moves by `lr * scale` times what comes back. The subspace is renewed every `update_proj_gap` steps. Matrices with a
    side that is not above `rank`, and everything that is no matrix, are trained by AdamW in full size. bfloat16
    weights are rounded stochastically, so that small updates are not lost.

    Parameters without a gradient at a step are left as they are, as are their states; each counts its own steps.
    `lr`, `weight_decay`, `betas`, `eps` and `rho` are read from `param_groups` at each step, so schedulers work. A
    group may have settings of its own, by the names below. A parameter that a second optimizer of these steps as well
    is warned about once.

    Args:
        params: `model.named_parameters()`; or `model.parameters()`, as trainers hand them over; or a list of groups:
            dicts whose "params" are either. States and random draws are kept by name. What comes without one is named
            by its position over all groups, "parameter 0" and so on, and a saved state is given back by position.
            float32, bfloat16 and float64 are trained; parameters that need no gradient may be of any kind. With
            float64, moments and directions are float32, and what is added to the weight is added in float64.
        lr: Learning rate of projected matrices.
        rank: Columns of the basis.
        update_proj_gap: Steps between two refreshes of a basis.
        scale: Factor on the update that comes back from the subspace.
        rule: What turns a projected gradient into a direction. "sophia" needs `watch` or `observe_curvature`.
        subspace: How a basis is chosen: one power iteration from the last one, singular vectors (as published), these
            from a random sketch, or at random from the seed, so that nothing is stored.
        residual: What is done about the gradient outside of the subspace: nothing, or Fira (arXiv 2410.01623).
        moment_transport: Whether moments move with the basis when it is refreshed.
        stagger: Whether refreshes are spread over the gap, so that no step stalls.
        adaptive_gap: Whether a matrix's gap doubles while its subspace holds still.
        projection_bits: Format of stored bases: float32, bfloat16 or packed four-bit integers.
        state_bits: Format of moments: float32, bfloat16, or eight-bit blocks; small tensors stay float32.
        betas: Decays of the first and the second moment; None: the rule's own, such as (0.9, 0.999) for AdamW,
            and AdamW's for what is not projected.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay of everything but vectors and scalars.
        rho: Sophia's factor on the curvature; smaller: more entries of a step are clipped.
        dense_lr: Rate of what is not projected; it then follows `lr` in proportion. None: `lr * scale`.
        curvature_every: Steps between two estimates of the curvature, for the rule "sophia".
        seed: Everything random is a function of it.

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

    AdamW runs on a random projection of the gradient; by how much it scales each channel there (APOLLO) or the
    whole matrix (Mini), the full gradient is scaled. What is said of parameters and groups at `GaLore` holds here.

    Args:
        params: As for `GaLore`.
        lr: Learning rate.
        rank: Columns of the random projection; None: 128, or 1 for Mini.
        mini: Whether one factor scales a whole matrix.
        update_proj_gap: Steps between two random projections.
        scale: Factor on the scaled gradient; None: sqrt(shorter side / rank), as long as AdamW's step.
        betas: Decays of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay of everything but vectors and scalars.
        state_bits: Format of moments: float32, bfloat16, or eight-bit blocks; small tensors stay float32.
        seed: Everything random is a function of it.

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
