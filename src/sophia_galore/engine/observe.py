"""The interface through which the engine reports its phases and the categories of its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

Phase = Literal["load", "forward", "head", "backward", "step", "eval"]
Category = Literal["weights", "gradients", "optimizer state", "projections", "activations", "logits", "other"]

PHASE_CATEGORY: dict[Phase, Category] = {
    "load": "weights",
    "forward": "activations",
    "head": "activations",
    "backward": "activations",
    "step": "other",
    "eval": "activations",
}
"""Category of a tensor that was made in a phase and has no tag."""


class Observer:
    """Base class of observers, which ignores everything; the memory monitor overrides it."""

    watches_tensors: bool = False

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Mark the code inside the context as a phase; of nested phases, the innermost counts.

        `engine/layerwise.py` describes the order of phases in a step.
        """
        yield

    def tag(self, tensor: Tensor, category: Category) -> None:
        """Assign a tensor's storage to a category from now on."""

    def parts(self, parts: Sequence[slice]) -> Sequence[slice]:
        """Return the parts of a loop that are to be run: here, all of them.

        An observer that only measures memory may leave out parts that need the same memory as earlier ones. After each
        part of such a loop, memory use is the same as before it.
        """
        return parts
