"""The micro-batches that memory is planned for, and the steps that are looked at."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planning import asked, tiny_planner
from sophia_galore.data.batches import MicroBatch
from sophia_galore.memory.workload import full_batches, largest_workload, sample, steps_to_simulate
from sophia_galore.plan.route import Route


def test_full_batches_hold_as_much_as_can_be() -> None:
    batches = full_batches(2, 3, 10, 50)
    assert [batch.input_ids.shape for batch in batches] == [(2, 10)] * 3
    assert all(batch.attention_mask is None for batch in batches)
    for batch in batches:
        assert batch.num_tokens == 20 and batch.num_counted == 18 == int((batch.labels != -100).sum())
        assert (batch.labels[:, :-1] == batch.input_ids[:, 1:]).all()
    words = {int(token) for batch in batches for token in batch.input_ids.flatten()}
    assert words == set(range(50)), "as few as can be are alike"


@pytest.mark.parametrize(
    ("values", "evaluates"),
    [({}, True), ({"data.eval_fraction": 0.0}, False), ({"data.eval_fraction": 0.0, "data.eval": "x.json"}, True)],
)
def test_the_worst_that_can_be_asked_for(values: dict[str, Any], evaluates: bool) -> None:
    workload = largest_workload(asked({"training.batch_size": 3, **values}), 320)
    assert workload.source == "examples of training.max_length: 2 x 3 x 16 tokens"
    assert len(workload.train) == 2 and (workload.eval == workload.train) == evaluates == bool(workload.eval)


def batches_of(lengths: list[int]) -> list[MicroBatch]:
    return [
        replace(batch, num_counted=counted)
        for length in lengths
        for batch in full_batches(1, 1, length, 320)
        for counted in [batch.num_counted]
    ]


def test_few_micro_batches_are_run_as_they_are() -> None:
    batches = batches_of([9, 8, 7, 6, 5, 4, 3, 2])
    taken = sample(batches)
    assert taken.fewer == () and list(taken.more) == batches and taken.factor == 0


@pytest.mark.parametrize("lengths", [[20] * 9, [60, 30, 29, 28, 20, 12, 11, 10, 9, 8, 7], list(range(100, 10, -1))])
def test_of_many_the_sums_of_tokens_are_right(lengths: list[int]) -> None:
    batches = batches_of(lengths)
    taken = sample(batches)
    assert len(taken.fewer) == 4 and len(taken.more) == 8
    assert taken.fewer[0] is batches[0] and taken.more[0] is batches[0], "the largest one is there itself"

    def beyond(count: Any) -> float:
        few, more = (sum(count(batch) for batch in part) for part in (taken.fewer, taken.more))
        return more + taken.factor * (more - few)

    assert beyond(lambda batch: batch.input_ids.numel()) == pytest.approx(sum(lengths))
    # The counted ones of one micro-batch are a whole number; here of half of one at most, times all.
    counted = sum(batch.num_counted for batch in batches)
    assert beyond(lambda batch: batch.num_counted) == pytest.approx(counted, abs=len(lengths) / 2)
    for batch in taken.more:
        assert batch.num_counted == int((batch.labels != -100).sum())


def test_padding_counts_for_nothing() -> None:
    (batch,) = full_batches(2, 1, 12, 320)
    mask = batch.input_ids.new_ones(2, 12)
    mask[1, 4:] = 0
    padded = replace(batch, attention_mask=mask, num_counted=10)
    last = sample([*batches_of([40]), *[padded] * 9]).more[-1]
    assert last.num_counted == 10 and bool((mask[last.labels != -100] == 1).all())


# ---- which steps


def routes_of(values: dict[str, Any] | None = None, *, tied: bool = True) -> tuple[list[Route], list[Route]]:
    planner = tiny_planner(tied=tied)
    routes = planner.decide(asked(values)).routes
    last = [route for route in routes if route.name.startswith(planner.layer_names[-1])]
    return [route for route in routes if ".layers." not in route.name], last


FAST = {"optimizer.galore.fast_path": "always"}
SLOW = {"optimizer.galore.fast_path": "never"}


@pytest.mark.parametrize(
    ("values", "num_steps", "expected"),
    [
        ({"optimizer.type": "adamw"}, 100, [1]),
        (SLOW, 100, [1]),
        (FAST, 1, [1]),
        ({**FAST, "optimizer.galore.stagger": False}, 100, [1, 3]),  # made anew at 1, 2 and 4
        ({**SLOW, "optimizer.galore.subspace": "random", "optimizer.galore.stagger": False}, 100, [1, 4]),
        ({**SLOW, "optimizer.galore.subspace": "random", "optimizer.galore.stagger": False}, 3, [1]),
    ],
)
def test_the_steps_that_are_looked_at(values: dict[str, Any], num_steps: int, expected: list[int]) -> None:
    assert steps_to_simulate(*routes_of(values), num_steps) == expected


def test_a_step_that_forms_gradients_of_the_last_layer_but_none_of_the_head() -> None:
    around, last = routes_of({**FAST, "optimizer.galore.update_proj_gap": 20})
    first, waiting = steps_to_simulate(around, last, 1000)
    assert first == 1 and 1 < waiting <= 40
    refreshed = [
        route for route in last if route.spec and route.spec.subspace and route.spec.subspace.refreshes_at(waiting)
    ]
    assert refreshed, "staggered, some matrix has its turn"
    head = [route.spec.subspace for route in around if route.spec and route.spec.subspace]
    assert head and not any(subspace.refreshes_at(waiting) for subspace in head)
    assert steps_to_simulate(around, last, waiting - 1)[-1] < waiting, "never one that the run does not have"
