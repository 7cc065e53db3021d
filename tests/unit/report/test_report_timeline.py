"""The picture of one step: read strictly, stacked without losing a byte, labels that never cross."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sophia_galore.errors import EnvironmentProblem
from sophia_galore.records.memory import MemoryReport, Moment, Timeline
from sophia_galore.records.metrics import Metrics
from sophia_galore.report.draw_memory import draw_memory
from sophia_galore.report.draw_timeline import MOST_MOMENTS, downsample, stack, timeline_figure
from sophia_galore.report.plots import plot_memory, plot_timeline
from sophia_galore.report.style import CATEGORY_COLOURS, stack_order, styled
from sophia_galore.report.timeline_labels import Span, merge_alternating, spans, spread

MIB = 2**20


def step(num_layers: int = 3, *, timed: bool = True, unit: int = MIB, times: int = 1) -> dict[str, Any]:
    """A step as the engine makes it: layers forward, the head, layers backward with their steps."""
    points: list[dict[str, Any]] = []

    def point(phase: str, **live: int) -> None:
        categories = {"weights": 500, "optimizer state": 120} | live
        points.append({"phase": phase, "categories": {name: size * unit for name, size in categories.items()}})
        if timed:
            points[-1]["time_s"] = len(points) // 2 * 0.1

    for _ in range(times):
        for layer in range(num_layers):
            point("forward", activations=layer)
            point("forward", activations=layer + 5)
        point("head", activations=num_layers, logits=30)
        for layer in reversed(range(num_layers)):
            point("backward", activations=layer, gradients=7)
            point("step", activations=layer, gradients=7, other=2)
    return {"step": 2, "points": points}


TIMELINES: dict[str, dict[str, Any]] = {
    "a step": step(),
    "planned": step(timed=False),
    "no number": {"points": step()["points"]},
    "kilobytes": step(unit=1000),
    "bytes": step(unit=1),
    "one point": {"points": step()["points"][:1]},
    "one instant": {"points": [point | {"time_s": 1.0} for point in step()["points"]]},
    "one category": {"points": [{"phase": "forward", "categories": {"weights": 5 * MIB}}] * 3},
    "unknown names": {"points": [{"phase": "dream", "categories": {"optimizer_state": 5, "sand": MIB}}] * 3},
    "no phases": {"points": [{"categories": {"weights": MIB}}, {"phase": None, "categories": {"weights": 2 * MIB}}]},
    "a clock that jitters": {"points": [point | {"time_s": index % 2} for index, point in enumerate(step()["points"])]},
    "many moments": step(800),
    "many passes": step(2, times=30),
}

BOUNDS: dict[str, tuple[int | None, int | None]] = {
    "none": (None, None),
    "near": (700 * MIB, 660 * MIB),
    "exceeded": (300 * MIB, 10 * MIB),
    "far": (80_000 * MIB, 9_000 * MIB),
}


def draw(timeline: dict[str, Any], limit: int | None = None, predicted: int | None = None) -> Any:
    found = Timeline.of(timeline, "here")
    with styled():
        figure = timeline_figure(found, title="A plan", limit_bytes=limit, predicted_peak_bytes=predicted)
        figure.canvas.draw()
    return figure


def shown(figure: Any) -> list[Any]:
    from matplotlib.text import Text

    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


def texts(figure: Any) -> str:
    return "\n".join(text.get_text() for text in shown(figure))


def test_without_a_timeline_the_memory_figure_is_as_before(tmp_path: Path) -> None:
    old: dict[str, Any] = {"peak_allocated_bytes": 653 * MIB, "categories": {"weights": 500 * MIB}}
    sizes, pictures = [], []
    for record in (old, old | {"limit_bytes": MIB, "timeline": {"points": []}}, old | {"timeline": step()}):
        (tmp_path / "memory_report.json").write_text(json.dumps(record))
        sizes.append(draw_memory(MemoryReport.read(tmp_path / "memory_report.json"), Metrics()).get_size_inches()[1])
        pictures.append(plot_memory(tmp_path).read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    assert sizes[0] == sizes[1] < sizes[2]


def test_the_step_is_part_of_the_memory_figure(tmp_path: Path) -> None:
    record = {"limit_bytes": 700 * MIB, "predicted_peak_bytes": 640 * MIB, "timeline": step()}
    (tmp_path / "memory_report.json").write_text(json.dumps(record))
    said = texts(draw_memory(MemoryReport.read(tmp_path / "memory_report.json"), Metrics()))
    for words in (
        "Memory within step 2, MiB",
        "limit\n700 MiB",
        "predicted peak\n640 MiB",
        "peak of this step\n653 MiB",
        "forward",
        "head",
        "backward and step",
        "seconds since the step began",
    ):
        assert words in said


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("name", TIMELINES)
def test_no_label_of_any_timeline_crosses_another_or_the_edge(name: str, bounds: str) -> None:
    figure = draw(TIMELINES[name], *BOUNDS[bounds])
    width, height = figure.get_size_inches() * figure.dpi
    ticks = {text for axes in figure.axes for text in (*axes.get_xticklabels(), *axes.get_yticklabels())}
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown(figure) if text not in ticks]
    for index, (text, box) in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
        for other, beside in boxes[:index]:
            assert not box.overlaps(beside), (text, other)


def test_a_planned_step_has_an_order_and_no_seconds(tmp_path: Path) -> None:
    figure = draw(step(timed=False), 600 * MIB, 653 * MIB)
    said = texts(figure)
    assert "course of a step" in said and "seconds" not in said
    assert "predicted peak\n653 MiB" in said and "peak of this step" not in said
    assert "653 MiB at most  ·  limit 600 MiB  ·  53 MiB too much" in said
    planned = Timeline.of(step(timed=False), "here")
    path = plot_timeline(planned, tmp_path / "plan.png", title="A plan", limit_bytes=None, predicted_peak_bytes=None)
    first = path.read_bytes()
    assert path == tmp_path / "plan.png" and first.startswith(b"\x89PNG")
    plot_timeline(planned, path, title="A plan", limit_bytes=None, predicted_peak_bytes=None)
    assert path.read_bytes() == first


def test_a_limit_far_away_does_not_flatten_the_step() -> None:
    figure = draw(step(), 80_000 * MIB)
    assert "limit\n80,000 MiB ↑" in texts(figure)
    assert figure.axes[0].get_ylim()[1] < 700 * MIB


def test_what_can_t_be_written_is_an_error(tmp_path: Path) -> None:
    timeline, path = Timeline.of(step(), "here"), tmp_path / "no" / "a.png"
    with pytest.raises(EnvironmentProblem, match="can't be written"):
        plot_timeline(timeline, path, title="", limit_bytes=None, predicted_peak_bytes=None)


def test_what_stands_is_at_the_bottom() -> None:
    shuffled = ["logits", "other", "sand", "activations", "weights", "gradients", "projections", "optimizer state"]
    assert stack_order(shuffled) == [*CATEGORY_COLOURS, "sand"]


SIZES = st.dictionaries(st.sampled_from(["weights", "optimizer_state", "logits", "other", "sand", "x"]), st.integers(0))


@given(st.lists(SIZES, min_size=1, max_size=6))
def test_the_stack_loses_no_byte(categories: list[dict[str, int]]) -> None:
    moments = [Moment(categories=sizes) for sizes in categories]
    layers = stack(moments)
    assert set(layers) <= set(CATEGORY_COLOURS)
    assert [sum(series[place] for series in layers.values()) for place in range(len(moments))] == [
        moment.total_bytes for moment in moments
    ]


@pytest.mark.parametrize("num_moments", [1, MOST_MOMENTS, MOST_MOMENTS + 1, 12_345])
def test_few_moments_stand_for_many_with_their_extremes(num_moments: int) -> None:
    totals = [(index * 7919) % 10_007 for index in range(num_moments)]
    moments = [Moment(time_s=float(index), categories={"other": total}) for index, total in enumerate(totals)]
    kept = downsample(moments)
    assert len(kept) <= MOST_MOMENTS + 4 and (len(kept) == num_moments) == (num_moments <= MOST_MOMENTS)
    assert kept[0] == moments[0] and kept[-1] == moments[-1]
    assert [moment.time_s for moment in kept] == sorted(moment.time_s or 0 for moment in kept)
    assert Timeline(moments=tuple(kept)).peak_bytes == max(totals)


@given(st.lists(st.floats(0, 3), min_size=1, max_size=5))
def test_heights_are_spread_as_little_as_needed(heights: list[float]) -> None:
    wanted = sorted(heights, reverse=True)
    found = spread(wanted, 0.4, 0, 3)
    # Worst seen 1.1e-16 in 100,000 draws, so 1e-9.
    assert all(above - below >= 0.4 - 1e-9 for above, below in pairwise(found))
    assert found[0] <= 3 and found[-1] >= -1e-9
    if all(above - below >= 0.4 for above, below in pairwise(wanted)):
        assert found == pytest.approx(wanted)


def test_phases_leave_no_gap_and_turns_are_named_together() -> None:
    phases = ["forward", "forward", "head", "backward", "step", "backward", "step"]
    found = spans([0, 1, 2, 3, 4, 5, 6], phases)
    assert [span.name for span in found] == ["forward", "head", "backward", "step", "backward", "step"]
    assert found[0] == Span("forward", 0, 1.5) and found[-1] == Span("step", 5.5, 6)
    assert all(before.end == after.begin for before, after in pairwise(found))
    assert merge_alternating(found) == [*found[:2], Span("backward and step", 2.5, 6)]
    assert [span.name for span in merge_alternating(spans([0, 1, 2], ["head", "backward", "step"]))] == [
        "head",
        "backward",
        "step",
    ]
