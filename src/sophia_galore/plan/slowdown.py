"""How many times as long a token takes with other settings: measured factors, multiplied.

The factors are medians of `python bench/tradeoffs.py` (SmolLM2-135M on two CPU cores); on a GPU they differ. They are
for choosing between settings, not for planning an afternoon.
"""

from __future__ import annotations

from sophia_galore.config import RunConfig

# Against keeping the graphs of all layers.
_RECOMPUTING = 1.25
# Against fp32 on the device's own arithmetic.
_FORMATS = {"fp32": 1.0, "bf16": 1.02, "int8": 1.05}
_STATE_BITS = {32: 1.0, 16: 1.01, 8: 1.03}
_PROJECTION_BITS = {32: 1.0, 16: 1.0, 4: 1.02}
_SMALLER_TILES = {0: 1.0, 16: 1.05, 4: 1.15}
_HALF_A_BATCH = 1.03


def slowdown(asked: RunConfig, config: RunConfig, num_layers: int) -> float:
    """The expected factor.

    Args:
        asked: What it is compared with.
        config: The other settings.
        num_layers: Layers of the model.
    """
    return _cost(config, num_layers) / _cost(asked, num_layers)


def _cost(config: RunConfig, num_layers: int) -> float:
    kept = config.engine.keep_layers if config.training.gradient_checkpointing else num_layers
    share = min(kept, num_layers) / num_layers if isinstance(kept, int) else 0.0
    form = "int8" if config.quantization.int8 else config.model.store
    galore = config.optimizer.type == "galore"
    factor = share + (1 - share) * _RECOMPUTING
    factor *= _FORMATS[form] * _STATE_BITS[config.optimizer.state_bits]
    factor *= _PROJECTION_BITS[config.optimizer.galore.projection_bits] if galore else 1.0
    factor *= next(cost for size, cost in _SMALLER_TILES.items() if size <= config.memory.logits_chunk_mib)
    halvings = config.training.batch_size.bit_length() - 1
    return factor / _HALF_A_BATCH**halvings
