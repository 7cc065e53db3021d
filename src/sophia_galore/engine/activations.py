"""What a step holds between its forward and its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sophia_galore.data.batches import MicroBatch
from sophia_galore.engine.capture import LayerCall
from sophia_galore.engine.embedding import Embedded
from sophia_galore.engine.layer import LayerGraph
from sophia_galore.engine.objective import Objective
from sophia_galore.engine.retry import split_rows
from sophia_galore.optim.request import Wants


@dataclass(frozen=True)
class StepRequest:
    """What a step is asked for.

    Args:
        step: Its number.
        wants: In which form each gradient is wanted.
        objective: What is minimised.
    """

    step: int
    wants: Wants
    objective: Objective


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """A micro-batch whose tensors are on a device; those that are there already are not copied."""
    mask = batch.attention_mask
    return replace(
        batch,
        input_ids=batch.input_ids.to(device),
        labels=batch.labels.to(device),
        attention_mask=None if mask is None else mask.to(device),
    )


class StepActivations:
    """An effective batch on its way through the layers.

    Args:
        batches: The micro-batches, on the device of the arithmetic.
        embed: Embeds micro-batches.
        max_rows: Micro-batches with more rows are split; None: none is.

    Attributes:
        batches: The micro-batches, as they are split by now.
        inputs: Of each layer that was gone through and not gone back through, per micro-batch (B, T, d), what entered
            it; last, what came out of the last one of them, until the head takes it.
        graphs: By the layer's number, those of layers without activation checkpointing.
        out_grads: Per micro-batch (B, T, d), the gradient with respect to the output of the layer that backward
            reaches next.
        head_is_final: Whether the head may not be repeated, since the optimizer has seen its gradients.
    """

    def __init__(
        self, batches: Sequence[MicroBatch], embed: Callable[[Sequence[MicroBatch]], Embedded], max_rows: int | None
    ) -> None:
        self.batches = list(batches)
        self.embed = embed
        self._embedded: Embedded | None = None
        self.inputs: list[list[Tensor]] = []
        self.graphs: dict[int, LayerGraph] = {}
        self.out_grads: list[Tensor] = []
        self.head_is_final = False
        if max_rows is not None:
            self.split(max_rows)

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

    def drop_graphs(self, first_kept: int) -> None:
        """Drop the graphs of the layers before one; backward computes these once more."""
        for index in [index for index in self.graphs if index < first_kept]:
            del self.graphs[index]

    def split(self, max_rows: int, *, anew: bool = False) -> None:
        """Split micro-batches, and with them all that is kept of them; no graph may be.

        Args:
            max_rows: Those with more rows are split; where none has, nothing happens.
            anew: Begin anew with the embedding, because the layers would draw other numbers.
        """
        if all(len(batch.input_ids) <= max_rows for batch in self.batches):
            return
        parts = [split_rows(batch, max_rows) for batch in self.batches]
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
