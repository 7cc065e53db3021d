"""Mistral, of Mistral AI."""

from __future__ import annotations

from sophia_galore.model.specification import Specification, hub_ids, sizes

_MISTRAL = {
    "model_type": "mistral",
    "dtype": "bfloat16",
    "head_dim": 128,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
    **sizes(4_096, 14_336, 32, 32, 8),
}

MISTRAL: tuple[Specification, ...] = (
    Specification(
        "mistral-7b",
        7_248_023_552,
        {**_MISTRAL, "vocab_size": 32_768, "sliding_window": None},
        hub_ids("mistralai LLM-Research", "Mistral-7B-v0.3", "Mistral-7B-Instruct-v0.3"),
    ),
    Specification(
        "mistral-7b-v0.1",
        7_241_732_096,
        {**_MISTRAL, "vocab_size": 32_000, "sliding_window": 4_096},
        hub_ids("mistralai AI-ModelScope", "Mistral-7B-v0.1", "Mistral-7B-Instruct-v0.1"),
    ),
)
