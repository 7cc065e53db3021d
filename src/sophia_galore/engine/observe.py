"""What the engine tells whoever watches it: phases, and what a tensor is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

Phase = Literal["load", "forward", "head", "backward", "step", "eval"]
Category = Literal["weights", "gradients", "optimizer state", "projections", "activations", "logits", "other"]


class Observer:
    """Watches nothing; the memory monitor overrides it."""

    watches_tensors: bool = False

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """The engine is in this phase inside the context; contexts nest, the innermost counts.

        In which order a step goes through them, `engine/layerwise.py` says.
        """
        yield

    def tag(self, tensor: Tensor, category: Category) -> None:
        """This tensor's storage belongs to this category from now on."""
