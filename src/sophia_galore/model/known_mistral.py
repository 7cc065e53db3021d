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
_MINISTRAL3 = {
    "model_type": "ministral3",
    "dtype": "bfloat16",
    "vocab_size": 131_072,
    "head_dim": 128,
    "max_position_embeddings": 262_144,
    "sliding_window": None,
}


def _ids(size: str) -> tuple[str, ...]:
    """The ones in bf16; `Instruct-2512` itself is published in FP8."""
    return hub_ids("mistralai", f"Ministral-3-{size}-Base-2512", f"Ministral-3-{size}-Instruct-2512-BF16")


def _only_text(model: str) -> str:
    return f"The published {model} sees images too; this is its text model."


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
    Specification(
        "ministral-3-3b",
        3_429_006_336,
        {**_MINISTRAL3, **sizes(3_072, 9_216, 26, 32, 8), "tie_word_embeddings": True},
        _ids("3B"),
        remark=_only_text("Ministral-3-3B"),
    ),
    Specification(
        "ministral-3-8b",
        8_489_553_920,
        {**_MINISTRAL3, **sizes(4_096, 14_336, 34, 32, 8), "tie_word_embeddings": False},
        _ids("8B"),
        remark=_only_text("Ministral-3-8B"),
    ),
    Specification(
        "ministral-3-14b",
        13_506_073_600,
        {**_MINISTRAL3, **sizes(5_120, 16_384, 40, 32, 8), "tie_word_embeddings": False},
        _ids("14B"),
        remark=_only_text("Ministral-3-14B"),
    ),
)
