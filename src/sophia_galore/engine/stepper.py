"""One optimizer step, from the micro-batches to the written weights."""

from __future__ import annotations

import math
from contextlib import closing
from functools import partial
from typing import Literal

from sophia_galore.data.portion import Portion
from sophia_galore.engine.layerwise import LayerwiseEngine
from sophia_galore.engine.objective import CrossEntropy, SampledCrossEntropy
from sophia_galore.engine.step_results import StepResult
from sophia_galore.errors import NonFiniteError
from sophia_galore.optim.limits import clip_, grad_norm
from sophia_galore.optim.optimizer import ParamOptimizer, PreparedGradient
from sophia_galore.weights.store import WeightStore

ClipBy = Literal["nothing", "model", "layer"]


class Stepper:
    """Runs optimizer steps. It first joins weights in the store with their deferred updates, if there are any.

    Args:
        engine: Computes the gradients.
        optimizer: Updates the weights.
        store: The weights.
        clip_by: Clip gradients by their norm over the whole model, by their norm over each layer, or not at all.
        curvature_every: Steps between two estimates of the curvature; 0: no rule needs it.
        max_grad_norm: Largest norm, for `clip_by`.
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
            store[name] = optimizer.with_deferred_update(name, store[name])

    def take(self, portion: Portion, *, step: int, factor: float) -> tuple[StepResult, float]:
        """Run one optimizer step.

        Args:
            portion: This process's micro-batches of its effective batch.
            step: Number of the step, counted from 1.
            factor: The schedule's value, a factor on the learning rate.

        Returns:
            The loss with the token counts, and the norm of the gradient over the whole model before clipping.

        Raises:
            NonFiniteError: The loss or a gradient is not finite.
        """
        if self._curvature_every and (step - 1) % self._curvature_every == 0:
            self._estimate_curvature(portion, step)
        engine, optimizer = self._engine, self._optimizer
        norms: list[float] = []
        held: dict[str, PreparedGradient] = {}
        forward = engine.forward(
            portion, step=step, wants=partial(optimizer.request, step=step), objective=CrossEntropy()
        )
        result = forward.result
        with closing(engine.backward(forward)) as layers:
            del forward
            for layer in layers:
                with engine.using(layer) as gradients:
                    for names in layer.parts:
                        norms.append(grad_norm(gradients[name] for name in names))
                        # If the norm is not finite, `prepare` raises an error that names the gradient.
                        clips = self._clip_by == "layer" and math.isfinite(norms[-1])
                        for name in names:
                            prepared = optimizer.prepare(name, gradients.pop(name), step=step)
                            if clips:
                                clip_(prepared.tensors(), norms[-1], self._max_grad_norm)
                            if self._clip_by == "model":
                                held[name] = prepared
                            else:
                                optimizer.apply(name, layer.weights[name], prepared, step=step, factor=factor)
                            del prepared  # else it would stay in memory during the next layer's backward
        norm = math.hypot(*norms)
        if held:
            self._apply_all(held, norm, step, factor)
        optimizer.settle()
        return result, norm

    def _apply_all(self, held: dict[str, PreparedGradient], norm: float, step: int, factor: float) -> None:
        """Clip by the norm over the whole model, then update every weight."""
        if not math.isfinite(norm):
            raise NonFiniteError(f"The gradient's norm is {norm} at step {step}.", "Lower training.learning_rate.")
        names = list(held)
        for name, following in zip(names, (*names[1:], ""), strict=True):
            prepared = held.pop(name)
            clip_(prepared.tensors(), norm, self._max_grad_norm)
            with self._store.borrow(name, trains=True, then=following) as weights:
                self._optimizer.apply(name, weights[name], prepared, step=step, factor=factor)

    def _estimate_curvature(self, portion: Portion, step: int) -> None:
        """Update curvature estimates with a gradient whose labels are sampled from the model."""
        engine, optimizer = self._engine, self._optimizer
        wants = partial(optimizer.request, step=step, observing=True)
        forward = engine.forward(portion, step=step, wants=wants, objective=SampledCrossEntropy())
        num_samples = forward.result.num_counted
        with closing(engine.backward(forward)) as layers:
            del forward
            for layer in layers:
                with engine.using(layer) as gradients:
                    for name in list(gradients):
                        optimizer.observe_curvature(name, gradients.pop(name), step=step, num_samples=num_samples)
