"""Learning from the model itself how each layer is called.

Position embeddings, masks and attention types differ by architecture. Instead of rebuilding them,
the base model is run once with every layer replaced by a recorder: what it hands to its layers is
what the engine will hand to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sophia_galore.model.anatomy import Anatomy


@dataclass(frozen=True)
class LayerCall:
    """Arguments of one layer beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


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


def capture_calls(anatomy: Anatomy, embedded: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, list[LayerCall]]:
    """Record what the model hands to its layers for one micro-batch.

    Args:
        anatomy: The model.
        embedded: (B, T, d) output of the embedding module.
        attention_mask: (B, T), 1 for tokens and 0 for padding; None: nothing is padded.

    Returns:
        (B, T, d) hidden states that enter the first layer, part of the autograd graph of `embedded`,
        and one call a layer.
    """
    with _recorders(anatomy) as recorders:
        anatomy.base(inputs_embeds=embedded, attention_mask=attention_mask, use_cache=False)
    calls = [recorder.call for recorder in recorders if recorder.call is not None]
    hidden = recorders[0].hidden
    assert hidden is not None and len(calls) == len(recorders)  # every layer was called
    return hidden, calls
