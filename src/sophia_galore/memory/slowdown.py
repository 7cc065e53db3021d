"""How many times as long a token takes with other settings: measured factors, multiplied.

The factors are medians of `python bench/tradeoffs.py` (SmolLM2-135M on two CPU cores, 2026-11-26); on a GPU they
differ. They are for choosing between settings, not for planning an afternoon. Smaller micro-batches cost nothing that
was measured: halves were 3 % faster, having less padding.
"""

from __future__ import annotations

from sophia_galore.config import RunConfig

# Against keeping the graphs of all layers.
_RECOMPUTING = 1.21
# Against fp32, in which a CPU computes; a device that computes in bf16 decodes less.
_FORMATS = {"fp32": 1.0, "bf16": 1.14, "int8": 1.17}
_STATE_BITS = {32: 1.0, 16: 1.12, 8: 1.10}
_PROJECTION_BITS = {32: 1.0, 16: 1.0, 4: 1.01}
# MiB of logits at once: as suits the device, and less.
_SMALLER_TILES = {0: 1.0, 16: 1.03, 4: 1.05}


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
    return factor * _tile_cost(config.memory.logits_chunk_mib)


def _tile_cost(chunk_mib: int) -> float:
    """The factor of the smallest tile that was measured and is not smaller; large ones cost nothing."""
    if chunk_mib == 0 or chunk_mib > max(_SMALLER_TILES):
        return 1.0
    return _SMALLER_TILES[min(size for size in _SMALLER_TILES if size >= chunk_mib)]
