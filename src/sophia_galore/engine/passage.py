"""What a step has under way between embedding and embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sophia_galore.data.batches import MicroBatch
from sophia_galore.engine.capture import LayerCall
from sophia_galore.engine.embedding import Embedded
from sophia_galore.engine.layer import LayerGraph
from sophia_galore.engine.product import Choosers, Projectors
from sophia_galore.engine.relief import split_rows


@dataclass(frozen=True)
class Asked:
    """What a step was asked.

    Args:
        step: Its number.
        projector: What gradients are wanted times.
        chooser: Who says what gradients are wanted times, having seen them.
        sampled_labels: Whether labels are drawn.
    """

    step: int
    projector: Projectors
    chooser: Choosers
    sampled_labels: bool


@dataclass(frozen=True)
class StepResult:
    """What one step found.

    Args:
        loss: Mean cross-entropy over the counted tokens of the effective batch, in nats; of drawn labels, if
            they were drawn.
        num_tokens: Tokens of the effective batch, padding not included.
        num_counted: Tokens whose loss counts.
    """

    loss: float
    num_tokens: int
    num_counted: int


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """A micro-batch whose tensors are on a device; those that are there already are not copied."""
    mask = batch.attention_mask
    return replace(
        batch,
        input_ids=batch.input_ids.to(device),
        labels=batch.labels.to(device),
        attention_mask=None if mask is None else mask.to(device),
    )


class Passage:
    """An effective batch on its way through the layers, forth and back.

    Args:
        batches: The micro-batches, on the device of the weights.
        embed: Embeds micro-batches.

    Attributes:
        batches: The micro-batches, as they are split by now.
        inputs: Of each layer that was gone through and not gone back through, per micro-batch (B, T, d), what entered
            it; last, what came out of the last one of them, until the head takes it.
        graphs: By the layer's number, those that were kept.
        out_grads: Per micro-batch (B, T, d), the gradient by the output of the layer that backward comes to next.
    """

    def __init__(
        self, batches: Sequence[MicroBatch], embed: Callable[[Sequence[MicroBatch]], Embedded], most_rows: int | None
    ) -> None:
        self.batches = list(batches)
        self.embed = embed
        self._embedded: Embedded | None = None
        self.inputs: list[list[Tensor]] = []
        self.graphs: dict[int, LayerGraph] = {}
        self.out_grads: list[Tensor] = []
        if most_rows is not None:
            self.split(most_rows)

    @property
    def embedded(self) -> Embedded:
        """What entered the first layer, and how the layers are called."""
        assert self._embedded is not None  # `enter` comes first
        return self._embedded

    def enter(self) -> None:
        """Through the embedding."""
        self._embedded = self.embed(self.batches)
        self.inputs = [[first.detach() for first in self._embedded.hidden]]

    def calls(self, index: int) -> list[LayerCall]:
        """Per micro-batch, how a layer is called."""
        return [layer_calls[index] for layer_calls in self.embedded.calls]

    def keep_graphs(self, first: int) -> None:
        """Drop the graphs of the layers before one."""
        for index in [index for index in self.graphs if index < first]:
            del self.graphs[index]

    def split(self, most_rows: int, *, anew: bool = False) -> None:
        """Split micro-batches, and with them all that is under way; no graph may be.

        Args:
            most_rows: Those with more rows are split.
            anew: Begin anew with the embedding, because the layers would draw other numbers.
        """
        parts = [split_rows(batch, most_rows) for batch in self.batches]
        sizes = [[len(part.input_ids) for part in of_one] for of_one in parts]

        def rows(whole: list[Tensor]) -> list[Tensor]:
            return [part for tensor, of_one in zip(whole, sizes, strict=True) for part in tensor.split(of_one)]

        self.batches = [part for of_one in parts for part in of_one]
        if not self.inputs:
            return
        assert not self.graphs
        # The calls differ by micro-batch, so they are asked for once more, and what the embedding gives with them.
        later = [] if anew else [rows(of_layer) for of_layer in self.inputs[1:]]
        self.out_grads = [] if anew else rows(self.out_grads) if self.out_grads else []
        self._embedded, self.inputs = None, []
        self.enter()
        self.inputs += later
