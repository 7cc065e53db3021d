"""Llama, of Meta."""

from __future__ import annotations

from sophia_galore.model.specification import Specification, hub_ids, sizes

_LLAMA3 = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "attention_bias": False,
}
_LLAMA3_70B = {**sizes(8_192, 28_672, 80, 64, 8), "head_dim": 128, "tie_word_embeddings": False}

LLAMA: tuple[Specification, ...] = (
    Specification(
        "llama-3.2-1b",
        1_235_814_400,
        {**_LLAMA3, **sizes(2_048, 8_192, 16, 32, 8), "head_dim": 64, "tie_word_embeddings": True},
        hub_ids("meta-llama LLM-Research", "Llama-3.2-1B", "Llama-3.2-1B-Instruct"),
    ),
    Specification(
        "llama-3.2-3b",
        3_212_749_824,
        {**_LLAMA3, **sizes(3_072, 8_192, 28, 24, 8), "head_dim": 128, "tie_word_embeddings": True},
        hub_ids("meta-llama LLM-Research", "Llama-3.2-3B", "Llama-3.2-3B-Instruct"),
    ),
    Specification(
        "llama-3.1-8b",
        8_030_261_248,
        {**_LLAMA3, **sizes(4_096, 14_336, 32, 32, 8), "head_dim": 128, "tie_word_embeddings": False},
        hub_ids("meta-llama", "Llama-3.1-8B", "Llama-3.1-8B-Instruct")
        + hub_ids("meta-llama LLM-Research", "Meta-Llama-3.1-8B", "Meta-Llama-3.1-8B-Instruct"),
    ),
    Specification(
        "llama-3.1-70b",
        70_553_706_496,
        {**_LLAMA3, **_LLAMA3_70B},
        hub_ids("meta-llama", "Llama-3.1-70B", "Llama-3.1-70B-Instruct")
        + hub_ids("meta-llama LLM-Research", "Meta-Llama-3.1-70B", "Meta-Llama-3.1-70B-Instruct"),
    ),
    Specification(
        "llama-3.3-70b",
        70_553_706_496,
        {**_LLAMA3, **_LLAMA3_70B},
        hub_ids("meta-llama LLM-Research", "Llama-3.3-70B-Instruct"),
    ),
)
