"""Granite, of IBM."""

from __future__ import annotations

from typing import Any

from sophia_galore.model.specification import Specification, hub_ids, layers_at, sizes

# Four more tokens than the base models have.
_GRANITE3 = {
    "model_type": "granite",
    "dtype": "bfloat16",
    "vocab_size": 49_159,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}
_GRANITE4 = {
    "model_type": "granitemoehybrid",
    "dtype": "bfloat16",
    "vocab_size": 100_352,
    "max_position_embeddings": 131_072,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
# State spaces, but for four layers of attention.
_HYBRID = {
    **_GRANITE4,
    "layer_types": layers_at(40, (5, 15, 25, 35), "attention", "mamba"),
    "position_embedding_type": "nope",
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_proj_bias": False,
}


def _dense(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        **_GRANITE4,
        **sizes(hidden, intermediate, layers, heads, kv_heads),
        "layer_types": ["attention"] * layers,
        "position_embedding_type": "rope",
        "shared_intermediate_size": intermediate,
    }


GRANITE: tuple[Specification, ...] = (
    Specification(
        "granite-3.3-2b",
        2_533_539_840,
        {**_GRANITE3, **sizes(2_048, 8_192, 40, 32, 8)},
        hub_ids("ibm-granite", "granite-3.3-2b-instruct"),
    ),
    Specification(
        "granite-3.3-8b",
        8_170_864_640,
        {**_GRANITE3, **sizes(4_096, 12_800, 40, 32, 8)},
        hub_ids("ibm-granite", "granite-3.3-8b-instruct"),
    ),
    Specification(
        "granite-4.0-350m",
        352_379_904,
        {**_dense(1_024, 2_048, 28, 16, 4), "max_position_embeddings": 32_768},
        hub_ids("ibm-granite", "granite-4.0-350m", "granite-4.0-350m-base"),
    ),
    Specification(
        "granite-4.0-1b",
        1_631_750_144,
        _dense(2_048, 4_096, 40, 16, 4),
        hub_ids("ibm-granite", "granite-4.0-1b", "granite-4.0-1b-base"),
    ),
    Specification(
        "granite-4.0-micro",
        3_402_836_480,
        _dense(2_560, 8_192, 40, 40, 8),
        hub_ids("ibm-granite", "granite-4.0-micro", "granite-4.0-micro-base"),
    ),
    Specification(
        "granite-4.0-h-1b",
        1_461_538_368,
        {**_HYBRID, **sizes(1_536, 4_096, 40, 12, 4), "shared_intermediate_size": 4_096, "mamba_n_heads": 48},
        hub_ids("ibm-granite", "granite-4.0-h-1b", "granite-4.0-h-1b-base"),
    ),
    Specification(
        "granite-4.0-h-micro",
        3_191_396_096,
        {**_HYBRID, **sizes(2_048, 8_192, 40, 32, 8), "shared_intermediate_size": 8_192, "mamba_n_heads": 64},
        hub_ids("ibm-granite", "granite-4.0-h-micro", "granite-4.0-h-micro-base"),
    ),
    Specification(
        "granite-4.0-h-tiny",
        6_939_037_248,
        {
            **_HYBRID,
            **sizes(1_536, 512, 40, 12, 4),
            "shared_intermediate_size": 1_024,
            "num_local_experts": 64,
            "num_experts_per_tok": 6,
            "mamba_n_heads": 48,
        },
        hub_ids("ibm-granite", "granite-4.0-h-tiny", "granite-4.0-h-tiny-base"),
    ),
    Specification(
        "granite-4.0-h-small",
        32_207_337_984,
        {
            **_HYBRID,
            **sizes(4_096, 768, 40, 32, 8),
            "shared_intermediate_size": 1_536,
            "num_local_experts": 72,
            "num_experts_per_tok": 10,
            "mamba_n_heads": 128,
        },
        hub_ids("ibm-granite", "granite-4.0-h-small", "granite-4.0-h-small-base"),
    ),
)
