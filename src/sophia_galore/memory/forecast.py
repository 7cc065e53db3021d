"""Forecasts the memory that a run needs.

The memory of weights, states and bases is computed from the routes. The memory of a step is simulated for one layer of
each kind (`simulation.py`) and composed for all layers (`composition.py`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, get_args

from sophia_galore.data.batches import MicroBatch
from sophia_galore.engine.observe import Category, Phase
from sophia_galore.engine.passes import FullGradients
from sophia_galore.errors import NotPredictable, SophiaGaloreError, short
from sophia_galore.memory.composition import (
    Layout,
    PassTrace,
    add,
    all_layers,
    beyond,
    choose_layers,
    extrapolate,
    to_segments,
)
from sophia_galore.memory.simulation import ExpertCount, FewLayers, expert_counts, simulate, take_layers
from sophia_galore.memory.timeline import Segment, Sizes
from sophia_galore.memory.workload import (
    MOST_BATCHES,
    MOST_BATCHES_OF_EXPERTS,
    Workload,
    batch_bytes,
    sample,
    steps_to_simulate,
)
from sophia_galore.model.architecture import SUPPORTED
from sophia_galore.model.few_layers import layer_kinds, num_sharing
from sophia_galore.plan.decisions import Decisions, num_idle_layers, standing_bytes
from sophia_galore.plan.route import Route, by_layer


@dataclass(frozen=True)
class Forecast:
    """The memory that a run needs.

    Args:
        peak_bytes: Most bytes of tensors at once, on the device.
        phases: The same within each phase.
        categories: The peak by category.
        segments: The step with the highest peak.
        step: That step's number.
        keep_layers: Number of layers without activation checkpointing.
    """

    peak_bytes: int
    phases: Mapping[Phase, int]
    categories: Mapping[Category, int]
    segments: tuple[Segment, ...]
    step: int
    keep_layers: int


@dataclass(frozen=True)
class StepTrace:
    """The memory of one step.

    Args:
        batch_bytes: Bytes of its micro-batches.
        passes: Its passes through the simulated layers.
    """

    batch_bytes: int
    passes: tuple[PassTrace, ...]


@dataclass(frozen=True)
class ModelTrace:
    """The simulated memory of single layers, which gives the forecast for any number of layers without checkpointing.

    Args:
        standing: Bytes by category of weights and states.
        layout: Which simulated layer represents which layer.
        steps: The steps that may have the highest peak, by number.
        probe: The probe step, if it may need more.
        evaluation: Bytes by category that an evaluation takes in addition; None without one.
        num_kept: How many of the simulated layers ran without activation checkpointing.
    """

    standing: Sizes
    layout: Layout
    steps: Mapping[int, StepTrace]
    probe: StepTrace | None
    evaluation: Sizes | None
    num_kept: int = 0

    def covers(self, keep_layers: int) -> bool:
        """Return whether `forecast` knows the memory with so many layers without activation checkpointing."""
        most = min(keep_layers, self._num_active_layers)
        return self.num_kept == most if self.layout.is_whole else self.num_kept > 0 or not most

    def forecast(self, keep_layers: int = 0, standing: Mapping[Category, int] | None = None) -> Forecast:
        """Return the forecast.

        Args:
            keep_layers: Number of last layers without activation checkpointing, which the trace must cover.
            standing: Bytes by category that stay on the device for the whole run; None: all weights and states.
        """
        if standing is not None:
            return replace(self, standing=Counter(standing)).forecast(keep_layers)
        steps = {number: self._segments(trace, keep_layers) for number, trace in self.steps.items()}
        step = max(steps, key=lambda number: max(segment.peak.total() for segment in steps[number]))
        probe = self._segments(self.probe, keep_layers) if self.probe else []
        segments = [segment for each in (*steps.values(), probe) for segment in each]
        phases: Counter[Phase] = Counter(dict.fromkeys(get_args(Phase), 0))
        phases["load"] = self.standing.total()
        for segment in segments:
            phases[segment.phase] = max(phases[segment.phase], segment.peak.total())
        peak = max((segment.peak for segment in segments), key=Counter.total)
        if self.evaluation is not None:
            evaluating = add(self.standing, self.evaluation)
            phases["eval"] = evaluating.total()
            peak = max(peak, evaluating, key=Counter.total)
        return Forecast(
            peak_bytes=peak.total(),
            phases=dict(phases),
            categories={category: peak[category] for category in get_args(Category)},
            segments=tuple(steps[step]),
            step=step,
            keep_layers=min(keep_layers, self._num_active_layers),
        )

    def most_kept_layers(self, tensor_bytes: int) -> int:
        """Return how many layers can run without activation checkpointing; 0 also if nothing fits.

        Args:
            tensor_bytes: Most bytes that tensors may take.
        """
        counts = [self._num_active_layers] if self.layout.is_whole else range(self._num_active_layers, 0, -1)
        return next((count for count in counts if self.forecast(count).peak_bytes <= tensor_bytes), 0)

    @property
    def _num_active_layers(self) -> int:
        """Layers that have a backward."""
        return len(self.layout.kind_of) - self.layout.num_idle

    def _segments(self, trace: StepTrace, keep_layers: int) -> list[Segment]:
        changes = [change for each in trace.passes for change in each.compose(self.layout, keep_layers)]
        return to_segments(add(self.standing, {"other": trace.batch_bytes}), changes)


Made = TypeVar("Made")
Steps = tuple[tuple[PassTrace, ...], ...]
"""For each step, its passes."""


def trace_model(
    decided: Decisions,
    model_config: Any,
    layer_names: Sequence[str],
    workload: Workload,
    *,
    num_steps: int,
    keep_layers: int = 0,
) -> ModelTrace:
    """Simulate a run's memory, in seconds and without weights.

    Args:
        decided: The decisions about the step.
        model_config: The model's Hugging Face configuration.
        layer_names: Its layers, as prefixes of their parameters' names without the final dot.
        workload: The micro-batches of the largest step.
        num_steps: Steps of the run.
        keep_layers: Number of last layers without activation checkpointing. If layers are simulated one by one, the
            trace then covers any number of them.
    """
    of_layer, around = by_layer(decided.routes, layer_names)
    num_idle = num_idle_layers(decided, layer_names)
    kinds: list[Hashable] = [
        # A frozen layer without a backward differs from one with a backward.
        (said, index < num_idle, _kind(name, of_layer[name]))
        for index, (name, said) in enumerate(zip(layer_names, layer_kinds(model_config), strict=True))
    ]
    layout = choose_layers(kinds, num_idle)

    def take(layout: Layout, experts: ExpertCount | None = None) -> FewLayers | None:
        chosen = layout.simulated_layers(with_kept=keep_layers > 0)
        return take_layers(model_config, decided.routes, layer_names, chosen, experts)

    few = None if num_sharing(model_config) else take(layout)
    if few is None:  # layers that depend on one another, or on their numbers, are simulated all together
        layout = all_layers(len(layer_names), num_idle)
        few = take(layout)
        assert few is not None
    models = _with_few_experts(few, partial(take, layout))
    trained = [name for name in layer_names if any(route.trained for route in of_layer[name])]
    full_gradients: FullGradients = "matrix" if decided.facts.config.engine.full_gradients == "matrix" else "layer"
    last = of_layer[(trained or layer_names)[-1]]
    if not models.have_all_experts:
        last = [route for route in last if not (route.spec and route.spec.rests)]
    numbers = steps_to_simulate(around, last, num_steps, full_gradients)
    num_kept = layout.num_kept(keep_layers)

    def see(batches: Sequence[MicroBatch], numbers: Sequence[int], *, probes: bool = False) -> list[StepTrace]:
        taken = sample(batches, MOST_BATCHES if models.have_all_experts else MOST_BATCHES_OF_EXPERTS)

        def steps_of(model: FewLayers) -> Steps:
            found = simulate(model, decided, taken.more, numbers, keep_layers=num_kept, probes=probes).steps
            if not taken.fewer:
                return found
            less = simulate(model, decided, taken.fewer, numbers, keep_layers=num_kept, probes=probes).steps
            return _beyond(less, found, taken.factor)

        found = models.join([steps_of(model) for model in models.models], _beyond)
        return [StepTrace(batch_bytes(batches), passes) for passes in found]

    def see_evaluation(batches: Sequence[MicroBatch]) -> Sizes:
        found = (simulate(each, decided, (), (), eval_batches=batches).evaluation for each in models.models)
        return models.join([each for each in found if each is not None], beyond)

    return ModelTrace(
        standing=Counter(standing_bytes(decided.routes)),
        layout=layout,
        steps=dict(zip(numbers, see(workload.train, numbers), strict=True)),
        probe=see(workload.probe, [1], probes=True)[0] if workload.probe else None,
        evaluation=see_evaluation(workload.eval) if workload.eval else None,
        num_kept=num_kept,
    )


@dataclass(frozen=True)
class _Models:
    """What is simulated: a model; or one with fewer experts and one with more, from which all are extrapolated.

    Args:
        models: The models.
        factor: How far to go beyond the second one.
    """

    models: tuple[FewLayers, ...]
    factor: float = 0.0

    @property
    def have_all_experts(self) -> bool:
        """Whether nothing is extrapolated."""
        return len(self.models) == 1

    def join(self, found: Sequence[Made], extrapolated: Callable[[Made, Made, float], Made]) -> Made:
        """Return what holds for all experts.

        Args:
            found: What was found for each of the models.
            extrapolated: Goes beyond two of them.
        """
        return found[0] if self.have_all_experts else extrapolated(found[0], found[1], self.factor)


def _with_few_experts(whole: FewLayers, take: Callable[[ExpertCount], FewLayers | None]) -> _Models:
    counts = expert_counts(whole.architecture)
    if counts is None:
        return _Models((whole,))
    fewer, more = counts
    models = [model for model in map(take, counts) if model is not None]
    if len(models) < 2:  # more depends on their number than the router
        return _Models((whole,))
    return _Models(tuple(models), (more.whole - more.taken) / (more.taken - fewer.taken))


def _beyond(fewer: Steps, more: Steps, factor: float) -> Steps:
    return tuple(
        tuple(extrapolate(a, b, factor) for a, b in zip(one, other, strict=True))
        for one, other in zip(fewer, more, strict=True)
    )


@contextmanager
def naming_unpredictable(model_type: str) -> Iterator[None]:
    """Raise `NotPredictable` for errors inside the context, unless the tests cover the model's architecture.

    Args:
        model_type: The model's architecture.
    """
    # It would print the traceback of what is said below in a sentence.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, log.disabled = log.disabled, True
    try:
        yield
    except SophiaGaloreError:
        raise
    except Exception as error:  # whatever a model's code says
        if model_type in SUPPORTED:
            raise  # a fault of ours
        raise NotPredictable(
            f"The memory of this {model_type} model can't be predicted: its code does not run on tensors "
            f"without values ({short(error)}).",
            "Use memory.predict=false: the probe step shows whether a run fits.",
        ) from error
    finally:
        log.disabled = was_disabled


def _kind(layer: str, routes: Sequence[Route]) -> Hashable:
    """Return what determines a layer's memory; names and the times of basis refreshes don't."""
    return tuple((route.name.removeprefix(layer), route.shape, route.format, _untimed(route)) for route in routes)


def _untimed(route: Route) -> Hashable:
    spec = route.spec
    if spec is None:
        return None
    return replace(spec, name="", subspace=replace(spec.subspace, offset=0) if spec.subspace else None)
