"""The band of phases above a timeline: which part of the step the engine was in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from sophia_galore.report.style import FAINT, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# In the order of a step. Greys, since colours are for categories; neighbours in a step differ in lightness.
SHADES = {"forward": "#D3DAE1", "head": "#5B6875", "backward": "#A9B4BF", "step": "#3B4652"}

TAKE_TURNS = {"backward", "step"}
"""Phases that follow each other layer by layer, so that only both together can be named."""

LEAST_GAP = 8
"""Pixels between two names."""


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
