"""How much memory a run will need, known before it begins.

What stays (weights, states, bases) is arithmetic over the routes. What comes and goes in a step is seen by simulating
one layer of each kind (`simulation.py`), and composed for all layers (`composition.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from sophia_galore.data.batches import MicroBatch
from sophia_galore.engine.observe import Category, Phase
from sophia_galore.memory.composition import Layout, PassTrace, extrapolate, follow, lay_out, plus
from sophia_galore.memory.simulation import by_layer, simulate, take_layers
from sophia_galore.memory.timeline import Segment, Sizes
from sophia_galore.memory.workload import Workload, batch_bytes, sample, steps_to_simulate
from sophia_galore.plan.decisions import Decisions, num_idle_layers, standing_bytes
from sophia_galore.plan.route import Route


@dataclass(frozen=True)
class Forecast:
    """What a run will need.

    Args:
        peak_bytes: Most bytes of tensors at once, on the device.
        phases: The same within each phase.
        categories: What the peak consists of.
        segments: The step that needs most.
        step: That step's number.
        keep_layers: So many layers run without activation checkpointing.
    """

    peak_bytes: int
    phases: Mapping[Phase, int]
    categories: Mapping[Category, int]
    segments: tuple[Segment, ...]
    step: int
    keep_layers: int


@dataclass(frozen=True)
class StepTrace:
    """What one step does.

    Args:
        batch_bytes: Bytes of its micro-batches.
        passes: Its passes through the model, of the layers that were run.
    """

    batch_bytes: int
    passes: tuple[PassTrace, ...]


@dataclass(frozen=True)
class ModelTrace:
    """What single layers were seen to do: the forecast follows for any number of layers without checkpointing.

    Args:
        standing: Bytes by category that stay for the whole run.
        layout: Which layers stand for which.
        steps: Each step that may be the one with the peak, by its number.
        probe: The probe step, where it may need more than they do.
        evaluation: Bytes by category that an evaluation takes beside what stands; None: there is none.
    """

    standing: Sizes
    layout: Layout
    steps: Mapping[int, StepTrace]
    probe: StepTrace | None
    evaluation: Sizes | None

    def forecast(self, keep_layers: int = 0) -> Forecast:
        """The forecast.

        Args:
            keep_layers: So many of the last layers run without activation checkpointing; above 0 only where such
                layers were simulated.
        """
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
            evaluating = plus(self.standing, self.evaluation)
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
        """How many layers can do without activation checkpointing; 0 also where even none is too much.

        Args:
            tensor_bytes: Most bytes that tensors may take.
        """
        counts = range(self._num_active_layers, 0, -1)
        return next((count for count in counts if self.forecast(count).peak_bytes <= tensor_bytes), 0)

    @property
    def _num_active_layers(self) -> int:
        """Layers that have a backward."""
        return len(self.layout.kind_of) - self.layout.num_idle

    def _segments(self, trace: StepTrace, keep_layers: int) -> list[Segment]:
        changes = [change for each in trace.passes for change in each.compose(self.layout, keep_layers)]
        return follow(plus(self.standing, {"other": trace.batch_bytes}), changes)


def trace_model(
    decided: Decisions,
    model_config: Any,
    layer_names: Sequence[str],
    workload: Workload,
    *,
    num_steps: int,
    with_kept: bool = False,
) -> ModelTrace:
    """Find out what a run will need, in seconds, without a weight.

    Args:
        decided: What will be done in a step.
        model_config: The model's Hugging Face configuration.
        layer_names: Its layers, as prefixes of their parameters' names without the final dot.
        workload: What a step works on.
        num_steps: Steps of the run.
        with_kept: Whether to simulate layers without activation checkpointing too.
    """
    of_layer, around = by_layer(decided.routes, layer_names)
    types = getattr(model_config, "layer_types", None) or [""] * len(layer_names)
    num_idle = num_idle_layers(decided, layer_names)
    layout = lay_out(
        # A frozen layer without a backward does something else than one with a backward.
        [(types[index], index < num_idle, _kind(name, of_layer[name])) for index, name in enumerate(layer_names)],
        num_idle,
    )
    few = take_layers(model_config, decided.routes, layer_names, layout.run(with_kept=with_kept))
    trained = [name for name in layer_names if any(route.trained for route in of_layer[name])]
    numbers = steps_to_simulate(around, of_layer[(trained or layer_names)[-1]], num_steps)
    num_kept = layout.num_kept if with_kept else 0

    def see(batches: Sequence[MicroBatch], numbers: Sequence[int], *, probes: bool = False) -> list[StepTrace]:
        taken = sample(batches)
        found = simulate(few, decided, taken.more, numbers, keep_layers=num_kept, probes=probes).steps
        if taken.fewer:
            less = simulate(few, decided, taken.fewer, numbers, keep_layers=num_kept, probes=probes).steps
            found = tuple(
                tuple(extrapolate(a, b, taken.factor) for a, b in zip(one, other, strict=True))
                for one, other in zip(less, found, strict=True)
            )
        return [StepTrace(batch_bytes(batches), passes) for passes in found]

    return ModelTrace(
        standing=Counter(standing_bytes(decided.routes)),
        layout=layout,
        steps=dict(zip(numbers, see(workload.train, numbers), strict=True)),
        probe=see(workload.probe, [1], probes=True)[0] if workload.probe else None,
        evaluation=simulate(few, decided, (), (), eval_batches=workload.eval).evaluation if workload.eval else None,
    )


def _kind(layer: str, routes: Sequence[Route]) -> Hashable:
    """What decides about a layer's memory: not names, nor when bases are refreshed."""
    return tuple((route.name.removeprefix(layer), route.shape, route.format, _untimed(route)) for route in routes)


def _untimed(route: Route) -> Hashable:
    spec = route.spec
    if spec is None:
        return None
    return replace(spec, name="", subspace=replace(spec.subspace, offset=0) if spec.subspace else None)
