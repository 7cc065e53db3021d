"""Qwen, of Alibaba."""

from __future__ import annotations

from typing import Any

from sophia_galore.model.specification import Specification, every_nth, hub_ids, sizes

# Biases of queries, keys and values are the architecture's; no published model of these uses a sliding window.
_QWEN2 = {"model_type": "qwen2", "dtype": "bfloat16", "vocab_size": 151_936, "tie_word_embeddings": True}
# Norms of queries and keys are the architecture's.
_QWEN3 = {
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "vocab_size": 151_936,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "attention_bias": False,
}
_QWEN3_5 = {
    "dtype": "bfloat16",
    "vocab_size": 248_320,
    "head_dim": 256,
    "max_position_embeddings": 262_144,
    "attention_bias": False,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
}


def _qwen3_5(layers: int, value_heads: int) -> dict[str, Any]:
    """Three layers of linear attention, then one of full attention, and so on."""
    kinds = every_nth(layers, 4, "linear_attention")
    return {"model_type": "qwen3_5_text", **_QWEN3_5, "layer_types": kinds, "linear_num_value_heads": value_heads}


def _only_text(model: str) -> str:
    return f"The published {model} sees images too and predicts several tokens at once; this is its text model."


QWEN: tuple[Specification, ...] = (
    Specification(
        "qwen2-0.5b",
        494_032_768,
        {**_QWEN2, **sizes(896, 4_864, 24, 14, 2), "max_position_embeddings": 131_072},
        hub_ids("Qwen", "Qwen2-0.5B", "Qwen2-0.5B-Instruct"),
    ),
    Specification(
        "qwen2-1.5b",
        1_543_714_304,
        {**_QWEN2, **sizes(1_536, 8_960, 28, 12, 2), "max_position_embeddings": 131_072},
        hub_ids("Qwen", "Qwen2-1.5B", "Qwen2-1.5B-Instruct"),
    ),
    Specification(
        "qwen2-7b",
        7_615_616_512,
        {
            **_QWEN2,
            **sizes(3_584, 18_944, 28, 28, 4),
            "vocab_size": 152_064,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": False,
        },
        hub_ids("Qwen", "Qwen2-7B", "Qwen2-7B-Instruct"),
    ),
    Specification(
        "qwen2.5-0.5b",
        494_032_768,
        {**_QWEN2, **sizes(896, 4_864, 24, 14, 2), "max_position_embeddings": 32_768},
        hub_ids("Qwen", "Qwen2.5-0.5B", "Qwen2.5-0.5B-Instruct"),
    ),
    Specification(
        "qwen2.5-1.5b",
        1_543_714_304,
        {**_QWEN2, **sizes(1_536, 8_960, 28, 12, 2), "max_position_embeddings": 131_072},
        hub_ids("Qwen", "Qwen2.5-1.5B", "Qwen2.5-1.5B-Instruct"),
    ),
    Specification(
        "qwen2.5-3b",
        3_085_938_688,
        {**_QWEN2, **sizes(2_048, 11_008, 36, 16, 2), "max_position_embeddings": 32_768},
        hub_ids("Qwen", "Qwen2.5-3B", "Qwen2.5-3B-Instruct"),
    ),
    Specification(
        "qwen2.5-7b",
        7_615_616_512,
        {
            **_QWEN2,
            **sizes(3_584, 18_944, 28, 28, 4),
            "vocab_size": 152_064,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": False,
        },
        hub_ids("Qwen", "Qwen2.5-7B", "Qwen2.5-7B-Instruct"),
    ),
    Specification(
        "qwen2.5-14b",
        14_770_033_664,
        {
            **_QWEN2,
            **sizes(5_120, 13_824, 48, 40, 8),
            "vocab_size": 152_064,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": False,
        },
        hub_ids("Qwen", "Qwen2.5-14B", "Qwen2.5-14B-Instruct"),
    ),
    Specification(
        "qwen2.5-32b",
        32_763_876_352,
        {
            **_QWEN2,
            **sizes(5_120, 27_648, 64, 40, 8),
            "vocab_size": 152_064,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": False,
        },
        hub_ids("Qwen", "Qwen2.5-32B", "Qwen2.5-32B-Instruct"),
    ),
    Specification(
        "qwen3-0.6b",
        596_049_920,
        {**_QWEN3, **sizes(1_024, 3_072, 28, 16, 8), "tie_word_embeddings": True},
        hub_ids("Qwen", "Qwen3-0.6B", "Qwen3-0.6B-Base"),
    ),
    Specification(
        "qwen3-1.7b",
        1_720_574_976,
        {**_QWEN3, **sizes(2_048, 6_144, 28, 16, 8), "tie_word_embeddings": True},
        hub_ids("Qwen", "Qwen3-1.7B", "Qwen3-1.7B-Base"),
    ),
    Specification(
        "qwen3-4b",
        4_022_468_096,
        {**_QWEN3, **sizes(2_560, 9_728, 36, 32, 8), "tie_word_embeddings": True},
        hub_ids("Qwen", "Qwen3-4B", "Qwen3-4B-Base"),
    ),
    Specification(
        "qwen3-8b",
        8_190_735_360,
        {**_QWEN3, **sizes(4_096, 12_288, 36, 32, 8), "tie_word_embeddings": False},
        hub_ids("Qwen", "Qwen3-8B", "Qwen3-8B-Base"),
    ),
    Specification(
        "qwen3-14b",
        14_768_307_200,
        {**_QWEN3, **sizes(5_120, 17_408, 40, 40, 8), "tie_word_embeddings": False},
        hub_ids("Qwen", "Qwen3-14B", "Qwen3-14B-Base"),
    ),
    Specification(
        "qwen3-32b",
        32_762_123_264,
        {**_QWEN3, **sizes(5_120, 25_600, 64, 64, 8), "tie_word_embeddings": False},
        hub_ids("Qwen", "Qwen3-32B"),
    ),
    Specification(
        "qwen3-30b-a3b",
        30_532_122_624,
        {
            **_QWEN3,
            **sizes(2_048, 6_144, 48, 32, 4),
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "tie_word_embeddings": False,
        },
        hub_ids("Qwen", "Qwen3-30B-A3B", "Qwen3-30B-A3B-Base"),
    ),
    Specification(
        "qwen3.5-0.8b",
        752_393_024,
        {**_qwen3_5(24, 16), **sizes(1_024, 3_584, 24, 8, 2), "tie_word_embeddings": True},
        hub_ids("Qwen", "Qwen3.5-0.8B", "Qwen3.5-0.8B-Base"),
        remark=_only_text("Qwen3.5-0.8B"),
    ),
    Specification(
        "qwen3.5-2b",
        1_881_825_088,
        {**_qwen3_5(24, 16), **sizes(2_048, 6_144, 24, 8, 2), "tie_word_embeddings": True},
        hub_ids("Qwen", "Qwen3.5-2B", "Qwen3.5-2B-Base"),
        remark=_only_text("Qwen3.5-2B"),
    ),
    Specification(
        "qwen3.5-4b",
        4_205_751_296,
        {**_qwen3_5(32, 32), **sizes(2_560, 9_216, 32, 16, 4), "tie_word_embeddings": True},
        hub_ids("Qwen", "Qwen3.5-4B", "Qwen3.5-4B-Base"),
        remark=_only_text("Qwen3.5-4B"),
    ),
    Specification(
        "qwen3.5-9b",
        8_953_803_264,
        {**_qwen3_5(32, 32), **sizes(4_096, 12_288, 32, 16, 4), "tie_word_embeddings": False},
        hub_ids("Qwen", "Qwen3.5-9B", "Qwen3.5-9B-Base"),
        remark=_only_text("Qwen3.5-9B"),
    ),
    Specification(
        "qwen3.5-27b",
        26_895_998_464,
        {**_qwen3_5(64, 48), **sizes(5_120, 17_408, 64, 24, 4), "tie_word_embeddings": False},
        hub_ids("Qwen", "Qwen3.5-27B"),
        remark=_only_text("Qwen3.5-27B"),
    ),
    Specification(
        "qwen3.5-35b-a3b",
        34_660_610_688,
        {
            **_qwen3_5(40, 32),
            "model_type": "qwen3_5_moe_text",
            "hidden_size": 2_048,
            "num_hidden_layers": 40,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "tie_word_embeddings": False,
        },
        hub_ids("Qwen", "Qwen3.5-35B-A3B", "Qwen3.5-35B-A3B-Base"),
        remark=_only_text("Qwen3.5-35B-A3B"),
    ),
)
