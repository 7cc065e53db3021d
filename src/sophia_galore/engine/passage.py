"""What a step has under way between embedding and embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sophia_galore.data.batches import MicroBatch
from sophia_galore.engine.capture import LayerCall
from sophia_galore.engine.embedding import Embedded, embed
from sophia_galore.engine.layer import LayerGraph
from sophia_galore.model.anatomy import Anatomy
from sophia_galore.model.store import WeightStore


@dataclass(eq=False)
class Passage:
    """An effective batch on its way through the layers, forth and back.

    Args:
        batches: The micro-batches.
        embedded: What entered the first layer, and how the layers are called.
        inputs: Of each layer that was gone through and not gone back through, per micro-batch (B, T, d), what entered
            it; last, what came out of the last one of them, until the head takes it.
        graphs: By the layer's number, those that were kept.
        out_grads: Per micro-batch (B, T, d), the gradient by the output of the layer that backward comes to next.
    """

    batches: Sequence[MicroBatch]
    embedded: Embedded
    inputs: list[list[Tensor]]
    graphs: dict[int, LayerGraph] = field(default_factory=dict)
    out_grads: list[Tensor] = field(default_factory=list)

    def calls(self, index: int) -> list[LayerCall]:
        """Per micro-batch, how a layer is called."""
        return [layer_calls[index] for layer_calls in self.embedded.calls]


def enter(anatomy: Anatomy, store: WeightStore, batches: Sequence[MicroBatch], dtype: torch.dtype) -> Passage:
    """Begin with the embedding.

    Args:
        anatomy: The model.
        store: The weights.
        batches: Micro-batches on the device of the weights.
        dtype: Compute precision.
    """
    embedded = embed(anatomy, store, batches, dtype)
    return Passage(batches, embedded, [[first.detach() for first in embedded.hidden]])
