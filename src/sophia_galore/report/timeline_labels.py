"""What is written around the memory of a step: sizes to compare it with on the right, the phases of the step above.

The sizes are the step's peak, the predicted one and the limit; each is marked at its height.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from sophia_galore.records.memory import Timeline
from sophia_galore.report.style import FAINT, INK, MUTED, ORANGE, size_in_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REACH = 1.7
"""A mark is drawn as a line up to this many times the largest total; further away it would flatten the rest."""

# In the order of a step. Greys, since colours are for categories; neighbours in a step differ in lightness.
SHADES = {"forward": "#D3DAE1", "head": "#5B6875", "backward": "#A9B4BF", "step": "#3B4652"}

TAKE_TURNS = {"backward", "step"}
"""Phases that follow each other layer by layer, so that only both together can be named."""

LEAST_GAP = 8
"""Pixels between two names."""


@dataclass(frozen=True)
class Mark:
    """A size with a name, marked at the height where it is."""

    name: str
    size_bytes: int
    colour: str
    line: str


def marks_of(timeline: Timeline, limit_bytes: int | None, predicted_peak_bytes: int | None) -> list[Mark]:
    """What is marked, the highest first; a prediction that reads like the peak is marked once, with it.

    Args:
        timeline: One step.
        limit_bytes: What may be allocated; None without a limit.
        predicted_peak_bytes: Peak that was predicted; None where it was not.
    """
    peak = timeline.peak_bytes
    if predicted_peak_bytes is not None and size_in_unit(predicted_peak_bytes, peak) == size_in_unit(peak, peak):
        marks = [Mark("peak, as predicted" if timeline.timed else "predicted peak", peak, INK, "--")]
    else:
        marks = [Mark("peak of this step", peak, INK, ":")]
        if predicted_peak_bytes is not None:
            marks.append(Mark("predicted peak", predicted_peak_bytes, INK, "--"))
    if limit_bytes is not None:
        marks.append(Mark("limit", limit_bytes, ORANGE, "-"))
    return sorted(marks, key=lambda mark: -mark.size_bytes)


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


def draw_marks(axes: Axes, marks: Sequence[Mark], peak_place: float, peak_bytes: int) -> None:
    """Lines at the marked sizes, each with its name to the right of the axes; what is above the axes has an arrow.

    Args:
        axes: With its limits.
        marks: The highest first.
        peak_place: Where along x the largest total is.
        peak_bytes: The largest total.
    """
    from matplotlib.transforms import blended_transform_factory

    right = axes.get_xlim()[1]
    for mark in marks:
        if mark.size_bytes > axes.get_ylim()[1]:
            continue
        begin = peak_place if mark.line == ":" else axes.get_xlim()[0]
        thick = 1.6 if mark.line == "-" else 1.3
        axes.plot(
            [begin, right],
            [mark.size_bytes] * 2,
            color=mark.colour,
            linestyle=mark.line,
            linewidth=thick,
            zorder=3,
            clip_on=False,
        )
    axes.plot(
        [peak_place], [peak_bytes], "o", color=INK, markersize=6, markeredgecolor="white", zorder=4, clip_on=False
    )
    height = axes.get_window_extent().height / axes.figure.dpi
    inches = [min(mark.size_bytes / axes.get_ylim()[1], 1) * height for mark in marks]
    beside = blended_transform_factory(axes.transAxes, axes.transAxes)
    width = axes.get_window_extent().width / axes.figure.dpi
    for mark, wanted, place in zip(marks, inches, spread(inches, 0.4, 0.2, height), strict=True):
        far = " \u2191" if mark.size_bytes > axes.get_ylim()[1] else ""
        if not far:
            axes.plot(
                [1, 1 + 0.12 / width],
                [wanted / height, place / height],
                transform=beside,
                color=mark.colour,
                linewidth=0.8,
                clip_on=False,
            )
        axes.text(
            1 + 0.18 / width,
            place / height,
            f"{mark.name}\n{size_in_unit(mark.size_bytes, peak_bytes)}{far}",
            transform=beside,
            va="center",
            fontsize=9.5,
            color=mark.colour,
            linespacing=1.25,
        )


@dataclass(frozen=True)
class Span:
    """A stretch of the axis in one phase, or in some that take turns."""

    name: str
    begin: float
    end: float

    @property
    def middle(self) -> float:
        """Where its name belongs."""
        return (self.begin + self.end) / 2


def spans(places: Sequence[float], phases: Sequence[str]) -> list[Span]:
    """The phases as stretches that leave no gap; between two moments of different phases, each has half.

    Args:
        places: Of the moments along the axis, ascending.
        phases: Of the moments.
    """
    runs = [list(run) for _, run in groupby(range(len(phases)), key=lambda index: phases[index])]
    borders = [(places[run[-1]] + places[run[-1] + 1]) / 2 for run in runs[:-1]]
    begins, ends = [places[0], *borders], [*borders, places[-1]]
    return [Span(phases[run[0]], begin, end) for run, begin, end in zip(runs, begins, ends, strict=True)]


def named(found: Sequence[Span]) -> list[Span]:
    """The stretches to write a name on: backward and step in turns are one.

    Args:
        found: As `spans` gives them.
    """
    names: list[Span] = []
    for turns, run in groupby(found, key=lambda span: span.name in TAKE_TURNS):
        parts = list(run)
        if turns and len(parts) > 2:
            names.append(Span("backward and step", parts[0].begin, parts[-1].end))
        else:
            names += [span for span in parts if span.name]
    return names


def draw_phases(axes: Axes, places: Sequence[float], phases: Sequence[str]) -> None:
    """A thin band above the axes, and the names of the phases: each above its stretch, or else all in a key.

    Args:
        axes: With its limits along x.
        places: Of the moments along the axis, ascending.
        phases: Of the moments.
    """
    found = spans(places, phases)
    if not any(span.name for span in found):
        return
    height = axes.get_window_extent().height / axes.figure.dpi
    bottom, thick = 1 + 0.05 / height, 0.09 / height
    for name in dict.fromkeys(span.name for span in found):
        axes.broken_barh(
            [(span.begin, span.end - span.begin) for span in found if span.name == name],
            (bottom, thick),
            transform=axes.get_xaxis_transform(),
            facecolor=SHADES.get(name, FAINT),
            edgecolor="none",
            clip_on=False,
        )
    above = bottom + thick + 0.05 / height
    if not _write_names(axes, named(found), above):
        names = {span.name for span in found} - {""}
        known = [name for name in SHADES if name in names]
        _write_key(axes, [*known, *sorted(names - set(known))], above)


def _write_names(axes: Axes, names: Sequence[Span], bottom: float) -> bool:
    """Names over the middle of their stretches; if one finds no room, none is written.

    Returns:
        Whether they are written.
    """
    whole = axes.get_window_extent()
    texts = [
        axes.text(
            span.middle,
            bottom,
            span.name,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=9.5,
            color=MUTED,
        )
        for span in names
    ]
    boxes = [text.get_window_extent() for text in texts]
    apart = all(box.x1 + LEAST_GAP < after.x0 for box, after in pairwise(boxes))
    if apart and boxes[0].x0 >= whole.x0 and boxes[-1].x1 <= whole.x1:
        return True
    for text in texts:
        text.remove()
    return False


def _write_key(axes: Axes, names: Sequence[str], bottom: float) -> None:
    """Each phase once, beside its grey."""
    from matplotlib.patches import Rectangle

    whole = axes.get_window_extent()
    width, height = whole.width / axes.figure.dpi, whole.height / axes.figure.dpi
    left = 0.0
    for name in names:
        grey = Rectangle(
            (left / width, bottom + 0.03 / height),
            0.16 / width,
            0.09 / height,
            transform=axes.transAxes,
            facecolor=SHADES.get(name, FAINT),
            edgecolor="none",
            clip_on=False,
        )
        axes.add_artist(grey)
        text = axes.text(
            (left + 0.22) / width, bottom, name, transform=axes.transAxes, va="bottom", fontsize=9.5, color=MUTED
        )
        left = (text.get_window_extent().x1 - whole.x0) / axes.figure.dpi + 0.25
