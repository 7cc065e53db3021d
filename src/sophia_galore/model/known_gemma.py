"""Gemma, of Google."""

from __future__ import annotations

from sophia_galore.model.specification import Specification, every_nth, hub_ids, sizes

_GEMMA3 = {
    "model_type": "gemma3_text",
    "dtype": "bfloat16",
    "vocab_size": 262_144,
    "head_dim": 256,
    "max_position_embeddings": 32_768,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
_GEMMA3_LARGE = {
    **_GEMMA3,
    # 64 more than the small ones: the tokens of images.
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "sliding_window": 1_024,
}
_GEMMA4 = {
    "model_type": "gemma4_text",
    "dtype": "bfloat16",
    "vocab_size": 262_144,
    "head_dim": 256,
    # That of the layers without a sliding window.
    "global_head_dim": 512,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
# The small ones have an embedding for each layer besides, and their last layers take keys and values from earlier ones.
_GEMMA4_SMALL = {
    **_GEMMA4,
    "max_position_embeddings": 131_072,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262_144,
}
# In the large ones, keys are values in the layers without a sliding window.
_GEMMA4_LARGE = {
    **_GEMMA4,
    "max_position_embeddings": 262_144,
    "sliding_window": 1_024,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
}


def _windows(layers: int, period: int = 6) -> dict[str, list[str]]:
    """Layers with a sliding window, then one without, and so on."""
    return {"layer_types": every_nth(layers, period, "sliding_attention")}


def _only_text(model: str, senses: str) -> str:
    return f"The published {model} {senses} too; this is its text model."


GEMMA: tuple[Specification, ...] = (
    Specification(
        "gemma-3-270m",
        268_098_176,
        {**_GEMMA3, **sizes(640, 2_048, 18, 4, 1), **_windows(18)},
        hub_ids("google LLM-Research", "gemma-3-270m", "gemma-3-270m-it"),
    ),
    Specification(
        "gemma-3-1b",
        999_885_952,
        {**_GEMMA3, **sizes(1_152, 6_912, 26, 4, 1), **_windows(26)},
        hub_ids("google LLM-Research", "gemma-3-1b-pt", "gemma-3-1b-it"),
    ),
    Specification(
        "gemma-3-4b",
        3_880_263_168,
        {**_GEMMA3_LARGE, **sizes(2_560, 10_240, 34, 8, 4), **_windows(34)},
        hub_ids("google LLM-Research", "gemma-3-4b-pt", "gemma-3-4b-it"),
        remark=_only_text("gemma-3-4b", "sees images"),
    ),
    Specification(
        "gemma-3-12b",
        11_766_034_176,
        {**_GEMMA3_LARGE, **sizes(3_840, 15_360, 48, 16, 8), **_windows(48)},
        hub_ids("google LLM-Research", "gemma-3-12b-pt", "gemma-3-12b-it"),
        remark=_only_text("gemma-3-12b", "sees images"),
    ),
    Specification(
        "gemma-3-27b",
        27_009_346_304,
        {**_GEMMA3_LARGE, **sizes(5_376, 21_504, 62, 32, 16), **_windows(62), "head_dim": 128},
        hub_ids("google LLM-Research", "gemma-3-27b-pt", "gemma-3-27b-it"),
        remark=_only_text("gemma-3-27b", "sees images"),
    ),
    Specification(
        "gemma-4-e2b",
        4_628_569_344,
        {
            **_GEMMA4_SMALL,
            **sizes(1_536, 6_144, 35, 8, 1),
            **_windows(35, period=5),
            "num_kv_shared_layers": 20,
            # In the layers that take keys and values from others.
            "use_double_wide_mlp": True,
        },
        hub_ids("google", "gemma-4-E2B", "gemma-4-E2B-it"),
        remark=_only_text("gemma-4-E2B", "sees and hears"),
    ),
    Specification(
        "gemma-4-e4b",
        7_463_013_376,
        {**_GEMMA4_SMALL, **sizes(2_560, 10_240, 42, 8, 2), **_windows(42), "num_kv_shared_layers": 18},
        hub_ids("google", "gemma-4-E4B", "gemma-4-E4B-it"),
        remark=_only_text("gemma-4-E4B", "sees and hears"),
    ),
    Specification(
        "gemma-4-12b",
        11_907_350_272,
        {
            **_GEMMA4_LARGE,
            **sizes(3_840, 15_360, 48, 16, 8),
            **_windows(48),
            "model_type": "gemma4_unified_text",
            "num_global_key_value_heads": 1,
        },
        hub_ids("google", "gemma-4-12B", "gemma-4-12B-it"),
        remark=_only_text("gemma-4-12B", "sees and hears"),
    ),
    Specification(
        "gemma-4-26b-a4b",
        25_233_141_760,
        {
            **_GEMMA4_LARGE,
            **sizes(2_816, 2_112, 30, 16, 8),
            **_windows(30),
            "num_global_key_value_heads": 2,
            "enable_moe_block": True,
            "moe_intermediate_size": 704,
            "num_experts": 128,
            "top_k_experts": 8,
        },
        hub_ids("google", "gemma-4-26B-A4B", "gemma-4-26B-A4B-it"),
        remark=_only_text("gemma-4-26B-A4B", "sees images"),
    ),
    Specification(
        "gemma-4-31b",
        30_697_345_280,
        {
            **_GEMMA4_LARGE,
            **sizes(5_376, 21_504, 60, 32, 16),
            **_windows(60),
            "num_global_key_value_heads": 4,
        },
        hub_ids("google", "gemma-4-31B", "gemma-4-31B-it"),
        remark=_only_text("gemma-4-31B", "sees images"),
    ),
)
