"""Labels around the memory of a step: on the right the peak, the predicted peak and the limit; above, the phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from sophia_galore.records.memory import Timeline
from sophia_galore.report.style import FAINT, INK, MUTED, ORANGE, size_in_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REACH = 1.7
"""Marks up to this many times the largest total are drawn as lines; higher ones would flatten the rest."""

# In the order of a step. Greys, since colours are for categories; neighbours in a step differ in lightness.
SHADES = {"forward": "#D3DAE1", "head": "#5B6875", "backward": "#A9B4BF", "step": "#3B4652"}

ALTERNATING = {"backward", "step"}
"""Phases that alternate layer by layer, so they share one label."""

LEAST_GAP = 8
"""Pixels between two names."""


@dataclass(frozen=True)
class Mark:
    """A named size that is marked at its height."""

    name: str
    size_bytes: int
    colour: str
    line: str


def marks_of(timeline: Timeline, limit_bytes: int | None, predicted_peak_bytes: int | None) -> list[Mark]:
    """Return the marks, the highest first; a predicted peak that is written like the peak shares its mark.

    Args:
        timeline: One step.
        limit_bytes: The memory limit; None without one.
        predicted_peak_bytes: The predicted peak; None without one.
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
    """Return heights close to the wanted ones, with a distance of at least `gap` between neighbours.

    Args:
        wanted: The wanted heights, the highest first.
        gap: Least distance between two.
        lowest: No height is below this, if there is room for all.
        highest: No height is above this.

    Returns:
        As many heights, the highest first.
    """
    # Without the gaps the series must fall (isotonic regression): parts that rise are replaced by their mean.
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
    """Draw lines at the marked sizes, with names to the right of the axes; sizes above the axes get an arrow.

    Args:
        axes: With its limits.
        marks: The highest first.
        peak_place: Where along x the largest total is.
        peak_bytes: The largest total.
    """
    axes.plot(
        [peak_place], [peak_bytes], "o", color=INK, markersize=6, markeredgecolor="white", zorder=4, clip_on=False
    )
    (left, right), top = axes.get_xlim(), axes.get_ylim()[1]
    width, height = _inches(axes)
    wanted = [min(mark.size_bytes / top, 1) * height for mark in marks]
    for mark, at, beside in zip(marks, wanted, spread(wanted, 0.4, 0.2, height), strict=True):
        arrow = " \u2191" if mark.size_bytes > top else ""
        if not arrow:
            begin = peak_place if mark.line == ":" else left
            thick = 1.6 if mark.line == "-" else 1.3
            look: dict[str, Any] = {"color": mark.colour, "clip_on": False}
            axes.plot([begin, right], [mark.size_bytes] * 2, linestyle=mark.line, linewidth=thick, zorder=3, **look)
            connector = [1, 1 + 0.12 / width], [at / height, beside / height]
            axes.plot(*connector, transform=axes.transAxes, linewidth=0.8, **look)
        axes.text(
            1 + 0.18 / width,
            beside / height,
            f"{mark.name}\n{size_in_unit(mark.size_bytes, peak_bytes)}{arrow}",
            transform=axes.transAxes,
            va="center",
            fontsize=9.5,
            color=mark.colour,
            linespacing=1.25,
        )


def _inches(axes: Axes) -> tuple[float, float]:
    """Return width and height of axes in inches."""
    window = axes.get_window_extent()
    return window.width / axes.figure.dpi, window.height / axes.figure.dpi


@dataclass(frozen=True)
class Span:
    """An interval of the axis in one phase, or in phases that alternate."""

    name: str
    begin: float
    end: float

    @property
    def middle(self) -> float:
        """The place of its label."""
        return (self.begin + self.end) / 2


def spans(places: Sequence[float], phases: Sequence[str]) -> list[Span]:
    """Return the phases as adjacent intervals; they meet in the middle between two moments.

    Args:
        places: Of the moments along the axis, ascending.
        phases: Of the moments.
    """
    runs = [list(run) for _, run in groupby(range(len(phases)), key=lambda index: phases[index])]
    borders = [(places[run[-1]] + places[run[-1] + 1]) / 2 for run in runs[:-1]]
    begins, ends = [places[0], *borders], [*borders, places[-1]]
    return [Span(phases[run[0]], begin, end) for run, begin, end in zip(runs, begins, ends, strict=True)]


def merge_alternating(found: Sequence[Span]) -> list[Span]:
    """Return the intervals to label: alternating backward and step become one.

    Args:
        found: As `spans` gives them.
    """
    names: list[Span] = []
    for turns, run in groupby(found, key=lambda span: span.name in ALTERNATING):
        parts = list(run)
        if turns and len(parts) > 2:
            names.append(Span("backward and step", parts[0].begin, parts[-1].end))
        else:
            names += [span for span in parts if span.name]
    return names


def draw_phases(axes: Axes, places: Sequence[float], phases: Sequence[str]) -> None:
    """Draw the phases as a thin band above the axes, with labels above it or, if they do not fit, a key.

    Args:
        axes: With its limits along x.
        places: Of the moments along the axis, ascending.
        phases: Of the moments.
    """
    found = spans(places, phases)
    if not any(span.name for span in found):
        return
    height = _inches(axes)[1]
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
    if not _write_names(axes, merge_alternating(found), above):
        names = {span.name for span in found} - {""}
        known = [name for name in SHADES if name in names]
        _write_key(axes, [*known, *sorted(names - set(known))], above)


def _write_names(axes: Axes, names: Sequence[Span], bottom: float) -> bool:
    """Write names above the middle of their intervals; if one does not fit, none is written.

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
    """Write the key: each phase once, with its shade."""
    from matplotlib.patches import Rectangle

    width, height = _inches(axes)
    left, origin = 0.0, axes.get_window_extent().x0
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
        left = (text.get_window_extent().x1 - origin) / axes.figure.dpi + 0.25
