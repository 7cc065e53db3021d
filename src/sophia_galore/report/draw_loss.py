"""The loss figure: training loss, its trend, evaluations as points, and the learning rate below."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING

from sophia_galore.records.metrics import Evaluation, Metrics, TrainStep
from sophia_galore.report.style import BLUE, GREEN, MUTED, ORANGE, headline, new_figure, note, quantity, step_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEWEST_SMOOTHED = 10
"""Fewest steps for which a trend is drawn."""

MOST_POINTS = 40
"""Most evaluations that are drawn as points; more would hide the line."""


def draw_loss(metrics: Metrics) -> Figure:
    """Draw the figure of `loss.png`.

    Args:
        metrics: The records; there may be none.
    """
    train = [line for line in metrics.train if isfinite(line.loss)]
    evals = [line for line in metrics.eval if isfinite(line.loss)]
    rates = [(line.step, line.learning_rate) for line in metrics.train if line.learning_rate is not None]
    figure = new_figure(9, 6 if rates else 5)
    headline(figure, "Loss", _subtitle(metrics, evals))
    bounds = {"left": 0.085, "right": 0.965, "top": 0.815, "bottom": 0.1}
    if rates:
        grid = figure.add_gridspec(2, 1, height_ratios=[4.2, 1], hspace=0.2, **bounds)
        axes = figure.add_subplot(grid[0])
        below = figure.add_subplot(grid[1], sharex=axes)
        axes.tick_params(labelbottom=False, bottom=False)
        _draw_rates(below, rates)
    else:
        axes = figure.add_subplot(figure.add_gridspec(1, 1, **bounds)[0])
    if train or evals:
        _draw_losses(axes, train, evals)
        if not rates:
            axes.set_xlabel("step")
        height = figure.get_size_inches()[1]
        figure.legend(loc="upper right", bbox_to_anchor=(bounds["right"], 1 - 0.14 / height), ncols=3, borderaxespad=0)
    else:
        note(axes, "no step has been recorded yet")
    return figure


def smooth(values: Sequence[float]) -> list[float]:
    """Return the trend of a noisy curve, without the lag of a moving average.

    It is a mean over both sides with exponentially decaying weights. The window grows with the square root of the
    length: long curves become smooth, and their steep beginning is kept.

    Args:
        values: One value a step.

    Returns:
        The trend, of the same length.
    """
    decay = 1 - 1 / max(2.5, 0.6 * len(values) ** 0.5)

    def sums(run: Sequence[float]) -> list[float]:
        """Return at each place the weighted sum of the values up to it."""
        total, found = 0.0, []
        for value in run:
            total = decay * total + value
            found.append(total)
        return found

    def both_sides(run: Sequence[float]) -> list[float]:
        # Both sums contain the value itself.
        return [a + b - value for a, b, value in zip(sums(run), sums(run[::-1])[::-1], run, strict=True)]

    return [total / weight for total, weight in zip(both_sides(values), both_sides([1.0] * len(values)), strict=True)]


def _draw_losses(axes: Axes, train: Sequence[TrainStep], evals: Sequence[Evaluation]) -> None:
    steps, losses = [line.step for line in train], [line.loss for line in train]
    if len(train) >= FEWEST_SMOOTHED:
        axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=0.9, label="training, each step")
        axes.plot(steps, smooth(losses), color=BLUE, linewidth=2.2, label="training, smoothed")
    elif train:
        axes.plot(steps, losses, color=BLUE, linewidth=2, marker="o", markersize=4, label="training")
    if evals:
        as_points = len(evals) <= MOST_POINTS
        axes.plot(
            [line.step for line in evals],
            [line.loss for line in evals],
            color=ORANGE,
            linewidth=1.4,
            linestyle=(0, (4, 3)) if as_points else "-",
            marker="o" if as_points else "",
            markersize=7,
            markeredgecolor="white",
            markeredgewidth=1.2,
            zorder=4,
            label="evaluation",
        )
    step_axis(axes)
    quantity(axes, "loss per token")


def _draw_rates(axes: Axes, rates: Sequence[tuple[int, float]]) -> None:
    steps, values = [step for step, _ in rates], [rate for _, rate in rates]
    axes.plot(steps, values, color=GREEN, alpha=0.7, linewidth=1.4, marker="o" if len(rates) == 1 else "", markersize=4)
    step_axis(axes)
    axes.set_xlabel("step")
    quantity(axes, "learning rate")
    top = max(values)
    axes.set_ylim(0, top * 1.15 or 1)
    axes.set_yticks([0, top] if top > 0 else [0])
    axes.set_yticklabels(["0", _rate(top)] if top > 0 else ["0"])
    axes.tick_params(axis="y", labelcolor=MUTED)


def _rate(value: float) -> str:
    """Return a learning rate in short scientific notation: 2e-4, not 0.0002 or 2e-04."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _subtitle(metrics: Metrics, evals: Sequence[Evaluation]) -> str:
    """Return the number of steps and the eval losses, in one line."""
    steps = len(metrics.train)
    parts = [f"{steps:,} step{'' if steps == 1 else 's'}"]
    lost = sum(not isfinite(line.loss) for line in metrics.train)
    if len(evals) > 1:
        best = min(evals, key=lambda line: line.loss)
        parts.append(f"evaluation {evals[0].loss:.3f} → {evals[-1].loss:.3f}")
        if f"{best.loss:.3f}" != f"{evals[-1].loss:.3f}":
            parts.append(f"best {best.loss:.3f} at step {best.step:,}")
    elif evals:
        parts.append(f"evaluation {evals[0].loss:.3f} at step {evals[0].step:,}")
    if lost:
        parts.append(f"{lost} not finite, left out")
    return "  ·  ".join(parts)
