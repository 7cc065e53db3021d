"""Qwen, of Alibaba."""

from __future__ import annotations

from sophia_galore.model.specification import Specification, hub_ids, sizes

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
)
