"""LFM, of Liquid AI: short convolutions, and attention in some layers."""

from __future__ import annotations

from typing import Any

from sophia_galore.model.specification import Specification, hub_ids, layers_at, sizes

_LFM2 = {
    "model_type": "lfm2",
    "dtype": "bfloat16",
    "vocab_size": 65_536,
    "max_position_embeddings": 128_000,
    "conv_L_cache": 3,
    "conv_bias": False,
    "tie_word_embeddings": True,
}
_LFM3_FULL = (2, 6, 10, 14, 18, 22)
_LFM3_WINDOWS = (4, 8, 12, 16, 20)


def _attention_at(*indices: int, layers: int = 16) -> dict[str, list[str]]:
    return {"layer_types": layers_at(layers, indices, "full_attention", "conv")}


def _small(hidden: int, intermediate: int, heads: int) -> dict[str, Any]:
    """One with 16 layers. The width of its MLP is two thirds of what config.json says, in whole multiples of 256."""
    return {
        **_LFM2,
        **sizes(hidden, intermediate, 16, heads, 8),
        **_attention_at(2, 5, 8, 10, 12, 14),
        "block_auto_adjust_ff_dim": True,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
    }


LFM: tuple[Specification, ...] = (
    Specification("lfm2-350m", 354_483_968, _small(1_024, 6_656, 16), hub_ids("LiquidAI", "LFM2-350M")),
    Specification("lfm2-700m", 742_489_344, _small(1_536, 10_240, 24), hub_ids("LiquidAI", "LFM2-700M")),
    Specification(
        "lfm2-1.2b",
        1_170_340_608,
        _small(2_048, 12_288, 32),
        hub_ids("LiquidAI", "LFM2-1.2B", "LFM2.5-1.2B-Base", "LFM2.5-1.2B-Instruct"),
    ),
    Specification(
        "lfm2-2.6b",
        2_569_272_320,
        {
            **_LFM2,
            **sizes(2_048, 10_752, 30, 32, 8),
            **_attention_at(2, 5, 9, 13, 17, 21, 24, 27, layers=30),
            "block_auto_adjust_ff_dim": False,
        },
        hub_ids("LiquidAI", "LFM2-2.6B"),
    ),
    Specification(
        "lfm2-8b-a1b",
        8_339_929_856,
        {
            **_LFM2,
            **sizes(2_048, 7_168, 24, 32, 8),
            **_attention_at(2, 6, 10, 14, 18, 21, layers=24),
            "model_type": "lfm2_moe",
            "moe_intermediate_size": 1_792,
            "num_dense_layers": 2,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "use_expert_bias": True,
        },
        hub_ids("LiquidAI", "LFM2-8B-A1B"),
    ),
    Specification(
        "lfm3-1.7b",
        1_728_801_536,
        {
            "model_type": "lfm3",
            "dtype": "bfloat16",
            "vocab_size": 128_000,
            "head_dim": 128,
            "max_position_embeddings": 262_144,
            "layer_types": [
                "full_attention" if index in _LFM3_FULL else "sliding_attention" if index in _LFM3_WINDOWS else "conv"
                for index in range(24)
            ],
            "sliding_window": 256,
            "conv_L_cache": 7,
            "conv_bias": False,
            "tie_word_embeddings": True,
            **sizes(2_048, 7_680, 24, 16, 4),
        },
        hub_ids("LiquidAI", "LFM3-1.7B", "LFM3-1.7B-Base"),
    ),
)
