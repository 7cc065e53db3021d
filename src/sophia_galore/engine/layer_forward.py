"""One layer on one micro-batch, with its weights lent.

Weights exist in compute precision only while they are lent; those of experts are decoded one at a time (`experts.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.func import functional_call

from sophia_galore.engine.capture import LayerCall
from sophia_galore.engine.determinism import seeded
from sophia_galore.engine.experts import Experts
from sophia_galore.engine.layer_graph import Tensors
from sophia_galore.engine.observe import Observer
from sophia_galore.engine.segments import attending_within
from sophia_galore.model.architecture import Architecture
from sophia_galore.model.streams import apart, side_by_side
from sophia_galore.numerics.random import key
from sophia_galore.weights.store import WeightStore


class LayerForward:
    """The layers of a model, each of which takes one micro-batch.

    Args:
        architecture: The model's modules; parameters on the meta device.
        store: The weights.
        dtype: Compute precision.
        device: The compute device.
        seed: The run's seed, for dropout.
        observer: Receives the category of each tensor.
    """

    def __init__(
        self,
        architecture: Architecture,
        store: WeightStore,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        observer: Observer,
    ) -> None:
        self._architecture, self._store, self._dtype, self._device = architecture, store, dtype, device
        self._seed, self._observer = seed, observer
        self._experts = [
            {
                name.removeprefix(f"{layer}."): module
                for name, module in architecture.expert_tensors.items()
                if name.startswith(f"{layer}.")
            }
            for layer in architecture.layer_names
        ]

    @contextmanager
    def weights(self, index: int, *, then: str = "") -> Iterator[tuple[Tensors, Experts]]:
        """Lend a layer's weights in compute precision; `then` is the layer or weight that is needed next."""
        name, modules = self._architecture.layer_names[index], self._experts[index]
        with self._store.borrow(name, then=then) as borrowed:
            stored = borrowed.weights_of(name)
            of_experts = {key: weight for key, weight in stored.items() if self.is_expert(index, key)}
            weights = {key: weight.values(self._dtype) for key, weight in stored.items() if key not in of_experts}
            for weight in weights.values():
                self._observer.tag(weight, "weights")
            try:
                yield weights, Experts(modules, of_experts, self._dtype, self._observer)
            finally:
                weights.clear()

    def run(self, index: int, weights: dict[str, Tensor], call: LayerCall, hidden: Tensor) -> Tensor:
        """Run a layer.

        Args:
            index: Layer number.
            weights: As lent, or leaves of a graph that share their memory.
            call: The layer's other arguments.
            hidden: (B, T, d).

        Returns:
            (B, T, d).
        """
        if call.alone:
            return self._run_alone(index, weights, call, hidden)
        has_streams = self._architecture.join_place is not None
        if has_streams:
            hidden = apart(hidden, self._architecture.num_streams)
        with attending_within(self._architecture) if call.is_packed else nullcontext():
            out = functional_call(self._architecture.layers[index], weights, (hidden, *call.args), call.kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return side_by_side(result) if has_streams else result

    def _run_alone(self, index: int, weights: dict[str, Tensor], call: LayerCall, hidden: Tensor) -> Tensor:
        """Run each packed example apart; padding gets zeros."""
        rows: list[Tensor] = []
        for row, lengths in zip(hidden.split(1), call.lengths, strict=True):
            padding = hidden.shape[1] - sum(lengths)
            parts = row.split([*lengths, padding], 1)
            done = [self.run(index, weights, call.alone[part.shape[1]], part) for part in parts[:-1]]
            rows.append(torch.cat([*done, torch.zeros_like(parts[-1])], 1))
        return torch.cat(rows)

    @contextmanager
    def dropout_stream(self, step: int, index: int, call: LayerCall) -> Iterator[None]:
        """Seed dropout, so that it draws the same numbers in forward, in recomputation and after a resume."""
        if not self._architecture.has_dropout:
            yield
            return
        with seeded(self._device, key(self._seed, "dropout", step, index, call.micro_batch)):
            yield

    def after(self, index: int) -> str:
        """Return what forward needs after a layer."""
        names = self._architecture.layer_names
        return names[index + 1] if index + 1 < len(names) else self._architecture.head_name

    def shapes(self, index: int) -> dict[str, torch.Size]:
        """Return the shapes of a layer's weights by their names inside it, in the model's order."""
        name = self._architecture.layer_names[index]
        with self._store.borrow(name) as borrowed:
            return {key: weight.shape for key, weight in borrowed.weights_of(name).items()}

    def is_expert(self, index: int, name: str) -> bool:
        """Return whether a name inside a layer is that of an expert's weight."""
        return name.rpartition(".")[0] in self._experts[index]
