"""How many layers keep their graphs through the forward pass."""

from __future__ import annotations

from sophia_galore.config import RunConfig


def kept_layers(config: RunConfig, num_layers: int) -> int:
    """The number of last layers whose graphs are kept.

    Args:
        config: What was asked.
        num_layers: How many layers the model has.

    Returns:
        0 to `num_layers`; 0 for auto as long as no limit says what there is room for.
    """
    if not config.training.gradient_checkpointing:
        return num_layers
    asked = config.engine.keep_layers
    return 0 if asked == "auto" else min(asked, num_layers)
