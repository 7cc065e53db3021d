"""Eight-bit weights, as they are asked for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sophia_galore.config.fields import Section

LARGEST_BLOCK = 2**20
"""More weights than any row has."""


class QuantizationConfig(Section):
    """Eight-bit weights: native ones, which train, or those of bitsandbytes, which are frozen."""

    enabled: bool | None = Field(
        None,
        description="The switch: true: eight-bit weights; false: none, whatever load_in_8bit says; null: as "
        "load_in_8bit.",
    )
    load_in_8bit: bool | None = Field(
        None,
        description="Which kind: weights in eight bits, the only one there is. Without `enabled` it switches them on.",
    )
    backend: Literal["native", "bitsandbytes"] = Field(
        "native",
        description="native: all weight matrices in int8, all trained. bitsandbytes: the layers' matrices in "
        "Linear8bitLt, frozen; the rest is trained by AdamW.",
    )
    block_size: int = Field(
        128, ge=0, le=LARGEST_BLOCK, description="Neighbouring weights of a row that share a scale; 0: the whole row."
    )
    skip: tuple[str, ...] = Field(
        (),
        description="Names of weights that stay in model.store; * stands for anything. A pattern must match a weight.",
    )
    rounding: Literal["stochastic", "nearest"] = Field(
        "stochastic",
        description="How a step is rounded to int8: at random with the right mean, or to nearest, which loses small "
        "steps (to see how much).",
    )
    fold: Literal["step", "refresh"] = Field(
        "step",
        description="When updates go into int8: at every step, or when the basis is refreshed, with the sum of the "
        "updates kept in the subspace in bf16 until then.",
    )

    @property
    def int8(self) -> bool:
        """Whether weights are held in eight bits."""
        return holds_int8(self.enabled, self.load_in_8bit)


def holds_int8(enabled: object, load_in_8bit: object) -> bool:
    """Whether the two keys of `quantization`, each true, false or None, ask for weights in eight bits together."""
    return bool(load_in_8bit if enabled is None else enabled)
