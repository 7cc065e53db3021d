"""Configurations of well-known models, for planning without weights and without a network.

A specification has only those keys of the published config.json that determine shapes and memory; it is not enough to
run the model (rotary frequencies, for example, are left out). The numbers of parameters are those of the published
weights, with a tied head counted once; a test builds each model and counts.

Variants of a model (base, instruct) share a specification, since their shapes are equal. If they differ in the maximum
length or the padding token, the values are those of the variant in `aliases.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Specification:
    """One model, known without its files.

    Attributes:
        name: The short name, as in `aliases.py`.
        num_parameters: Parameters of the model, a tied head counted once.
        config: Keys and values of its Hugging Face configuration; `dtype` is that of the published weights.
        hub_ids: Ids on hubs that have these shapes.
        remark: What to tell a user who plans with it, as a sentence; may be empty.
    """

    name: str
    num_parameters: int
    config: Mapping[str, Any]
    hub_ids: tuple[str, ...]
    remark: str = ""


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


def _ids(owners: str, *models: str) -> tuple[str, ...]:
    """Every model under every owner; `owners` are separated by spaces."""
    return tuple(f"{owner}/{model}" for owner in owners.split() for model in models)


# Each row below is written as its config.json would say it; what a family has in common stands here.
_SMOLLM2 = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 49_152,
    "max_position_embeddings": 8_192,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "pad_token_id": 2,
}
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
_LLAMA3 = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "attention_bias": False,
}
_LLAMA3_70B = {**_sizes(8_192, 28_672, 80, 64, 8), "head_dim": 128, "tie_word_embeddings": False}
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
_MISTRAL = {
    "model_type": "mistral",
    "dtype": "bfloat16",
    "head_dim": 128,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
    **_sizes(4_096, 14_336, 32, 32, 8),
}


def _gemma3_layers(count: int) -> list[str]:
    """Five layers with a sliding window, then one without, and so on."""
    return ["full_attention" if number % 6 == 0 else "sliding_attention" for number in range(1, count + 1)]


SPECIFICATIONS: tuple[Specification, ...] = (
    Specification(
        "smollm2-135m",
        134_515_008,
        {**_SMOLLM2, **_sizes(576, 1_536, 30, 9, 3)},
        _ids("HuggingFaceTB", "SmolLM2-135M", "SmolLM2-135M-Instruct"),
    ),
    Specification(
        "smollm2-360m",
        361_821_120,
        {**_SMOLLM2, **_sizes(960, 2_560, 32, 15, 5)},
        _ids("HuggingFaceTB", "SmolLM2-360M", "SmolLM2-360M-Instruct"),
    ),
    Specification(
        "smollm2-1.7b",
        1_711_376_384,
        {**_SMOLLM2, **_sizes(2_048, 8_192, 24, 32, 32)},
        _ids("HuggingFaceTB", "SmolLM2-1.7B", "SmolLM2-1.7B-Instruct"),
    ),
    Specification(
        "qwen2-0.5b",
        494_032_768,
        {**_QWEN2, **_sizes(896, 4_864, 24, 14, 2), "max_position_embeddings": 131_072},
        _ids("Qwen", "Qwen2-0.5B", "Qwen2-0.5B-Instruct"),
    ),
    Specification(
        "qwen2-1.5b",
        1_543_714_304,
        {**_QWEN2, **_sizes(1_536, 8_960, 28, 12, 2), "max_position_embeddings": 131_072},
        _ids("Qwen", "Qwen2-1.5B", "Qwen2-1.5B-Instruct"),
    ),
    Specification(
        "qwen2-7b",
        7_615_616_512,
        {
            **_QWEN2,
            **_sizes(3_584, 18_944, 28, 28, 4),
            "vocab_size": 152_064,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": False,
        },
        _ids("Qwen", "Qwen2-7B", "Qwen2-7B-Instruct"),
    ),
    Specification(
        "qwen2.5-0.5b",
        494_032_768,
        {**_QWEN2, **_sizes(896, 4_864, 24, 14, 2), "max_position_embeddings": 32_768},
        _ids("Qwen", "Qwen2.5-0.5B", "Qwen2.5-0.5B-Instruct"),
    ),
    Specification(
        "qwen2.5-1.5b",
        1_543_714_304,
        {**_QWEN2, **_sizes(1_536, 8_960, 28, 12, 2), "max_position_embeddings": 131_072},
        _ids("Qwen", "Qwen2.5-1.5B", "Qwen2.5-1.5B-Instruct"),
    ),
    Specification(
        "qwen2.5-3b",
        3_085_938_688,
        {**_QWEN2, **_sizes(2_048, 11_008, 36, 16, 2), "max_position_embeddings": 32_768},
        _ids("Qwen", "Qwen2.5-3B", "Qwen2.5-3B-Instruct"),
    ),
    Specification(
        "qwen2.5-7b",
        7_615_616_512,
        {
            **_QWEN2,
            **_sizes(3_584, 18_944, 28, 28, 4),
            "vocab_size": 152_064,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": False,
        },
        _ids("Qwen", "Qwen2.5-7B", "Qwen2.5-7B-Instruct"),
    ),
    Specification(
        "qwen2.5-14b",
        14_770_033_664,
        {
            **_QWEN2,
            **_sizes(5_120, 13_824, 48, 40, 8),
            "vocab_size": 152_064,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": False,
        },
        _ids("Qwen", "Qwen2.5-14B", "Qwen2.5-14B-Instruct"),
    ),
    Specification(
        "qwen2.5-32b",
        32_763_876_352,
        {
            **_QWEN2,
            **_sizes(5_120, 27_648, 64, 40, 8),
            "vocab_size": 152_064,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": False,
        },
        _ids("Qwen", "Qwen2.5-32B", "Qwen2.5-32B-Instruct"),
    ),
    Specification(
        "qwen3-0.6b",
        596_049_920,
        {**_QWEN3, **_sizes(1_024, 3_072, 28, 16, 8), "tie_word_embeddings": True},
        _ids("Qwen", "Qwen3-0.6B", "Qwen3-0.6B-Base"),
    ),
    Specification(
        "qwen3-1.7b",
        1_720_574_976,
        {**_QWEN3, **_sizes(2_048, 6_144, 28, 16, 8), "tie_word_embeddings": True},
        _ids("Qwen", "Qwen3-1.7B", "Qwen3-1.7B-Base"),
    ),
    Specification(
        "qwen3-4b",
        4_022_468_096,
        {**_QWEN3, **_sizes(2_560, 9_728, 36, 32, 8), "tie_word_embeddings": True},
        _ids("Qwen", "Qwen3-4B", "Qwen3-4B-Base"),
    ),
    Specification(
        "qwen3-8b",
        8_190_735_360,
        {**_QWEN3, **_sizes(4_096, 12_288, 36, 32, 8), "tie_word_embeddings": False},
        _ids("Qwen", "Qwen3-8B", "Qwen3-8B-Base"),
    ),
    Specification(
        "qwen3-14b",
        14_768_307_200,
        {**_QWEN3, **_sizes(5_120, 17_408, 40, 40, 8), "tie_word_embeddings": False},
        _ids("Qwen", "Qwen3-14B", "Qwen3-14B-Base"),
    ),
    Specification(
        "qwen3-32b",
        32_762_123_264,
        {**_QWEN3, **_sizes(5_120, 25_600, 64, 64, 8), "tie_word_embeddings": False},
        _ids("Qwen", "Qwen3-32B"),
    ),
    Specification(
        "llama-3.2-1b",
        1_235_814_400,
        {**_LLAMA3, **_sizes(2_048, 8_192, 16, 32, 8), "head_dim": 64, "tie_word_embeddings": True},
        _ids("meta-llama LLM-Research", "Llama-3.2-1B", "Llama-3.2-1B-Instruct"),
    ),
    Specification(
        "llama-3.2-3b",
        3_212_749_824,
        {**_LLAMA3, **_sizes(3_072, 8_192, 28, 24, 8), "head_dim": 128, "tie_word_embeddings": True},
        _ids("meta-llama LLM-Research", "Llama-3.2-3B", "Llama-3.2-3B-Instruct"),
    ),
    Specification(
        "llama-3.1-8b",
        8_030_261_248,
        {**_LLAMA3, **_sizes(4_096, 14_336, 32, 32, 8), "head_dim": 128, "tie_word_embeddings": False},
        _ids("meta-llama", "Llama-3.1-8B", "Llama-3.1-8B-Instruct")
        + _ids("meta-llama LLM-Research", "Meta-Llama-3.1-8B", "Meta-Llama-3.1-8B-Instruct"),
    ),
    Specification(
        "llama-3.1-70b",
        70_553_706_496,
        {**_LLAMA3, **_LLAMA3_70B},
        _ids("meta-llama", "Llama-3.1-70B", "Llama-3.1-70B-Instruct")
        + _ids("meta-llama LLM-Research", "Meta-Llama-3.1-70B", "Meta-Llama-3.1-70B-Instruct"),
    ),
    Specification(
        "llama-3.3-70b",
        70_553_706_496,
        {**_LLAMA3, **_LLAMA3_70B},
        _ids("meta-llama LLM-Research", "Llama-3.3-70B-Instruct"),
    ),
    Specification(
        "gemma-3-270m",
        268_098_176,
        {**_GEMMA3, **_sizes(640, 2_048, 18, 4, 1), "layer_types": _gemma3_layers(18)},
        _ids("google LLM-Research", "gemma-3-270m", "gemma-3-270m-it"),
    ),
    Specification(
        "gemma-3-1b",
        999_885_952,
        {**_GEMMA3, **_sizes(1_152, 6_912, 26, 4, 1), "layer_types": _gemma3_layers(26)},
        _ids("google LLM-Research", "gemma-3-1b-pt", "gemma-3-1b-it"),
    ),
    Specification(
        "gemma-3-4b",
        3_880_263_168,
        {
            **_GEMMA3,
            **_sizes(2_560, 10_240, 34, 8, 4),
            "layer_types": _gemma3_layers(34),
            # 64 more than the small ones: the tokens of images.
            "vocab_size": 262_208,
            "max_position_embeddings": 131_072,
            "sliding_window": 1_024,
        },
        _ids("google LLM-Research", "gemma-3-4b-pt", "gemma-3-4b-it"),
        remark="The published gemma-3-4b sees images too and can't be trained as it is; this is its text model.",
    ),
    Specification(
        "phi-3-mini",
        3_821_079_552,
        {
            "model_type": "phi3",
            "dtype": "bfloat16",
            "vocab_size": 32_064,
            "max_position_embeddings": 4_096,
            "sliding_window": 2_047,
            "tie_word_embeddings": False,
            **_sizes(3_072, 8_192, 32, 32, 32),
        },
        _ids("microsoft LLM-Research", "Phi-3-mini-4k-instruct"),
    ),
    Specification(
        "mistral-7b",
        7_248_023_552,
        {**_MISTRAL, "vocab_size": 32_768, "sliding_window": None},
        _ids("mistralai LLM-Research", "Mistral-7B-v0.3", "Mistral-7B-Instruct-v0.3"),
    ),
    Specification(
        "mistral-7b-v0.1",
        7_241_732_096,
        {**_MISTRAL, "vocab_size": 32_000, "sliding_window": 4_096},
        _ids("mistralai AI-ModelScope", "Mistral-7B-v0.1", "Mistral-7B-Instruct-v0.1"),
    ),
)


def find_specification(name: str) -> Specification | None:
    """Find the specification of a model.

    Args:
        name: Its short name, one of its ids on a hub, or such an id without the owner; case does not matter.
    """
    wanted = name.lower()
    for specification in SPECIFICATIONS:
        ids = [hub_id.lower() for hub_id in specification.hub_ids]
        if wanted == specification.name or wanted in ids or wanted in (hub_id.split("/")[1] for hub_id in ids):
            return specification
    return None
