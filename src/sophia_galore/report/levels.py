"""Sizes that are marked at their height beside a timeline: its peak, the predicted one, the limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sophia_galore.report.style import INK, ORANGE, size_in_unit
from sophia_galore.report.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REACH = 1.7
"""A level is drawn as a line up to this many times the largest total; further away it would flatten the rest."""


@dataclass(frozen=True)
class Level:
    """A size with a name, marked at the height where it is."""

    name: str
    size_bytes: int
    colour: str
    line: str


def levels_of(timeline: Timeline, limit_bytes: int | None, predicted_peak_bytes: int | None) -> list[Level]:
    """What is marked, the highest first; a prediction that reads like the peak is marked once, with it.

    Args:
        timeline: One step.
        limit_bytes: What may be allocated; None without a limit.
        predicted_peak_bytes: Peak that was predicted; None where it was not.
    """
    peak = timeline.peak_bytes
    if predicted_peak_bytes is not None and size_in_unit(predicted_peak_bytes, peak) == size_in_unit(peak, peak):
        levels = [Level("peak, as predicted" if timeline.timed else "predicted peak", peak, INK, "--")]
    else:
        levels = [Level("peak of this step", peak, INK, ":")]
        if predicted_peak_bytes is not None:
            levels.append(Level("predicted peak", predicted_peak_bytes, INK, "--"))
    if limit_bytes is not None:
        levels.append(Level("limit", limit_bytes, ORANGE, "-"))
    return sorted(levels, key=lambda level: -level.size_bytes)


def spread(wanted: Sequence[float], gap: float, lowest: float, highest: float) -> list[float]:
    """Heights near those that are wanted, none nearer to its neighbour than `gap`.

    Args:
        wanted: Heights, the highest first.
        gap: Least distance between two.
        lowest: No height is below this, if all find room.
        highest: No height is above this.

    Returns:
        As many heights, the highest first.
    """
    # With the gaps taken out it is a falling series again; what rises is replaced by its mean.
    blocks: list[tuple[float, int]] = []
    for index, height in enumerate(wanted):
        mean, count = height + index * gap, 1
        while blocks and blocks[-1][0] < mean:
            before, size = blocks.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        blocks.append((mean, count))
    flat = [mean for mean, count in blocks for _ in range(count)]
    floor = lowest + gap * (len(flat) - 1)
    return [min(max(height, floor), highest) - index * gap for index, height in enumerate(flat)]


def draw_levels(axes: Axes, levels: Sequence[Level], peak_place: float, peak_bytes: int) -> None:
    """Lines at the levels, each with its name to the right of the axes; what is above the axes has an arrow.

    Args:
        axes: With its limits.
        levels: The highest first.
        peak_place: Where along x the largest total is.
        peak_bytes: The largest total.
    """
    from matplotlib.transforms import blended_transform_factory

    right = axes.get_xlim()[1]
    for level in levels:
        if level.size_bytes > axes.get_ylim()[1]:
            continue
        begin = peak_place if level.line == ":" else axes.get_xlim()[0]
        thick = 1.6 if level.line == "-" else 1.3
        axes.plot(
            [begin, right],
            [level.size_bytes] * 2,
            color=level.colour,
            linestyle=level.line,
            linewidth=thick,
            zorder=3,
            clip_on=False,
        )
    axes.plot(
        [peak_place], [peak_bytes], "o", color=INK, markersize=6, markeredgecolor="white", zorder=4, clip_on=False
    )
    height = axes.get_window_extent().height / axes.figure.dpi
    inches = [min(level.size_bytes / axes.get_ylim()[1], 1) * height for level in levels]
    beside = blended_transform_factory(axes.transAxes, axes.transAxes)
    width = axes.get_window_extent().width / axes.figure.dpi
    for level, wanted, place in zip(levels, inches, spread(inches, 0.4, 0.2, height), strict=True):
        far = " \u2191" if level.size_bytes > axes.get_ylim()[1] else ""
        if not far:
            axes.plot(
                [1, 1 + 0.12 / width],
                [wanted / height, place / height],
                transform=beside,
                color=level.colour,
                linewidth=0.8,
                clip_on=False,
            )
        axes.text(
            1 + 0.18 / width,
            place / height,
            f"{level.name}\n{size_in_unit(level.size_bytes, peak_bytes)}{far}",
            transform=beside,
            va="center",
            fontsize=9.5,
            color=level.colour,
            linespacing=1.25,
        )
