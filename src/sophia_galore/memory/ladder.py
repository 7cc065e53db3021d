"""Settings that reduce memory, ordered by their cost, and the time that they cost.

    1  kept layers       only time: activations of all layers are computed again in backward
    2  micro-batch       only time: the same effective batch in smaller pieces
    3  logits            only time: smaller tiles of the vocabulary's logits
    4  full gradients    only time: a layer goes backward several times where full gradients are needed
    5  host memory       only time: layers wait in host memory and visit the device
    6  layer inputs      only time: they wait in host memory between forward and backward
    7  weight format     fp32, bf16, int8: stochastic rounding, without bias
    8  state bits        32, 16, 8: the same for the optimizer's state
    9  projection bits   32, 16, 4: coarser bases
    10 disk              only time, but much of it where the disk is slow, and wear: layers wait in files
    11 rank              halves: less of each gradient is seen
    12 max_length        halves: less of each example is seen; only if that is allowed

A rung returns the next change of a configuration, or None if nothing is left to change. Each rung is used up before
the next one is tried.

What settings cost in time are medians of `python bench/tradeoffs.py` (SmolLM2-135M on two CPU cores, 2026-11-26),
multiplied; on a GPU they differ. They serve to compare settings, not to predict the time of a run. Smaller
micro-batches cost no measurable time: half the size was 3 % faster because of less padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sophia_galore.config import RunConfig

Changes = dict[str, Any]

_LEAST_RANK = 8
_LEAST_LENGTH = 64
_LEAST_TILE_MIB = 4

# Time with activation checkpointing, relative to none.
_CHECKPOINTING = 1.21
# Relative to fp32 on a CPU, which computes in fp32; a device that computes in bf16 converts less.
_FORMATS = {"fp32": 1.0, "bf16": 1.14, "int8": 1.17}
_STATE_BITS = {32: 1.0, 16: 1.12, 8: 1.10}
_PROJECTION_BITS = {32: 1.0, 16: 1.0, 4: 1.01}
# Full gradients one matrix after the other, where every step forms them: two steps, 2.06 and 2.24, of processor time on
# one core. Else a layer seldom goes backward again.
_GRADIENTS_APART = 2.15
# MiB of logits at once; larger tiles cost nothing.
_TILES_MIB = {4: 1.05, 16: 1.03}


@dataclass(frozen=True)
class Rung:
    """One way to reduce memory.

    Args:
        name: What it changes.
        step: Returns its next change of a configuration; None if there is none.
        costs_time_only: Whether it changes no number, except by the order of sums.
        uses_host: Whether it takes memory of the host.
    """

    name: str
    step: Callable[[RunConfig], Changes | None]
    costs_time_only: bool = False
    uses_host: bool = False


def _keep_fewer(config: RunConfig) -> Changes | None:
    if config.engine.keep_layers == 0 and config.training.gradient_checkpointing:
        return None
    return {"engine.keep_layers": 0, "training.gradient_checkpointing": True}


def _smaller_batch(config: RunConfig) -> Changes | None:
    size, together = config.training.batch_size, config.training.gradient_accumulation_steps
    factor = next((factor for factor in range(2, size + 1) if size % factor == 0), None)
    if factor is None:
        return None
    return {"training.batch_size": size // factor, "training.gradient_accumulation_steps": together * factor}


def _smaller_tile(config: RunConfig) -> Changes | None:
    tile = config.memory.logits_chunk_mib
    smaller = next((size for size in (16, _LEAST_TILE_MIB) if tile == 0 or size < tile), None)
    return None if smaller is None else {"memory.logits_chunk_mib": smaller}


def _to_host(config: RunConfig) -> Changes | None:
    return {"memory.placement": "host"} if config.memory.placement == "auto" else None


def _inputs_to_host(config: RunConfig) -> Changes | None:
    can_move = config.memory.activations == "device" and config.memory.on_oom == "stop"
    return {"memory.activations": "host"} if can_move else None


def _to_disk(config: RunConfig) -> Changes | None:
    return {"memory.placement": "disk"} if config.memory.placement in ("auto", "host") else None


def forms_apart(config: RunConfig) -> bool:
    """Return whether `engine.full_gradients: matrix` can save memory: only products of full gradients are kept."""
    return config.optimizer.type == "galore" and config.optimizer.galore.residual == "none"


def _gradients_apart(config: RunConfig) -> Changes | None:
    if config.engine.full_gradients == "matrix" or not forms_apart(config):
        return None
    return {"engine.full_gradients": "matrix"}


def _smaller_format(config: RunConfig) -> Changes | None:
    if config.quantization.int8:
        return None
    if config.model.store == "fp32":
        return {"model.store": "bf16"}
    # An explicit load_in_8bit=false has to change too.
    both = {} if config.quantization.load_in_8bit is None else {"quantization.load_in_8bit": True}
    return {"quantization.enabled": True, **both}


def _fewer_state_bits(config: RunConfig) -> Changes | None:
    fewer = {32: 16, 16: 8}.get(config.optimizer.state_bits)
    return None if fewer is None else {"optimizer.state_bits": fewer}


def _fewer_projection_bits(config: RunConfig) -> Changes | None:
    galore = config.optimizer.galore
    if config.optimizer.type != "galore" or galore.subspace == "random":
        return None
    fewer = {32: 16, 16: 4}.get(galore.projection_bits)
    return None if fewer is None else {"optimizer.galore.projection_bits": fewer}


def _lower_rank(config: RunConfig) -> Changes | None:
    optimizer = config.optimizer
    if optimizer.type == "galore":
        key, rank = "optimizer.galore.rank", optimizer.galore.rank
    elif optimizer.type == "apollo":
        key, rank = "optimizer.apollo.rank", optimizer.apollo.rank or 128
    else:
        return None
    return {key: rank // 2} if rank // 2 >= _LEAST_RANK else None


def _shorter(config: RunConfig) -> Changes | None:
    length = config.training.max_length
    return {"training.max_length": length // 2} if length // 2 >= _LEAST_LENGTH else None


SHORTER = Rung("max_length", _shorter)
"""The last rung, which is used only if the user allows it."""

RUNGS: tuple[Rung, ...] = (
    Rung("kept layers", _keep_fewer, costs_time_only=True),
    Rung("micro-batch", _smaller_batch, costs_time_only=True),
    Rung("logits", _smaller_tile, costs_time_only=True),
    Rung("full gradients", _gradients_apart, costs_time_only=True),
    Rung("host memory", _to_host, costs_time_only=True, uses_host=True),
    Rung("layer inputs", _inputs_to_host, costs_time_only=True, uses_host=True),
    Rung("weight format", _smaller_format),
    Rung("state bits", _fewer_state_bits),
    Rung("projection bits", _fewer_projection_bits),
    Rung("disk", _to_disk, costs_time_only=True),
    Rung("rank", _lower_rank),
)
"""The ladder, cheapest rung first."""


def slowdown(asked: RunConfig, config: RunConfig, num_layers: int) -> float:
    """Return the expected time for a token, relative to other settings.

    Args:
        asked: The settings to compare with.
        config: The settings.
        num_layers: Layers of the model.
    """
    return _time(config, num_layers) / _time(asked, num_layers)


def _always_forms(config: RunConfig) -> bool:
    """Return whether every step forms full gradients that may be formed apart from one another."""
    always = config.training.max_grad_norm > 0 or config.optimizer.galore.fast_path == "never"
    return always and forms_apart(config)


def _time(config: RunConfig, num_layers: int) -> float:
    kept = config.engine.keep_layers if config.training.gradient_checkpointing else num_layers
    share = min(kept, num_layers) / num_layers if isinstance(kept, int) else 0.0
    form = "int8" if config.quantization.int8 else config.model.store
    galore = config.optimizer.type == "galore"
    factor = share + (1 - share) * _CHECKPOINTING
    factor *= _FORMATS[form] * _STATE_BITS[config.optimizer.state_bits]
    factor *= _PROJECTION_BITS[config.optimizer.galore.projection_bits] if galore else 1.0
    factor *= _GRADIENTS_APART if config.engine.full_gradients == "matrix" and _always_forms(config) else 1.0
    # The next larger tile that was measured; 0 means a large one.
    tile = config.memory.logits_chunk_mib
    return factor * next((cost for size, cost in _TILES_MIB.items() if 0 < tile <= size), 1.0)
