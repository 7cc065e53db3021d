"""Sophia&GaLore: full-parameter fine-tuning of language models on small cards.

`GaLore`, `Sophia` and `Apollo` are `torch.optim` optimizers for training loops of your own; `attach` lets one update
in backward, `watch` shows Sophia the curvature, and `shard_placement` says how to shard a model for them. The command
line is `sophia-galore`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sophia_galore.optim.attach import attach
    from sophia_galore.optim.galore import Apollo, GaLore
    from sophia_galore.optim.shard_dims import shard_placement
    from sophia_galore.optim.sophia import Sophia
    from sophia_galore.optim.watch import watch

__version__ = "0.5.0"
__all__ = ["Apollo", "GaLore", "Sophia", "__version__", "attach", "shard_placement", "watch"]

_HOMES = {
    "Apollo": "galore",
    "GaLore": "galore",
    "Sophia": "sophia",
    "attach": "attach",
    "shard_placement": "shard_dims",
    "watch": "watch",
}


def __getattr__(name: str) -> object:
    # Not at the top: these need torch, which takes seconds, and the command line answers without it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.optim.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
