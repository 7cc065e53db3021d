"""A model composed from few layers is that of all of them run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from planning import asked, tiny_planner
from sophia_galore.memory.composition import (
    Change,
    Layout,
    PassTrace,
    add,
    choose_layers,
    extrapolate,
    split_passes,
    subtract,
    to_segments,
)
from sophia_galore.memory.forecast import trace_model
from sophia_galore.memory.simulation import simulate, take_layers
from sophia_galore.memory.timeline import Segment
from sophia_galore.memory.workload import batch_bytes

NUM_LAYERS = 4
# Family, settings, and how many layers run without checkpointing; the attention of Gemma 3 is of two kinds in turn.
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "llama": ("llama", {}, (1, 3)),
    "qwen2 in fp16": ("qwen2", {"training.compute_dtype": "fp16", "optimizer.type": "adamw"}, (0,)),
    "gemma3 in int8": ("gemma3", {"quantization.enabled": True, "training.max_length": 24}, (0,)),
    "gemma3": ("gemma3", {}, (2, 4)),
    "two passes": ("llama", {"optimizer.type": "sophia"}, (0,)),
    "clipped by the model": ("gemma3", {"training.max_grad_norm": 1.0}, (1,)),
}


@pytest.mark.parametrize("name", CASES)
def test_composed_from_few_layers_it_is_that_of_all(name: str) -> None:
    family, values, counts = CASES[name]
    config = asked({"optimizer.galore.stagger": False, **values})
    planner = tiny_planner(family, tied=family != "qwen2", num_layers=NUM_LAYERS, num_steps=1)
    decided, workload = planner.decide(config), planner.workload(config)
    given = (decided, planner.model_config, planner.layer_names, workload)
    found = trace_model(*given, num_steps=1, keep_layers=max(counts))
    whole = take_layers(planner.model_config, decided.routes, planner.layer_names, range(NUM_LAYERS))
    for keep_layers in counts:
        seen = simulate(whole, decided, workload.train, (1,), keep_layers=keep_layers)
        changes = [change for passed in seen.steps[0] for change in passed.changes]
        real = to_segments(add(found.standing, {"other": batch_bytes(workload.train)}), changes)
        composed = found.forecast(keep_layers).segments
        assert max(segment.peak.total() for segment in composed) == max(segment.peak.total() for segment in real)
        assert_same(composed, real)


def assert_same(composed: Sequence[Segment], real: Sequence[Segment]) -> None:
    """To the byte; but of the first layer without checkpointing the peak may be somewhat less than was taken for it."""
    assert [segment.phase for segment in composed] == [segment.phase for segment in real]
    not_exact = 0
    for number, (one, other) in enumerate(zip(composed, real, strict=True)):
        assert (one.entry, one.exit) == (other.entry, other.exit), f"segment {number}, {one.phase}"
        if one.peak != other.peak:
            not_exact += 1
            assert 1 < one.peak.total() / other.peak.total() < 1.01
    assert not_exact <= 1


def test_the_last_layer_of_each_kind_stands_for_it() -> None:
    layout = choose_layers(["a", "b", "a", "a", "b"])
    assert layout == Layout(chosen=(3, 4), kind_of=(0, 1, 0, 0, 1))
    assert layout.simulated_layers(with_kept=False) == (0, 3, 4)
    assert layout.simulated_layers(with_kept=True) == (0, 3, 4, 4, 3, 4)
    assert layout.num_kept(0) == 0 and layout.num_kept(1) == layout.num_kept(5) == 3


@pytest.mark.parametrize(
    ("keep_layers", "stand_ins"),
    [
        (0, [0, 2, 1, 1, 2]),
        (1, [0, 2, 1, 1, 5]),
        (3, [0, 2, 4, 4, 5]),
        (5, [4, 5, 4, 4, 5]),
        (9, [4, 5, 4, 4, 5]),
    ],
)
def test_which_layer_stands_where(keep_layers: int, stand_ins: list[int]) -> None:
    assert Layout(chosen=(3, 4), kind_of=(0, 1, 0, 0, 1)).representatives(keep_layers) == stand_ins


def trace(size: int) -> PassTrace:
    def change(phase: Any, factor: int) -> Change:
        return Change(phase, Counter(activations=factor * size, other=7), Counter(activations=size))

    phases = ("forward", "forward", "head", "step", "backward", "step", "backward", "head", "step")
    return PassTrace(tuple(change(phase, factor) for factor, phase in enumerate(phases, 1)))


def test_a_pass_knows_its_layers() -> None:
    passed = trace(1)
    assert passed.num_layers == 1 and passed.forward(0) is passed.changes[1]
    assert passed.backward(0) == passed.changes[4:6]


@pytest.mark.parametrize(("factor", "expected"), [(0.0, 20), (1.0, 30), (2.5, 45)])
def test_more_is_on_a_line_through_two(factor: float, expected: int) -> None:
    assert extrapolate(trace(10), trace(20), factor) == trace(expected)


def test_following_changes_adds_them_up() -> None:
    changes = [
        Change("forward", Counter(activations=5), Counter(activations=3)),
        Change("backward", Counter(activations=1, gradients=4), Counter(activations=-3)),
    ]
    assert to_segments({"weights": 10}, changes) == [
        Segment("forward", Counter(weights=10), Counter(weights=10, activations=5), Counter(weights=10, activations=3)),
        Segment(
            "backward",
            Counter(weights=10, activations=3),
            Counter(weights=10, activations=4, gradients=4),
            Counter(weights=10),
        ),
    ]
    assert subtract({"a": 1}, {"a": 3, "b": 1}) == {"a": -2, "b": -1}


def test_another_order_of_phases_is_refused() -> None:
    empty: Counter[str] = Counter()
    with pytest.raises(AssertionError, match="not in the expected order"):
        split_passes([Segment("forward", empty, empty, empty)], 2)
