"""Record the arguments with which the model calls each layer.

Position embeddings, masks and attention types differ by architecture. Instead of rebuilding them, the base model is
run once with every layer replaced by a recorder. The engine then calls the layers with the recorded arguments.

If several examples are packed into one row, position ids restart at each example. A second run over the longest
example alone records its mask, which `segments.py` needs for attention within each example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sophia_galore.data.batches import MicroBatch
from sophia_galore.engine.segments import Segments, attending_within, own_attention
from sophia_galore.model.architecture import Architecture

Lengths = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one layer for one micro-batch, apart from the hidden states.

    Args:
        args: By position.
        kwargs: By name.
        micro_batch: Number of the micro-batch in the effective batch, for dropout.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    micro_batch: int = 0

    @property
    def is_packed(self) -> bool:
        """Whether rows are packed, so that attention must stay within each example."""
        return isinstance(self.kwargs.get("attention_mask"), Segments)


class _Recorder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Some models read the layer's attention type while they loop over the layers.
        self.attention_type = getattr(layer, "attention_type", None)
        self.hidden: Tensor | None = None
        self.call: LayerCall | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden, self.call = hidden_states, LayerCall(args, kwargs)
        return hidden_states


@contextmanager
def _recorders(architecture: Architecture) -> Iterator[list[_Recorder]]:
    """Replace the base model's layers by recorders, and its final norm by the identity."""
    recorders = [_Recorder(layer) for layer in architecture.layers]
    base: Any = architecture.base
    layers, norm = base.layers, base.norm
    base.layers, base.norm = nn.ModuleList(recorders), nn.Identity()
    try:
        yield recorders
    finally:
        base.layers, base.norm = layers, norm


def capture_calls(architecture: Architecture, embedded: Tensor, batch: MicroBatch) -> tuple[Tensor, list[LayerCall]]:
    """Record the arguments of each layer for one micro-batch.

    Args:
        architecture: The model.
        embedded: (B, T, d) output of the embedding module.
        batch: The micro-batch, on the same device.

    Returns:
        The first layer's input, (B, T, d), part of the autograd graph of `embedded`; and one call per layer.
    """
    if batch.lengths is None:
        return _record(architecture, embedded, attention_mask=batch.attention_mask)
    hidden, calls = _record_positions(architecture, embedded, batch.lengths)
    longest = max(length for row in batch.lengths for length in row)
    _, alone = _record(architecture, embedded[:1, :longest].detach())
    found = [Segments(batch.lengths, call.kwargs["attention_mask"], own_attention(architecture)) for call in alone]
    return hidden, [_with(call, attention_mask=segments) for call, segments in zip(calls, found, strict=True)]


def _record(architecture: Architecture, embedded: Tensor, **inputs: Tensor | None) -> tuple[Tensor, list[LayerCall]]:
    with _recorders(architecture) as recorders:
        architecture.base(inputs_embeds=embedded, use_cache=False, **inputs)
    calls = [recorder.call for recorder in recorders if recorder.call is not None]
    hidden = recorders[0].hidden
    assert hidden is not None and len(calls) == len(recorders)  # every layer was called
    return hidden, calls


def _record_positions(architecture: Architecture, embedded: Tensor, lengths: Lengths) -> tuple[Tensor, list[LayerCall]]:
    """Record the calls with position ids that restart at each example, without masks.

    Phi-3's longrope changes the rotation of all positions of a micro-batch once one position passes a threshold. Here
    the length of each example decides, as if the example were alone.
    """
    positions = _by_token(lengths, embedded, range)
    with attending_within(architecture):
        hidden, calls = _record(architecture, embedded, position_ids=positions)
        most = architecture.most_short_positions
        if most is None or len({length > most for row in lengths for length in row}) == 1:
            return hidden, calls
        is_long = _by_token(lengths, embedded, lambda length: [int(length > most)] * length).bool()
        _, others = _record(architecture, embedded.detach(), position_ids=positions.masked_fill(is_long, 0))
    long, short = (each[0].kwargs["position_embeddings"] for each in (calls, others))
    merged = tuple(torch.where(is_long[..., None], far, near) for far, near in zip(long, short, strict=True))
    return hidden, [_with(call, position_embeddings=merged) for call in calls]


def _by_token(lengths: Lengths, embedded: Tensor, of_example: Callable[[int], Sequence[int]]) -> Tensor:
    """Return a number for each token, (B, T), computed from the length of its example; 0 for padding."""
    rows = [[value for length in row for value in of_example(length)] for row in lengths]
    width = embedded.shape[1]
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=embedded.device)


def _with(call: LayerCall, **kwargs: Any) -> LayerCall:
    return replace(call, kwargs={**call.kwargs, **kwargs})
