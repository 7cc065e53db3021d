"""How much memory a run will need, known before it begins.

What stays (weights, states, bases) is arithmetic over the routes. What comes and goes in a step is seen by running the
engine itself without memory (`simulate.py`) on one layer of each kind, and put together for all layers (`course.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch

from sophia_galore.data.batches import MicroBatch
from sophia_galore.engine.cross_entropy import default_chunk_bytes
from sophia_galore.engine.observe import Category, Phase
from sophia_galore.memory.composition import Layout, PassTrace, extrapolate, follow, lay_out, plus
from sophia_galore.memory.simulation import Settings, simulate, take_layers
from sophia_galore.memory.timeline import Segment, Sizes
from sophia_galore.memory.workload import Load, sample
from sophia_galore.plan.decisions import Decisions, num_idle_layers, standing_bytes
from sophia_galore.plan.facts import Facts
from sophia_galore.plan.route import Route

_MOST_STEPS = 4096
"""So many steps are looked at for the one that needs most."""


@dataclass(frozen=True)
class Forecast:
    """What a run will need.

    Args:
        peak_bytes: Most bytes of tensors at once, on the device.
        phases: The same within each phase.
        categories: What the peak consists of.
        course: The course of the step that needs most.
        step: That step's number.
        keep_layers: So many layers keep their graphs.
    """

    peak_bytes: int
    phases: Mapping[Phase, int]
    categories: Mapping[Category, int]
    course: tuple[Segment, ...]
    step: int
    keep_layers: int


@dataclass(frozen=True)
class StepTrace:
    """What one step does.

    Args:
        batches: Bytes by category of its micro-batches.
        passes: Its passes through the model.
    """

    batches: Sizes
    passes: tuple[PassTrace, ...]


@dataclass(frozen=True)
class Estimate:
    """What single layers were seen to do, from which the forecast for any number of kept layers follows.

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

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.layout.kind_of)

    @property
    def num_active_layers(self) -> int:
        """Those of them that are gone back through: the others have no use for a graph."""
        return self.num_layers - self.layout.num_idle

    def forecast(self, keep_layers: int = 0) -> Forecast:
        """The forecast.

        Args:
            keep_layers: So many of the last layers keep their graphs; above 0 only where that was simulated.
        """
        courses = {number: self._course(trace, keep_layers) for number, trace in self.steps.items()}
        step = max(courses, key=lambda number: max(map(_peak_bytes, courses[number])))
        followed = [*courses.values(), *([self._course(self.probe, keep_layers)] if self.probe else [])]
        segments = [segment for course in followed for segment in course]
        phases: Counter[Phase] = Counter(dict.fromkeys(get_args(Phase), 0))
        phases["load"] = self.standing.total()
        for segment in segments:
            phases[segment.phase] = max(phases[segment.phase], _peak_bytes(segment))
        highest = max(segments, key=_peak_bytes)
        top, categories = _peak_bytes(highest), highest.peak
        if self.evaluation is not None:
            evaluating = plus(self.standing, self.evaluation)
            phases["eval"] = evaluating.total()
            if evaluating.total() > top:
                top, categories = evaluating.total(), evaluating
        return Forecast(
            peak_bytes=top,
            phases=dict(phases),
            categories={category: categories[category] for category in get_args(Category)},
            course=tuple(courses[step]),
            step=step,
            keep_layers=min(keep_layers, self.num_active_layers),
        )

    def _course(self, trace: StepTrace, keep_layers: int) -> list[Segment]:
        changes = [change for each in trace.passes for change in each.changes(self.layout, keep_layers)]
        return follow(plus(self.standing, trace.batches), changes)

    def most_kept_layers(self, tensor_bytes: int) -> int:
        """How many layers can keep their graphs within some bytes; 0 also where even none is too much.

        Args:
            tensor_bytes: Most bytes that tensors may take.
        """
        most = self.num_active_layers
        fitting = (count for count in range(most, 0, -1) if self.forecast(count).peak_bytes <= tensor_bytes)
        return next(fitting, 0)


def estimate(
    decided: Decisions,
    model_config: Any,
    layer_names: Sequence[str],
    load: Load,
    *,
    num_steps: int,
    keeps: bool = False,
) -> Estimate:
    """Find out what a run will need, in seconds, without a weight.

    Args:
        decided: What will be done in a step.
        model_config: The model's Hugging Face configuration.
        layer_names: Its layers, as prefixes of their parameters' names without the final dot.
        load: What a step works on.
        num_steps: Steps of the run.
        keeps: Whether layers are to be seen that keep their graphs as well.
    """
    of_layer = {name: [route for route in decided.routes if route.name.startswith(f"{name}.")] for name in layer_names}
    types = getattr(model_config, "layer_types", None) or [""] * len(layer_names)
    num_idle = num_idle_layers(decided, layer_names)
    layout = lay_out(
        # A layer that is frozen and is gone back through does something else than one that is not.
        [(types[index], index < num_idle, _kind(name, of_layer[name])) for index, name in enumerate(layer_names)],
        num_idle,
    )
    few = take_layers(model_config, decided.routes, layer_names, layout.run(keeps=keeps))
    inside = {route.name for routes in of_layer.values() for route in routes}
    around = [route for route in decided.routes if route.name not in inside]
    last = next((name for name in reversed(layer_names) if any(r.trained for r in of_layer[name])), layer_names[-1])
    steps = steps_to_see(around, of_layer[last], num_steps)
    settings, num_kept = settings_of(decided), layout.num_kept if keeps else 0

    def see(batches: Sequence[MicroBatch], numbers: Sequence[int], *, probes: bool = False) -> list[StepTrace]:
        taken = sample(batches)
        more = simulate(few, settings, taken.more, numbers, keep_layers=num_kept, probes=probes)
        if not taken.fewer:
            return [StepTrace(more.batches, passes) for passes in more.steps]
        less = simulate(few, settings, taken.fewer, numbers, keep_layers=num_kept, probes=probes)
        of_all: Sizes = Counter({"other": sum(_bytes_of(batch) for batch in batches)})
        return [
            StepTrace(of_all, tuple(extrapolate(a, b, taken.factor) for a, b in zip(one, other, strict=True)))
            for one, other in zip(less.steps, more.steps, strict=True)
        ]

    evaluated = simulate(few, settings, (), (), eval_batches=load.eval) if load.eval else None
    return Estimate(
        standing=Counter(standing_bytes(decided.routes)),
        layout=layout,
        steps=dict(zip(steps, see(load.train, steps), strict=True)),
        probe=see(load.probe, [1], probes=True)[0] if load.probe else None,
        evaluation=evaluated.evaluation if evaluated else None,
    )


def _peak_bytes(segment: Segment) -> int:
    return segment.peak.total()


def settings_of(decided: Decisions) -> Settings:
    """What a step depends on beside the model and the batches."""
    facts = decided.facts
    return Settings(
        facts.config,
        decided.compute_dtype,
        logits_chunk_bytes(facts),
        decided.clip_by,
        decided.curvature_every,
    )


def logits_chunk_bytes(facts: Facts) -> int:
    """Bytes of float32 logits that are worked on at once: as asked, or as suits the device."""
    asked = facts.config.memory.logits_chunk_mib * 2**20
    return asked or default_chunk_bytes(torch.device(facts.device.place))


def steps_to_see(around: Sequence[Route], last: Sequence[Route], num_steps: int) -> list[int]:
    """Numbers of the steps, one of which needs most.

    At the first step every basis is made, for which gradients are formed. After it products take their place, and
    that of a tied head waits from the head's turn to the embedding's: most is then needed by a step that makes no
    basis for the head, and some in the last layer, whose turn comes next.

    Args:
        around: Routes of what is in no layer.
        last: Routes of the last layer, or of the last one that is trained.
        num_steps: Steps of the run.
    """
    fast = [route for route in around if _is_fast(route)]
    steps = [1]
    horizon = min(num_steps, _horizon([*around, *last]))
    if any(_is_fast(route) for route in (*around, *last)):
        waiting = [step for step in range(2, horizon + 1) if not any(_refreshes(route, step) for route in fast)]
        if waiting:
            steps.append(max(waiting, key=lambda step: sum(_formed(route, step) for route in last)))
    # A basis that is drawn needs no gradient, but from the second time on moments move into it.
    drawn = [route for route in around if route.spec and route.spec.subspace and route.spec.subspace.kind == "random"]
    again = [step for step in range(2, horizon + 1) if any(_refreshes(route, step) for route in drawn)]
    return sorted({*steps, *again[:1]})


def _kind(layer: str, routes: Sequence[Route]) -> Hashable:
    """What tells a layer from others as far as memory goes: not names, nor when bases are made anew."""
    return tuple((route.name.removeprefix(layer), route.shape, route.format, _without_when(route)) for route in routes)


def _without_when(route: Route) -> Hashable:
    spec = route.spec
    if spec is None:
        return None
    return replace(spec, name="", subspace=replace(spec.subspace, offset=0) if spec.subspace else None)


def _is_fast(route: Route) -> bool:
    return bool(route.spec and route.spec.subspace and route.spec.subspace.fast)


def _refreshes(route: Route, step: int) -> bool:
    return bool(route.spec and route.spec.subspace and route.spec.subspace.refreshes_at(step))


def _formed(route: Route, step: int) -> int:
    """Bytes of a parameter's gradient, if it is formed at a step."""
    formed = not _is_fast(route) or _refreshes(route, step)
    return 4 * route.num_elements if route.trained and formed else 0


def _horizon(routes: Sequence[Route]) -> int:
    """Steps after which refreshes come round again, or that are enough to have seen those of the first octaves."""
    gaps = (2 * route.spec.subspace.gap for route in routes if route.spec and route.spec.subspace)
    return min(_MOST_STEPS, max(gaps, default=1))


def _bytes_of(batch: Any) -> int:
    tensors = (batch.input_ids, batch.labels, batch.attention_mask)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
