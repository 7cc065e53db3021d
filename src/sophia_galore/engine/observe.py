"""What the engine tells whoever watches it: phases, and what a tensor is."""

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
"""What a tensor that is made in a phase counts as, as long as nobody says what it is."""


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

    def parts(self, parts: Sequence[slice]) -> Sequence[slice]:
        """Which of the parts are gone through, where each leaves the memory behind that it found; all of them.

        One that watches memory only, and no numbers, may leave out those that are like the ones before.
        """
        return parts
