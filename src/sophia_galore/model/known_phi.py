"""Phi, of Microsoft."""

from __future__ import annotations

from sophia_galore.model.specification import Specification, hub_ids, sizes

PHI: tuple[Specification, ...] = (
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
            **sizes(3_072, 8_192, 32, 32, 32),
        },
        hub_ids("microsoft LLM-Research", "Phi-3-mini-4k-instruct"),
    ),
    Specification(
        "phi-4-mini",
        3_836_021_760,
        {
            "model_type": "phi3",
            "dtype": "bfloat16",
            "vocab_size": 200_064,
            "max_position_embeddings": 131_072,
            "sliding_window": 262_144,
            "partial_rotary_factor": 0.75,
            "tie_word_embeddings": True,
            **sizes(3_072, 8_192, 32, 24, 8),
        },
        hub_ids("microsoft LLM-Research", "Phi-4-mini-instruct", "Phi-4-mini-reasoning"),
    ),
)
