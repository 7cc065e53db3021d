"""Explains why memory ran out: in which phase, what grew, and what is largest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sophia_galore.config.size import bytes_in_words
from sophia_galore.engine.observe import Phase
from sophia_galore.engine.probe import WHAT_HELPS
from sophia_galore.errors import short
from sophia_galore.memory.tracker import Held, Live, Refusal, StorageTracker
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.weights.store import WeightStore

_PHASES: dict[Phase, str] = {
    "load": "while loading",
    "forward": "in forward",
    "head": "in the head",
    "backward": "in backward",
    "step": "in the optimizer's step",
    "eval": "in evaluation",
}


@dataclass(frozen=True)
class Snapshot:
    """The state of memory when it ran out.

    Args:
        phase: The phase of the run; None between phases.
        before: Bytes by category at the beginning of the phase.
        held: What was allocated; None if it was not counted.
        refusal: The allocation that would have exceeded the limit, if that was the cause.
        names: Names of storages, by key.
    """

    phase: Phase | None
    before: Mapping[str, int]
    held: Held | None
    refusal: Refusal | None
    names: Mapping[int, str]

    def explain(self, error: BaseException, limit: str) -> str:
        """Return the text after "Out of memory", on one line.

        Args:
            error: The error that was raised.
            limit: The limit as text, such as "memory.limit (4 GiB)"; "" if there is none.
        """
        if self.refusal is not None:
            asked = f"{bytes_in_words(self.refusal.asked_bytes)} more ({_form(self.refusal.shape, self.refusal.dtype)})"
            taken = bytes_in_words(self.refusal.held.allocated_bytes)
            cause = f"{asked} do not fit into {limit}, {taken} are taken."
        else:
            cause = f"{short(error)}." + (f" The limit is {limit}." if limit else "")
        place = f", {_PHASES[self.phase]}" if self.phase else ""
        return f"{place}: " + " ".join(filter(None, [cause, self._growth(), self._largest()]))

    def _growth(self) -> str:
        if self.held is None or self.phase is None:
            return ""
        grown = {name: now - self.before.get(name, 0) for name, now in self.held.by_category.items()}
        most = max(grown, key=lambda name: grown[name], default=None)
        if most is None or grown[most] <= 0:
            return ""
        before, now = bytes_in_words(self.before.get(most, 0)), bytes_in_words(self.held.by_category[most])
        what = "other tensors" if most == "other" else most
        return f"Since that began, {what} grew most, from {before} to {now}."

    def _largest(self) -> str:
        if self.held is None or not self.held.largest:
            return ""
        return "Largest: " + "; ".join(self._tensor(key, live) for key, live in self.held.largest) + "."

    def _tensor(self, storage_key: int, live: Live) -> str:
        name = self.names.get(storage_key, live.category)
        return f"{name} ({_form(live.shape, live.dtype)}, {bytes_in_words(live.num_bytes)})"


def with_usual_remedies(remedy: str) -> str:
    """Return a remedy, followed by the usual ones."""
    return f"{remedy}, or {WHAT_HELPS[0].lower()}{WHAT_HELPS[1:]}"


def storage_names(store: WeightStore, optimizer: ParamOptimizer) -> dict[int, str]:
    """Return names of the storages of weights and states, without allocating memory.

    Args:
        store: The weights.
        optimizer: The optimizer, which has the states.
    """
    tensors = dict(optimizer.states.named())
    for name, weight in store.items():
        if not weight.held_by_module:
            # The tensors of a deferred update belong to the optimizer's state.
            tensors |= {f"{name}{ending}": tensor for ending, tensor in weight.settled.tensors().items()}
    return {StorageTracker.storage_key(tensor): name for name, tensor in tensors.items()}


def _form(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    sizes = " x ".join(map(str, shape)) or "one number"
    return f"{sizes}, {str(dtype).removeprefix('torch.')}"
