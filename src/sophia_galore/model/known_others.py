"""Families of which there are one or a few models here: gpt-oss, GLM, Hunyuan, ERNIE, EXAONE."""

from __future__ import annotations

from sophia_galore.model.specification import Specification, every_nth, hub_ids, sizes

# Norms of queries and keys are the architecture's.
_HUNYUAN = {
    "model_type": "hunyuan_v1_dense",
    "dtype": "bfloat16",
    "vocab_size": 120_818,
    "head_dim": 128,
    "max_position_embeddings": 262_144,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
_ERNIE = {
    "dtype": "bfloat16",
    "vocab_size": 103_424,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
    "use_bias": False,
}

OTHERS: tuple[Specification, ...] = (
    Specification(
        "gpt-oss-20b",
        20_914_757_184,
        {
            "model_type": "gpt_oss",
            "dtype": "bfloat16",
            "vocab_size": 201_088,
            "head_dim": 64,
            "max_position_embeddings": 131_072,
            "layer_types": every_nth(24, 2, "sliding_attention"),
            "sliding_window": 128,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "tie_word_embeddings": False,
            "attention_bias": True,
            **sizes(2_880, 2_880, 24, 64, 8),
        },
        hub_ids("openai", "gpt-oss-20b"),
        remark="The published gpt-oss-20b is quantised (MXFP4) and can't be trained as it is; this is it in bf16.",
    ),
    Specification(
        "glm-4-9b",
        9_400_279_040,
        {
            "model_type": "glm4",
            "dtype": "bfloat16",
            "vocab_size": 151_552,
            "head_dim": 128,
            "max_position_embeddings": 32_768,
            "partial_rotary_factor": 0.5,
            "tie_word_embeddings": False,
            "attention_bias": True,
            **sizes(4_096, 13_696, 40, 32, 2),
        },
        hub_ids("zai-org THUDM ZhipuAI", "GLM-4-9B-0414"),
    ),
    Specification(
        "hunyuan-0.5b",
        539_010_048,
        {**_HUNYUAN, **sizes(1_024, 3_584, 24, 16, 8)},
        hub_ids("tencent", "Hunyuan-0.5B-Instruct", "Hunyuan-0.5B-Pretrain"),
    ),
    Specification(
        "hunyuan-1.8b",
        1_791_080_448,
        {**_HUNYUAN, **sizes(2_048, 6_144, 32, 16, 4)},
        hub_ids("tencent", "Hunyuan-1.8B-Instruct", "Hunyuan-1.8B-Pretrain"),
    ),
    Specification(
        "hunyuan-4b",
        4_221_757_440,
        {**_HUNYUAN, **sizes(3_072, 8_192, 36, 32, 8)},
        hub_ids("tencent", "Hunyuan-4B-Instruct", "Hunyuan-4B-Pretrain"),
    ),
    Specification(
        "hunyuan-7b",
        7_504_568_320,
        {**_HUNYUAN, **sizes(4_096, 14_336, 32, 32, 8), "vocab_size": 128_167},
        hub_ids("tencent", "Hunyuan-7B-Instruct"),
    ),
    Specification(
        "ernie-4.5-0.3b",
        360_748_032,
        {"model_type": "ernie4_5", **_ERNIE, **sizes(1_024, 3_072, 18, 16, 2), "head_dim": 128},
        hub_ids("baidu", "ERNIE-4.5-0.3B-PT", "ERNIE-4.5-0.3B-Base-PT"),
    ),
    Specification(
        "ernie-4.5-21b-a3b",
        21_825_437_888,
        {
            "model_type": "ernie4_5_moe",
            **_ERNIE,
            **sizes(2_560, 12_288, 28, 20, 4),
            "moe_intermediate_size": 1_536,
            "moe_num_experts": 64,
            "moe_num_shared_experts": 2,
            "moe_k": 6,
            "moe_layer_start_index": 1,
            "moe_layer_interval": 1,
        },
        hub_ids("baidu", "ERNIE-4.5-21B-A3B-PT", "ERNIE-4.5-21B-A3B-Base-PT"),
    ),
    Specification(
        "exaone-4.0-1.2b",
        1_279_391_488,
        {
            "model_type": "exaone4",
            "dtype": "bfloat16",
            "vocab_size": 102_400,
            "head_dim": 64,
            "max_position_embeddings": 65_536,
            "layer_types": ["full_attention"] * 30,
            "sliding_window": None,
            "tie_word_embeddings": True,
            **sizes(2_048, 4_096, 30, 32, 8),
        },
        hub_ids("LGAI-EXAONE", "EXAONE-4.0-1.2B"),
    ),
)
