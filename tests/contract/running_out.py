"""Memory that runs out in a test, and what a step hands on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engines import take_step
from sophia_galore.data.batches import MicroBatch
from sophia_galore.engine import cross_entropy
from sophia_galore.engine.layerwise import LayerwiseEngine
from sophia_galore.engine.observe import Observer, Phase
from sophia_galore.errors import OutOfMemory
from sophia_galore.numerics.subspace import Projector
from tiny import VOCAB

# Sums over the same tokens in smaller parts; over all tests here the worst seen is 2.0e-7.
TOLERANCE = 1e-6


def shrink_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the head's tiles can be halved: the ragged batches have 42 counted tokens."""
    monkeypatch.setattr(cross_entropy, "_MIN_TOKENS", 8)


class RunsOut(TorchDispatchMode, Observer):
    """Memory that runs out before one operation of one phase; counts the operations of every phase.

    Args:
        phase: Which phase.
        which: Which of those with this name.
        operation: Which operation in it; -1: as the phase is entered.
        times: In so many phases from this one on.
    """

    watches_tensors = False

    def __init__(self, phase: Phase | None = None, which: int = 0, operation: int = 0, times: int = 1) -> None:
        super().__init__()
        self.wanted, self.operation = [(phase, which + more) for more in range(times)], operation
        self.counts: list[tuple[Phase, int, int]] = []  # name, which of it, operations
        self.ran_out = 0

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:  # type: ignore[override]
        self.counts.append((name, sum(seen == name for seen, _, _ in self.counts), 0))
        if self.operation == -1 and self.counts[-1][:2] in self.wanted:
            self._run_out()
        yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.counts:
            name, which, number = self.counts[-1]
            self.counts[-1] = (name, which, number + 1)
            if (name, which) in self.wanted and number == self.operation:
                self._run_out()
        return func(*args, **(kwargs or {}))

    def _run_out(self) -> None:
        self.ran_out += 1
        raise OutOfMemory("Out of memory in a test.")


def rows_of(num_rows: int, length: int = 12) -> list[MicroBatch]:
    """One micro-batch without padding."""
    tokens = torch.randint(3, VOCAB, (num_rows, length), generator=torch.Generator().manual_seed(5))
    labels = torch.full_like(tokens, -100)
    labels[:, 1:-1] = tokens[:, 2:]
    return [MicroBatch(tokens, None, labels, tokens.numel(), int((labels != -100).sum()))]


def gradients(
    engine: LayerwiseEngine,
    batches: list[MicroBatch],
    memory: TorchDispatchMode | None = None,
    projectors: dict[str, Projector] | None = None,
    step: int = 1,
) -> dict[str, Tensor]:
    """Everything that is handed on, each once."""
    got: dict[str, Tensor] = {}

    def apply(grads: dict[str, Tensor]) -> None:
        assert not got.keys() & grads.keys()
        got.update(grads)

    with memory or nullcontext():
        take_step(engine, batches, apply, step=step, wants=(projectors or {}).get)
    return got


def worst(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    # Biases of keys have gradients that cancel to roundings.
    return max(
        float((got[name] - grad).norm() / grad.norm()) for name, grad in expected.items() if "k_proj.bias" not in name
    )
