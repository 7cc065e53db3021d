"""One optimizer step: the engine finds gradients, the optimizer moves weights, limits lie between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from sophia_galore.data.batches import MicroBatch
from sophia_galore.engine.head import Grads
from sophia_galore.engine.layerwise import LayerwiseEngine
from sophia_galore.engine.passage import StepResult
from sophia_galore.engine.product import Chooser, Choosers, Projectors
from sophia_galore.errors import NonFiniteError
from sophia_galore.numerics.subspace import Projector
from sophia_galore.optim.limits import clip_, grad_norm
from sophia_galore.optim.optimizer import HeldGrad, ParamOptimizer
from sophia_galore.weights.store import WeightStore

ClipBy = Literal["nothing", "model", "layer"]


class Stepper:
    """Takes steps. Weights whose updates are folded in late come to stand in the store together with these.

    Args:
        engine: Finds gradients.
        optimizer: Moves weights.
        store: The weights.
        clip_by: What gradients are clipped by: the norm over the model, over each layer, or nothing.
        curvature_every: Steps between two estimates of the curvature; 0: no rule needs it.
        max_grad_norm: Largest gradient norm, of what `clip_by` says.
    """

    def __init__(
        self,
        engine: LayerwiseEngine,
        optimizer: ParamOptimizer,
        store: WeightStore,
        *,
        clip_by: ClipBy = "nothing",
        curvature_every: int = 0,
        max_grad_norm: float = 0.0,
    ) -> None:
        self._engine, self._optimizer, self._store = engine, optimizer, store
        self._clip_by, self._curvature_every = clip_by, curvature_every
        self._max_grad_norm = max_grad_norm
        for name in optimizer.specs:
            store[name] = optimizer.adopt(name, store[name])
        # Names whose gradients come as products in the pass that is running.
        self._projected: set[str] = set()

    def take(self, batches: Sequence[MicroBatch], *, step: int, factor: float) -> tuple[StepResult, float]:
        """One optimizer step.

        Args:
            batches: The micro-batches of its effective batch.
            step: Its number, counted from 1.
            factor: The schedule's value.

        Returns:
            What the engine found, and the norm of the gradient over the whole model before clipping.

        Raises:
            NonFiniteError: The loss or a gradient is not finite.
        """
        if self._curvature_every and (step - 1) % self._curvature_every == 0:
            self._estimate_curvature(batches, step)
        norms: list[float] = []
        held: dict[str, HeldGrad] = {}

        def apply(grads: Grads) -> None:
            norms.append(grad_norm(grads.values()))
            # Where it is not finite, `hold` names the gradient that is to blame.
            if self._clip_by == "layer" and math.isfinite(norms[-1]):
                clip_(grads.values(), norms[-1], self._max_grad_norm)
            for name in list(grads):
                kept = self._optimizer.hold(name, grads.pop(name), step=step, projected=name in self._projected)
                if self._clip_by == "model":
                    held[name] = kept
                else:
                    self._optimizer.step_held(name, self._store[name], kept, step=step, factor=factor)

        projector, chooser = self._asked(step, observing=False)
        result = self._engine.step(batches, apply, step=step, projector=projector, chooser=chooser)
        norm = math.hypot(*norms)
        if held:
            self._step_all(held, norm, step, factor)
        return result, norm

    def _step_all(self, held: dict[str, HeldGrad], norm: float, step: int, factor: float) -> None:
        """Clip by the norm over the whole model, then move every weight."""
        if not math.isfinite(norm):
            raise NonFiniteError(f"The gradient's norm is {norm} at step {step}.", "Lower training.learning_rate.")
        for name in list(held):
            kept = held.pop(name)
            clip_(kept.tensors(), norm, self._max_grad_norm)
            self._optimizer.step_held(name, self._store[name], kept, step=step, factor=factor)

    def _estimate_curvature(self, batches: Sequence[MicroBatch], step: int) -> None:
        """Let the rules that need it see a gradient whose labels are the model's own."""
        num_samples = sum(batch.num_counted for batch in batches)

        def observe(grads: Grads) -> None:
            for name in list(grads):
                self._optimizer.observe_curvature(
                    name, grads.pop(name), step=step, num_samples=num_samples, projected=name in self._projected
                )

        projector, chooser = self._asked(step, observing=True)
        self._engine.step(batches, observe, step=step, projector=projector, chooser=chooser, sampled_labels=True)

    def _asked(self, step: int, *, observing: bool) -> tuple[Projectors, Choosers]:
        """What the engine is to ask the optimizer for; whose gradients come as products is written down."""
        self._projected.clear()

        def projector(name: str) -> Projector | None:
            found = self._optimizer.projector(name, step)
            if found is not None:
                self._projected.add(name)
            return found

        def chooser(name: str) -> Chooser | None:
            found = self._optimizer.chooser(name, step, observing=observing)
            if found is not None:
                self._projected.add(name)
            return found

        return projector, chooser
