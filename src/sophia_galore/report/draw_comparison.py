"""The figures of a comparison: loss over tokens and over time, and memory by category."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import isfinite
from typing import TYPE_CHECKING

from sophia_galore.report.draw_loss import FEWEST_SMOOTHED, smooth
from sophia_galore.report.numbers import step_seconds
from sophia_galore.report.run import Run
from sophia_galore.report.style import (
    AMBER,
    BLUE,
    GREEN,
    INK,
    MIB,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    colour_of,
    headline,
    mebibytes,
    new_figure,
    note,
    quantity,
    stack_order,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, INK)
_LINES = ("-", "--", ":", "-.")
_BAR_INCHES = 0.5


def line_styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return colour and line style of each name; line styles change once the colours are used up."""
    return {
        name: (_COLOURS[place % len(_COLOURS)], _LINES[place // len(_COLOURS) % len(_LINES)])
        for place, name in enumerate(dict.fromkeys(names))
    }


def draw_losses(runs: Sequence[Run]) -> Figure:
    """Draw the loss over tokens and over time: evaluations as points, the smoothed training loss behind them.

    Args:
        runs: Any number; they may have no steps yet.
    """
    looks = line_styles([run.name for run in runs])
    rows = -(-len(looks) // 3)
    figure = new_figure(9.6, 4.7 + 0.25 * rows)
    height = figure.get_size_inches()[1]
    headline(figure, "Loss", "nats a token; points: evaluation, faint lines: training, smoothed")
    top = 1 - (1.35 + 0.25 * rows) / height
    grid = figure.add_gridspec(1, 2, left=0.075, right=0.975, top=top, bottom=0.6 / height, wspace=0.14)
    left = figure.add_subplot(grid[0])
    right = figure.add_subplot(grid[1], sharey=left)
    if any(run.metrics.train or run.metrics.eval for run in runs):
        _draw_side(left, runs, looks, _tokens)
        _draw_side(right, runs, looks, _minutes)
        quantity(left, "against tokens")
        quantity(right, "against time in steps")
        left.set_xlabel("thousand tokens")
        right.set_xlabel("minutes")
        handles = [line for line in left.lines if not str(line.get_label()).startswith("_")]
        figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0.035, 1 - 0.8 / height),
            ncols=3,
            borderaxespad=0,
        )
    else:
        note(left, "no step has been recorded yet")
        note(right, "")
    return figure


def _tokens(run: Run) -> list[float]:
    """Return the tokens up to each step, in thousands."""
    return [total / 1000 for total in accumulate(line.tokens or 0 for line in run.metrics.train)]


def _minutes(run: Run) -> list[float]:
    """Return the minutes spent in optimizer steps up to each step."""
    return [total / 60 for total in accumulate(seconds or 0 for seconds in step_seconds(run))]


def _draw_side(
    axes: Axes, runs: Sequence[Run], looks: dict[str, tuple[str, str]], along: Callable[[Run], list[float]]
) -> None:
    named: set[str] = set()
    for run in runs:
        colour, line = looks[run.name]
        places = along(run)
        by_step = {0: 0.0} | {record.step: place for record, place in zip(run.metrics.train, places, strict=True)}
        steps = [
            (place, record.loss)
            for place, record in zip(places, run.metrics.train, strict=True)
            if isfinite(record.loss)
        ]
        if len(steps) >= FEWEST_SMOOTHED:
            trend = smooth([loss for _, loss in steps])
            axes.plot([place for place, _ in steps], trend, color=colour, alpha=0.25, linewidth=1.2, linestyle=line)
        evals = [
            (by_step[record.step], record.loss)
            for record in run.metrics.eval
            if record.step in by_step and isfinite(record.loss)
        ]
        axes.plot(
            [place for place, _ in evals],
            [loss for _, loss in evals],
            color=colour,
            linestyle=line,
            linewidth=1.8,
            marker="o",
            markersize=5.5,
            markeredgecolor="white",
            label=f"_{run.name}" if run.name in named else run.name,
            zorder=4,
        )
        named.add(run.name)
    axes.grid(axis="y")
    axes.margins(x=0.03)
    axes.tick_params(labelcolor=MUTED)


def draw_categories(runs: Sequence[Run]) -> Figure:
    """Draw the peak memory of each run by category; of runs with the same name, the one with the highest peak.

    Args:
        runs: Runs without a memory report are left out.
    """
    highest: dict[str, tuple[int, dict[str, int]]] = {}
    for run in runs:
        categories = run.memory.categories if run.memory else {}
        total = sum(categories.values())
        if total > highest.get(run.name, (0, {}))[0]:
            highest[run.name] = (total, dict(categories))
    names = stack_order([name for _, categories in highest.values() for name, size in categories.items() if size])
    figure = new_figure(9.6, 1.7 + _BAR_INCHES * max(1, len(highest)))
    height = figure.get_size_inches()[1]
    headline(figure, "Memory by category", "live tensors at the peak")
    axes = figure.add_axes((0.035, 0.1 / height, 0.93, 1 - 1.35 / height))
    if not highest:
        note(axes, "no run has recorded what its memory was for")
        return figure
    longest = max(total for total, _ in highest.values()) / MIB
    for row, (name, (total, categories)) in enumerate(highest.items()):
        begin = 0.0
        for category in names:
            size = categories.get(category, 0) / MIB
            axes.barh(row, size, left=begin, height=0.42, color=colour_of(category), edgecolor="white", linewidth=0.6)
            begin += size
        axes.text(0, row - 0.3, name, va="bottom", ha="left", fontsize=10)
        axes.text(begin + longest * 0.01, row, mebibytes(total), va="center", ha="left", color=INK, fontsize=10)
    axes.set_ylim(len(highest) - 0.5, -0.75)
    axes.set_xlim(0, longest * 1.14)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    from matplotlib.patches import Patch

    handles = [Patch(color=colour_of(category), label=category) for category in names]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.035, 1 - 0.85 / height), ncols=7, borderaxespad=0
    )
    return figure
