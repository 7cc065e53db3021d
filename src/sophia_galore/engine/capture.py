"""Learning from the model itself how each layer is called.

Position embeddings, masks and attention types differ by architecture. Instead of rebuilding them,
the base model is run once with every layer replaced by a recorder: what it hands to its layers is
what the engine will hand to them.

Where several examples lie in a row, the model is told where in its own example each token stands, and once more it is
asked how it would mask the longest one, which is all that `segments.py` needs to attend within each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sophia_galore.data.batches import MicroBatch
from sophia_galore.engine.segments import Segments, attending_within, own_attention
from sophia_galore.model.anatomy import Anatomy


@dataclass(frozen=True)
class LayerCall:
    """Arguments of one layer beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def is_packed(self) -> bool:
        """Whether attention is to be within the examples of a row."""
        return isinstance(self.kwargs.get("attention_mask"), Segments)


class _Recorder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Some models ask the layer for its attention type while they loop over the layers.
        self.attention_type = getattr(layer, "attention_type", None)
        self.hidden: Tensor | None = None
        self.call: LayerCall | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden, self.call = hidden_states, LayerCall(args, kwargs)
        return hidden_states


@contextmanager
def _recorders(anatomy: Anatomy) -> Iterator[list[_Recorder]]:
    """The base model with recorders for layers and nothing for the final norm."""
    recorders = [_Recorder(layer) for layer in anatomy.layers]
    base: Any = anatomy.base
    layers, norm = base.layers, base.norm
    base.layers, base.norm = nn.ModuleList(recorders), nn.Identity()
    try:
        yield recorders
    finally:
        base.layers, base.norm = layers, norm


def capture_calls(anatomy: Anatomy, embedded: Tensor, batch: MicroBatch) -> tuple[Tensor, list[LayerCall]]:
    """Record what the model hands to its layers for one micro-batch.

    Args:
        anatomy: The model.
        embedded: (B, T, d) output of the embedding module.
        batch: The micro-batch, on the same device.

    Returns:
        (B, T, d) hidden states that enter the first layer, part of the autograd graph of `embedded`,
        and one call a layer.
    """
    if batch.lengths is None:
        return _record(anatomy, embedded, attention_mask=batch.attention_mask)
    positions = _positions(batch.lengths, batch.input_ids)
    with attending_within(anatomy):
        hidden, calls = _record(anatomy, embedded, position_ids=positions)
    longest = max(length for row in batch.lengths for length in row)
    _, alone = _record(anatomy, embedded[:1, :longest].detach())
    found = [Segments(batch.lengths, call.kwargs["attention_mask"], own_attention(anatomy)) for call in alone]
    return hidden, [
        replace(call, kwargs={**call.kwargs, "attention_mask": segments})
        for call, segments in zip(calls, found, strict=True)
    ]


def _record(anatomy: Anatomy, embedded: Tensor, **inputs: Tensor | None) -> tuple[Tensor, list[LayerCall]]:
    with _recorders(anatomy) as recorders:
        anatomy.base(inputs_embeds=embedded, use_cache=False, **inputs)
    calls = [recorder.call for recorder in recorders if recorder.call is not None]
    hidden = recorders[0].hidden
    assert hidden is not None and len(calls) == len(recorders)  # every layer was called
    return hidden, calls


def _positions(lengths: Sequence[Sequence[int]], input_ids: Tensor) -> Tensor:
    """Where in its own example each token stands, (B, T); 0 for padding."""
    width = input_ids.shape[1]
    positions = [[place for length in row for place in range(length)] for row in lengths]
    return torch.tensor([row + [0] * (width - len(row)) for row in positions], device=input_ids.device)
