"""The tensors that a step keeps between its forward and its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sophia_galore.data.batches import MicroBatch
from sophia_galore.data.portion import Portion
from sophia_galore.engine.capture import LayerCall
from sophia_galore.engine.embedding import Embedded
from sophia_galore.engine.layer_graph import LayerGraph
from sophia_galore.engine.objective import Objective
from sophia_galore.engine.passes import Passes
from sophia_galore.engine.retry import split_rows
from sophia_galore.engine.routing import Routing
from sophia_galore.optim.request import Wants
from sophia_galore.streaming.spill import Spill


@dataclass(frozen=True)
class StepRequest:
    """The settings of one optimizer step.

    Args:
        step: Number of the step, counted from 1.
        wants: Returns the form in which a parameter's gradient is needed.
        objective: The loss to minimise.
        portion: This process's micro-batches.
        routing: Receives the choices of experts; None: there are none, or they are not watched.
    """

    step: int
    wants: Wants
    objective: Objective
    portion: Portion
    routing: Routing | None = None


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Move a micro-batch to a device; tensors that are already there are not copied."""
    mask = batch.attention_mask
    return replace(
        batch,
        input_ids=batch.input_ids.to(device),
        labels=batch.labels.to(device),
        attention_mask=None if mask is None else mask.to(device),
    )


class StepActivations:
    """The activations and gradients of an effective batch during one step.

    Args:
        batches: The micro-batches, on the compute device.
        embed: Runs the embedding over micro-batches, block by block.
        max_rows: Micro-batches with more rows are split; None: none is split.
        spill: Where layer inputs wait for their backward; None: on the device.

    Attributes:
        batches: The micro-batches, after all splits so far.
        inputs: For each layer whose backward is still to come, its input, per micro-batch (B, T, d). After forward,
            the last entry is the last layer's output, until the head takes it. Those that left the device are empty.
        graphs: Autograd graphs of the layers without activation checkpointing, by layer number.
        out_grads: Per micro-batch (B, T, d), the gradient with respect to the output of the layer whose backward is
            next.
        passes: The backward passes of the layer whose backward has begun; None between two layers.
        head_is_final: True once the optimizer may have used the head's gradients; the head must not be repeated then.
    """

    def __init__(
        self,
        batches: Sequence[MicroBatch],
        embed: Callable[[Sequence[MicroBatch]], list[Embedded]],
        max_rows: int | None,
        spill: Spill | None = None,
    ) -> None:
        self.batches = list(batches)
        self.embed = embed
        self._embedded: list[Embedded] = []
        self.inputs: list[list[Tensor]] = []
        self._spill = spill
        self.graphs: dict[int, LayerGraph] = {}
        self.out_grads: list[Tensor] = []
        self.passes: Passes | None = None
        self.head_is_final = False
        if max_rows is not None:
            self.split(max_rows)

    @property
    def embedded(self) -> list[Embedded]:
        """The embedding's output and the arguments of each layer, for each block of micro-batches."""
        assert self._embedded  # `enter` comes first
        return self._embedded

    def enter(self) -> None:
        """Run the embedding; its output becomes the first layer's input."""
        self._embedded = self.embed(self.batches)
        self.inputs = [[first.detach() for part in self._embedded for first in part.hidden]]

    def advance(self, outputs: list[Tensor], *, leaves: bool) -> None:
        """Append the output of a layer.

        Args:
            outputs: Per micro-batch (B, T, d).
            leaves: Whether the layer's input is not needed on the device until its backward.
        """
        if leaves and self._spill is not None:
            index = len(self.inputs) - 1
            self._spill.put(index, self.inputs[index])
            self.inputs[index] = []
        self.inputs.append(outputs)

    def last_input(self) -> list[Tensor]:
        """Return the input of the layer whose backward is next; that of the one before is fetched meanwhile."""
        index = len(self.inputs) - 1
        if self._spill is not None:
            if not self.inputs[index]:
                self.inputs[index] = self._spill.take(index)
            if index and not self.inputs[index - 1]:
                self._spill.fetch(index - 1)
        return self.inputs[index]

    def calls(self, index: int) -> list[LayerCall]:
        """Return the arguments of a layer, per micro-batch."""
        return [layer_calls[index] for part in self.embedded for layer_calls in part.calls]

    @property
    def shares(self) -> bool:
        """Whether layers share tensors besides the hidden states; these can't be split between two layers."""
        return any(call.inputs or call.states for part in self._embedded for calls in part.calls for call in calls)

    def drop_graphs(self, first_kept: int) -> None:
        """Drop the graphs of all layers before `first_kept`; backward recomputes these layers."""
        for index in [index for index in self.graphs if index < first_kept]:
            del self.graphs[index]

    def split(self, max_rows: int, *, anew: bool = False) -> None:
        """Split micro-batches and the tensors kept for them. No graph may be kept at this point.

        Args:
            max_rows: Micro-batches with more rows are split.
            anew: Restart at the embedding, because dropout would draw different numbers for the smaller micro-batches.
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
        assert not self.graphs and self._spill is None  # config/check.py refuses to adapt what waits elsewhere
        # Layer arguments depend on the micro-batch, so the embedding is run again to record them.
        later = [] if anew else [rows(of_layer) for of_layer in self.inputs[1:]]
        self.out_grads = [] if anew else rows(self.out_grads) if self.out_grads else []
        self._embedded, self.inputs = [], []
        self.enter()
        self.inputs += later
