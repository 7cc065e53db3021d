"""Which chunks become smaller when memory runs out in a part of a step, and what of the step has to follow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from sophia_galore.data.batches import by_block
from sophia_galore.engine.activations import StepActivations
from sophia_galore.engine.cross_entropy import block_entries
from sophia_galore.engine.logits import comes_whole, keeps_logits
from sophia_galore.engine.retry import (
    ChunkSizes,
    Made,
    OnOom,
    Retry,
    Smaller,
    fewer_kept_layers,
    fewer_rows,
    logits_twice,
    smaller_logits,
)
from sophia_galore.model.architecture import Architecture
from sophia_galore.weights.store import WeightStore


class StepRetry(Retry):
    """Repeats parts of a step with smaller chunks.

    Args:
        architecture: The model's modules.
        store: The weights.
        dtype: Compute precision.
        sizes: The initial sizes.
        on_oom: "adapt"; or "stop": nothing is repeated.
        say: Receives a sentence about each change.
        device: The compute device.
    """

    def __init__(
        self,
        architecture: Architecture,
        store: WeightStore,
        dtype: torch.dtype,
        sizes: ChunkSizes,
        on_oom: OnOom,
        say: Callable[[str], None],
        device: torch.device,
    ) -> None:
        super().__init__(sizes, on_oom, say, device)
        self._architecture, self._store, self._dtype = architecture, store, dtype

    @property
    def first_kept(self) -> int:
        """Number of the first layer without activation checkpointing."""
        return len(self._architecture.layers) - self.sizes.keep_layers

    def run_part(
        self,
        part: Callable[[], Made],
        acts: StepActivations,
        where: Callable[[], str],
        smaller: Callable[[], Smaller | None],
    ) -> Made:
        """Run a part of a step.

        Args:
            part: The part; it must be repeatable after a failure.
            acts: The step's activations, which follow when chunks become smaller.
            where: Returns the part and the step as text, to follow "Memory ran out in".
            smaller: Returns the chunk sizes to try next; None: no smaller sizes would help.

        Returns:
            The result of `part`.
        """
        return self.run(part, where=where, smaller=smaller, shrink=partial(self._shrink, acts))

    def in_forward(self, acts: StepActivations) -> Smaller | None:
        """Return the sizes to try after memory ran out in the forward of a layer."""
        is_kept = len(acts.inputs) - 1 >= self.first_kept
        return fewer_kept_layers(self.sizes) if acts.graphs or is_kept else self.in_rows(acts)

    def in_head(self, acts: StepActivations) -> Smaller | None:
        """Return the sizes to try after memory ran out in the head."""
        if acts.head_is_final:
            return None
        return fewer_kept_layers(self.sizes) if acts.graphs else self.in_logits(acts)

    def in_backward(self, acts: StepActivations, index: int) -> Smaller | None:
        """Return the sizes to try after memory ran out in the backward of a layer."""
        if acts.passes is not None and acts.passes.is_final:
            return None
        # If there is no memory to recompute this layer, there is none to keep its graph beside others either.
        if acts.graphs or index >= self.first_kept:
            return fewer_kept_layers(self.sizes)
        # Dropout in forward drew its numbers for the micro-batches of the current size.
        return None if self._architecture.has_dropout or acts.shares else self.in_rows(acts)

    def in_logits(self, acts: StepActivations, *, keeps: bool = True) -> Smaller | None:
        """Return the sizes to try after memory ran out among the logits.

        Args:
            acts: The step's activations.
            keeps: Whether logits may have been kept for a second pass.
        """
        weight, sizes = self._store[self._architecture.head_name], self.sizes
        num_entries, width = weight.shape
        num_counted = max(sum(batch.num_counted for batch in of_block) for of_block in by_block(acts.batches))
        if not comes_whole(weight, self._dtype):
            if keeps and keeps_logits(num_counted, num_entries, sizes.logits_bytes):
                return logits_twice(sizes, num_counted, num_entries)
            num_entries = block_entries(num_entries, width * self._dtype.itemsize, sizes.logits_bytes)
        return smaller_logits(sizes, num_counted, num_entries)

    def in_rows(self, acts: StepActivations) -> Smaller | None:
        """Return the sizes to try after memory ran out where only the rows of micro-batches can become fewer."""
        return fewer_rows(self.sizes, acts.batches)

    def _shrink(self, acts: StepActivations, sizes: ChunkSizes) -> None:
        acts.drop_graphs(self.first_kept)
        if sizes.max_rows is not None:
            # Dropout draws different numbers for smaller micro-batches, so forward restarts at the embedding.
            acts.split(sizes.max_rows, anew=self._architecture.has_dropout or acts.shares)
