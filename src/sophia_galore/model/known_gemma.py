"""Gemma, of Google."""

from __future__ import annotations

from sophia_galore.model.specification import Specification, hub_ids, sizes

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


def _gemma3_layers(count: int) -> list[str]:
    """Five layers with a sliding window, then one without, and so on."""
    return ["full_attention" if number % 6 == 0 else "sliding_attention" for number in range(1, count + 1)]


GEMMA: tuple[Specification, ...] = (
    Specification(
        "gemma-3-270m",
        268_098_176,
        {**_GEMMA3, **sizes(640, 2_048, 18, 4, 1), "layer_types": _gemma3_layers(18)},
        hub_ids("google LLM-Research", "gemma-3-270m", "gemma-3-270m-it"),
    ),
    Specification(
        "gemma-3-1b",
        999_885_952,
        {**_GEMMA3, **sizes(1_152, 6_912, 26, 4, 1), "layer_types": _gemma3_layers(26)},
        hub_ids("google LLM-Research", "gemma-3-1b-pt", "gemma-3-1b-it"),
    ),
    Specification(
        "gemma-3-4b",
        3_880_263_168,
        {
            **_GEMMA3,
            **sizes(2_560, 10_240, 34, 8, 4),
            "layer_types": _gemma3_layers(34),
            # 64 more than the small ones: the tokens of images.
            "vocab_size": 262_208,
            "max_position_embeddings": 131_072,
            "sliding_window": 1_024,
        },
        hub_ids("google LLM-Research", "gemma-3-4b-pt", "gemma-3-4b-it"),
        remark="The published gemma-3-4b sees images too and can't be trained as it is; this is its text model.",
    ),
)
