"""OLMo, of Ai2."""

from __future__ import annotations

from sophia_galore.model.specification import Specification, every_nth, hub_ids, sizes

# Norms of queries and keys are the architecture's. Base models are left out: their weights are in float32.
_OLMO2 = {
    "model_type": "olmo2",
    "dtype": "bfloat16",
    "vocab_size": 100_352,
    "max_position_embeddings": 4_096,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
_OLMO3 = {
    "model_type": "olmo3",
    "dtype": "bfloat16",
    "vocab_size": 100_278,
    "max_position_embeddings": 65_536,
    "sliding_window": 4_096,
    "tie_word_embeddings": False,
    "attention_bias": False,
}

OLMO: tuple[Specification, ...] = (
    Specification(
        "olmo-2-1b",
        1_484_916_736,
        {**_OLMO2, **sizes(2_048, 8_192, 16, 16, 16)},
        hub_ids("allenai", "OLMo-2-0425-1B-Instruct"),
    ),
    Specification(
        "olmo-2-7b",
        7_298_617_344,
        {**_OLMO2, **sizes(4_096, 11_008, 32, 32, 32)},
        hub_ids("allenai", "OLMo-2-1124-7B-Instruct"),
    ),
    Specification(
        "olmo-2-13b",
        13_716_198_400,
        {**_OLMO2, **sizes(5_120, 13_824, 40, 40, 40)},
        hub_ids("allenai", "OLMo-2-1124-13B-Instruct"),
    ),
    Specification(
        "olmo-2-32b",
        32_234_279_936,
        {**_OLMO2, **sizes(5_120, 27_648, 64, 40, 8)},
        hub_ids("allenai", "OLMo-2-0325-32B-Instruct"),
    ),
    Specification(
        "olmo-3-7b",
        7_298_011_136,
        {**_OLMO3, **sizes(4_096, 11_008, 32, 32, 32), "layer_types": every_nth(32, 4, "sliding_attention")},
        hub_ids("allenai", "Olmo-3-1025-7B", "Olmo-3-7B-Instruct", "Olmo-3-7B-Think"),
    ),
    Specification(
        "olmo-3-32b",
        32_233_522_176,
        {**_OLMO3, **sizes(5_120, 27_648, 64, 40, 8), "layer_types": every_nth(64, 4, "sliding_attention")},
        hub_ids("allenai", "Olmo-3-1125-32B", "Olmo-3-32B-Think"),
    ),
    Specification(
        "olmoe-1b-7b",
        6_919_161_856,
        {
            "model_type": "olmoe",
            "dtype": "bfloat16",
            "vocab_size": 50_304,
            "max_position_embeddings": 4_096,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "tie_word_embeddings": False,
            "attention_bias": False,
            **sizes(2_048, 1_024, 16, 16, 16),
        },
        hub_ids("allenai", "OLMoE-1B-7B-0924", "OLMoE-1B-7B-0924-Instruct"),
    ),
)
