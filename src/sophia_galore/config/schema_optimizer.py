"""What can be asked of the optimizer: the section `optimizer` of the schema."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sophia_galore.config.field_types import Count, Positive, Section
from sophia_galore.numerics.hyper import Hyper
from sophia_galore.optim import recipes
from sophia_galore.optim.recipes import ApolloSettings, GaLoreSettings


class GaLoreConfig(Section):
    """Gradient low-rank projection (Zhao et al., arXiv 2403.03507)."""

    rank: Count = Field(
        GaLoreSettings.rank, description="Columns of the basis; matrices with a side <= rank are trained dense."
    )
    update_proj_gap: Count = Field(
        GaLoreSettings.update_proj_gap, description="Steps between two refreshes of a basis."
    )
    scale: Positive = Field(GaLoreSettings.scale, description="Factor on the update that comes back from the subspace.")
    subspace: recipes.SubspaceName = Field(
        GaLoreSettings.subspace,
        description="How a basis is chosen: one power iteration from the last one, singular vectors (as published), "
        "these from a random sketch, or at random from the seed.",
    )
    rule: recipes.RuleName = Field(
        GaLoreSettings.rule, description="What turns the projected gradient into a direction."
    )
    residual: recipes.ResidualName = Field(
        GaLoreSettings.residual,
        description="The gradient outside of the subspace: left out, or scaled like the inside (Fira).",
    )
    moment_transport: bool = Field(
        GaLoreSettings.moment_transport, description="Moments move with the basis when it is refreshed."
    )
    stagger: bool = Field(
        GaLoreSettings.stagger, description="Spread the refreshes over the gap, so that no step stalls."
    )
    adaptive_gap: bool = Field(
        GaLoreSettings.adaptive_gap, description="Double the gap of a matrix while its subspace holds still."
    )
    projection_bits: recipes.ProjectionBits = Field(
        GaLoreSettings.projection_bits, description="Format of stored bases: fp32, bf16 or packed int4."
    )
    fast_path: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Form the projected gradient directly, never the full one: auto where nothing else is needed; "
        "the recorded grad_norm is then an estimate.",
    )
    dense_learning_rate: Positive | None = Field(
        None,
        description="Rate of what is not projected (norms, biases); null: learning_rate x scale (rule sgd: 2e-4).",
    )


class SophiaConfig(Section):
    """Sophia-G (Liu et al., arXiv 2305.14342), as `optimizer.type: sophia` or `optimizer.galore.rule: sophia`."""

    rho: Positive = Field(
        Hyper.rho, description="Factor on the curvature; smaller: more entries of a step are clipped."
    )
    curvature_every: int = Field(
        recipes.CURVATURE_EVERY, ge=1, description="Steps between two estimates of the curvature."
    )


class ApolloConfig(Section):
    """APOLLO and APOLLO-Mini (Zhu et al., arXiv 2412.05270)."""

    rank: Count | None = Field(None, description="Columns of the random projection; null: 128 (apollo_mini: 1).")
    update_proj_gap: Count = Field(ApolloSettings.update_proj_gap, description="Steps between two random projections.")
    scale: float | None = Field(
        ApolloSettings.scale,
        gt=0,
        description="Factor on the scaled gradient; null: sqrt(shorter side / rank), as long as AdamW's step.",
    )


class OptimizerConfig(Section):
    """Which rule changes the weights."""

    type: recipes.OptimizerName = Field("galore", description="The rule for weight matrices.")
    state_bits: recipes.StateBits = Field(
        recipes.STATE_BITS,
        description="Format of the optimizer's state: fp32, bf16, or blocks of 8-bit codes (small tensors stay fp32).",
    )
    betas: tuple[float, float] | None = Field(
        None, description="Decay of the first and second moment; null: the rule's own, such as [0.9, 0.999] for AdamW."
    )
    eps: float = Field(
        Hyper.eps, ge=recipes.SMALLEST_EPS, le=recipes.LARGEST, description="Added to the root of the second moment."
    )
    galore: GaLoreConfig = GaLoreConfig()
    sophia: SophiaConfig = SophiaConfig()
    apollo: ApolloConfig = ApolloConfig()
