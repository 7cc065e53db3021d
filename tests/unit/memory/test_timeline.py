"""Memory over one step, as it is measured and as it is predicted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from sophia_galore.engine.observe import Phase
from sophia_galore.memory.timeline import Recorder, Segment, StepTimeline, points_of
from sophia_galore.memory.tracker import StorageTracker

CPU = torch.device("cpu")


def one_step(tracker: StorageTracker, timeline: StepTimeline, num_floats: int, step: int) -> None:
    phases: tuple[Phase, ...] = ("forward", "backward")
    for phase in phases:
        tracker.reset_peak()
        with timeline.segment(phase):
            assert torch.zeros(num_floats).numel() == num_floats
    timeline.end_step(step)


def test_of_several_steps_that_of_the_highest_peak_is_kept() -> None:
    with StorageTracker(CPU) as tracker:
        timeline = StepTimeline(tracker)
        assert timeline.highest is None
        for step, size in enumerate((100, 300, 200), 1):
            one_step(tracker, timeline, size, step)
    assert timeline.highest is not None and timeline.highest["step"] == 2
    points = timeline.highest["points"]
    assert [point["phase"] for point in points] == ["forward"] * 3 + ["backward"] * 3
    assert [sum(point["categories"].values()) for point in points] == [0, 1200, 0] * 2
    times = [point["time_s"] for point in points]
    assert times[0] == 0 and times == sorted(times)


def test_what_is_forgotten_belongs_to_no_step() -> None:
    with StorageTracker(CPU) as tracker:
        timeline = StepTimeline(tracker)
        tracker.reset_peak()
        with timeline.segment("forward"):
            assert torch.zeros(1000).numel() == 1000
        timeline.forget()
        timeline.end_step(1)
        assert timeline.highest is None, "no phase, no step"
        one_step(tracker, timeline, 10, 2)
    assert timeline.highest is not None and timeline.highest["step"] == 2 and len(timeline.highest["points"]) == 6


def test_a_recorder_cuts_where_a_phase_begins() -> None:
    tracker = StorageTracker(CPU)
    recorder = Recorder(tracker)
    with tracker:
        kept = torch.zeros(10)
        with recorder.phase("forward"):
            made = torch.zeros(5)
        between = torch.zeros(7)
        with recorder.phase("backward"):
            recorder.tag(made, "gradients")
            del between
        segments = recorder.take()
        assert recorder.take() == [] and kept.numel() == 10
    forward, backward = segments
    assert (forward.phase, backward.phase) == ("forward", "backward")
    assert forward.entry == Counter(other=40) and forward.exit == Counter(other=40 + 28, activations=20)
    assert forward.peak == forward.exit == backward.entry, "what is made after a phase still belongs to it"
    assert backward.exit == Counter(other=40, gradients=20)
    assert backward.peak == Counter(other=68, gradients=20)


def test_of_parts_the_first_two_are_enough() -> None:
    recorder = Recorder(StorageTracker(CPU))
    parts = [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert recorder.parts(parts) == parts[:2] and recorder.parts(parts[:1]) == parts[:1]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_points_of_segments_whose_time_is_not_known(count: int) -> None:
    segment = Segment("head", Counter(weights=4, logits=0), Counter(weights=4, logits=8), Counter(weights=4, other=-1))
    points: list[dict[str, Any]] = points_of([segment] * count)
    assert points == count * [
        {"phase": "head", "categories": {"weights": 4}},
        {"phase": "head", "categories": {"weights": 4, "logits": 8}},
        {"phase": "head", "categories": {"weights": 4}},
    ]
