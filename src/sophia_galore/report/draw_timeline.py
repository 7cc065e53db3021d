"""The memory within one step, stacked by category, with the limit and the predicted peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from sophia_galore.records.memory import Moment, Timeline
from sophia_galore.report.style import (
    CATEGORY_COLOURS,
    INK,
    MUTED,
    ORANGE,
    headline,
    new_figure,
    size_in_unit,
    stack_order,
    unit_of,
)
from sophia_galore.report.timeline_labels import REACH, Mark, draw_marks, draw_phases, marks_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_MOMENTS = 2_000
"""Most moments that are drawn, more than the axis has pixels; of more, only extremes are drawn."""

MOST_OUTLINED = 500
"""Most moments with which an outline is drawn; with more it would be a black band."""

ROOM_ABOVE, ROOM_BELOW, ROOM_LEFT, ROOM_RIGHT = 1.2, 0.5, 0.6, 1.45
"""Inches of the panel around its axes, for title, legend, phases and labels."""


@dataclass(frozen=True)
class Box:
    """A rectangle on a figure in inches, from the lower left corner."""

    left: float
    bottom: float
    width: float
    height: float


def timeline_figure(
    timeline: Timeline, *, title: str, limit_bytes: int | None, predicted_peak_bytes: int | None
) -> Figure:
    """Draw a figure of a timeline alone.

    Args:
        timeline: One step.
        title: Headline.
        limit_bytes: The memory limit; None without one.
        predicted_peak_bytes: The predicted peak; None without one.
    """
    figure = new_figure(11, 5.6)
    peak = timeline.peak_bytes
    words = [f"{size_in_unit(peak, peak)} at most"]
    if limit_bytes is not None:
        rest = limit_bytes - peak
        words.append(f"limit {size_in_unit(limit_bytes, peak)}")
        words.append(f"{size_in_unit(rest, peak)} free" if rest >= 0 else f"{size_in_unit(-rest, peak)} too much")
    headline(figure, title, "  \u00b7  ".join(words))
    draw_timeline(
        figure,
        Box(0.35, 0.1, 10.55, 4.5),
        timeline,
        limit_bytes=limit_bytes,
        predicted_peak_bytes=predicted_peak_bytes,
    )
    return figure


def draw_timeline(
    figure: Figure,
    box: Box,
    timeline: Timeline,
    *,
    limit_bytes: int | None,
    predicted_peak_bytes: int | None,
) -> None:
    """Draw the panel of a timeline with its labels.

    Args:
        figure: The figure to draw on.
        box: Place of the panel, labels included.
        timeline: One step; not empty.
        limit_bytes: The memory limit; None without one.
        predicted_peak_bytes: The predicted peak; None without one.
    """
    width, height = figure.get_size_inches()
    axes = figure.add_axes(
        (
            (box.left + ROOM_LEFT) / width,
            (box.bottom + ROOM_BELOW) / height,
            (box.width - ROOM_LEFT - ROOM_RIGHT) / width,
            (box.height - ROOM_BELOW - ROOM_ABOVE) / height,
        )
    )
    moments = downsample(timeline.moments)
    if len(moments) == 1:
        # A single moment is drawn as a horizontal line.
        moments = moments * 2
    places = _places(moments, timed=timeline.timed)
    layers = stack(moments)
    highest = max(range(len(moments)), key=lambda index: moments[index].total_bytes)
    _draw_layers(axes, places, layers)
    _x_axis(axes, places, timed=timeline.timed)
    marks = marks_of(timeline, limit_bytes, predicted_peak_bytes)
    _y_axis(axes, timeline.peak_bytes, marks)
    draw_marks(axes, marks, places[highest], timeline.peak_bytes)
    if limit_bytes is not None and timeline.peak_bytes > limit_bytes:
        _draw_excess(axes, places, moments, limit_bytes)
    draw_phases(axes, places, [moment.phase for moment in moments])
    _legend(figure, box, timeline, stack([moments[highest]]), list(layers))


def downsample(moments: Sequence[Moment]) -> list[Moment]:
    """Return about `MOST_MOMENTS` of the moments at most; of each interval: first, last, lowest and highest.

    Args:
        moments: In the order of time.
    """
    if len(moments) <= MOST_MOMENTS:
        return list(moments)
    interval = -(-len(moments) * 4 // MOST_MOMENTS)
    kept: set[int] = set()
    for begin in range(0, len(moments), interval):
        part = range(begin, min(begin + interval, len(moments)))
        kept |= {part[0], part[-1]}
        kept |= {end(part, key=lambda index: moments[index].total_bytes) for end in (min, max)}
    return [moments[index] for index in sorted(kept)]


def stack(moments: Sequence[Moment]) -> dict[str, list[int]]:
    """Return the bytes at each moment by category, from the bottom of the stack to its top.

    Categories without a colour are counted as "other"; those that are always zero are left out.
    """
    found: dict[str, list[int]] = {}
    for place, moment in enumerate(moments):
        for name, size in moment.categories.items():
            known = name.replace("_", " ")
            series = found.setdefault(known if known in CATEGORY_COLOURS else "other", [0] * len(moments))
            series[place] += size
    return {name: found[name] for name in stack_order(found) if any(found[name])}


def _places(moments: Sequence[Moment], *, timed: bool) -> list[float]:
    """Return the x coordinate of each moment."""
    if not timed:
        return [float(index) for index in range(len(moments))]
    # Clocks jitter; only the order of the moments is certain.
    places = list(accumulate((moment.time_s or 0.0 for moment in moments), max))
    return places if places[-1] > places[0] else [float(index) for index in range(len(moments))]


def _draw_layers(axes: Axes, places: Sequence[float], layers: dict[str, list[int]]) -> None:
    below = [0] * len(places)
    for name, series in layers.items():
        above = [bottom + size for bottom, size in zip(below, series, strict=True)]
        # A hairline of the same colour closes the seam between two areas.
        axes.fill_between(
            places, below, above, facecolor=CATEGORY_COLOURS[name], edgecolor=CATEGORY_COLOURS[name], linewidth=0.3
        )
        below = above
    if len(places) <= MOST_OUTLINED:
        axes.plot(places, below, color=INK, linewidth=0.9, solid_joinstyle="round")


def _draw_excess(axes: Axes, places: Sequence[float], moments: Sequence[Moment], limit_bytes: int) -> None:
    totals = [moment.total_bytes for moment in moments]
    axes.fill_between(
        places,
        limit_bytes,
        totals,
        where=[total > limit_bytes for total in totals],
        interpolate=True,
        facecolor="none",
        hatch="////",
        edgecolor=ORANGE,
        linewidth=0,
    )


def _x_axis(axes: Axes, places: Sequence[float], *, timed: bool) -> None:
    axes.set_xlim(places[0], places[-1])
    axes.spines["bottom"].set_color(MUTED)
    if timed and places[-1] - places[0] != len(places) - 1:
        in_seconds = places[-1] - places[0] >= 1
        axes.set_xlabel(f"{'' if in_seconds else 'milli'}seconds since the step began")
        axes.xaxis.set_major_formatter(lambda place, _: f"{place if in_seconds else 1000 * place:g}")
    else:
        axes.set_xlabel("course of a step \u2192")
        axes.set_xticks([])


def _y_axis(axes: Axes, peak_bytes: int, marks: Sequence[Mark]) -> None:
    from matplotlib.ticker import MaxNLocator

    unit, _ = unit_of(peak_bytes)
    top = max(mark.size_bytes for mark in marks if mark.size_bytes <= REACH * peak_bytes)
    axes.set_ylim(0, 1.06 * top)
    ticks = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(0, 1.06 * top / unit)
    axes.set_yticks([tick * unit for tick in ticks if tick * unit <= 1.06 * top], minor=False)
    axes.yaxis.set_major_formatter(lambda size, _: f"{size / unit:,.6g}")
    axes.grid(axis="y")
    axes.tick_params(axis="y", labelcolor=MUTED)


def _legend(figure: Figure, box: Box, timeline: Timeline, at_peak: dict[str, list[int]], names: list[str]) -> None:
    """Write the title and, below it, each category with its size at the peak."""
    from matplotlib.patches import Rectangle

    width, height = figure.get_size_inches()
    top = box.bottom + box.height

    def write(left: float, down: float, text: str, colour: str, **look: Any) -> float:
        """Write text at a place in inches and return where it ends."""
        drawn = figure.text(left / width, (top - down) / height, text, color=colour, va="baseline", **look)
        return float(drawn.get_window_extent().x1 / figure.dpi)

    of_what = f"Memory within step {timeline.step:,}" if timeline.step is not None else "Memory within a step"
    end = write(box.left, 0.15, f"{of_what}, {unit_of(timeline.peak_bytes)[1]}", INK, fontsize=11.5, fontweight="bold")
    write(end + 0.15, 0.15, "by category, with sizes at the peak", MUTED, fontsize=9.5)
    left = box.left
    for name in names:
        corner = (left / width, (top - 0.5) / height)
        figure.add_artist(
            Rectangle(corner, 0.13 / width, 0.13 / height, facecolor=CATEGORY_COLOURS[name], edgecolor="none")
        )
        size = size_in_unit(at_peak.get(name, [0])[0], timeline.peak_bytes)
        ends = write(left + 0.2, 0.49, name, INK, fontsize=10), write(left + 0.2, 0.68, size, MUTED, fontsize=9.5)
        left = max(ends) + 0.32
