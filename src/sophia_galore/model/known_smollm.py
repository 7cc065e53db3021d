"""SmolLM, of Hugging Face."""

from __future__ import annotations

from sophia_galore.model.specification import Specification, hub_ids, sizes

_SMOLLM2 = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 49_152,
    "max_position_embeddings": 8_192,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "pad_token_id": 2,
}

SMOLLM: tuple[Specification, ...] = (
    Specification(
        "smollm2-135m",
        134_515_008,
        {**_SMOLLM2, **sizes(576, 1_536, 30, 9, 3)},
        hub_ids("HuggingFaceTB", "SmolLM2-135M", "SmolLM2-135M-Instruct"),
    ),
    Specification(
        "smollm2-360m",
        361_821_120,
        {**_SMOLLM2, **sizes(960, 2_560, 32, 15, 5)},
        hub_ids("HuggingFaceTB", "SmolLM2-360M", "SmolLM2-360M-Instruct"),
    ),
    Specification(
        "smollm2-1.7b",
        1_711_376_384,
        {**_SMOLLM2, **sizes(2_048, 8_192, 24, 32, 32)},
        hub_ids("HuggingFaceTB", "SmolLM2-1.7B", "SmolLM2-1.7B-Instruct"),
    ),
    Specification(
        "smollm3-3b",
        3_075_098_624,
        {
            "model_type": "smollm3",
            "dtype": "bfloat16",
            "vocab_size": 128_256,
            "max_position_embeddings": 65_536,
            "tie_word_embeddings": True,
            "attention_bias": False,
            **sizes(2_048, 11_008, 36, 16, 4),
        },
        hub_ids("HuggingFaceTB", "SmolLM3-3B", "SmolLM3-3B-Base"),
    ),
)
