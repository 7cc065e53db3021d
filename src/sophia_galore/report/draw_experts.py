"""The figure of a mixture of experts: which share of the tokens each expert gets, and how sure the routers are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sophia_galore.records.metrics import Metrics, TrainStep, use_of_experts
from sophia_galore.report.style import BLUE, ORANGE, headline, new_figure, note, quantity, step_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_COLUMNS = 400
"""Most steps that are drawn as columns; of more, neighbours are joined."""


def has_experts(metrics: Metrics) -> bool:
    """Return whether a run recorded how tokens were dealt to experts."""
    return any(line.tokens_per_expert for line in metrics.train)


def draw_experts(metrics: Metrics) -> Figure:
    """Draw the figure of `experts.png`.

    Args:
        metrics: The records.
    """
    lines = [line for line in metrics.train if line.tokens_per_expert]
    figure = new_figure(9, 6.5)
    headline(figure, "Experts", _subtitle(lines))
    bounds = {"left": 0.085, "right": 0.965, "top": 0.82, "bottom": 0.09}
    grid = figure.add_gridspec(2, 1, height_ratios=[3, 1.2], hspace=0.3, **bounds)
    above, below = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    if not lines:
        note(above, "no step has been recorded yet")
        note(below, "")
        return figure
    _draw_shares(figure, above, lines)
    _draw_routers(below, lines)
    return figure


def _subtitle(lines: Sequence[TrainStep]) -> str:
    use = use_of_experts(lines)
    if use is None:
        return ""
    largest, idle = use
    return f"{idle:.1f} experts without tokens in a step on average; one got {largest:.0%} of a layer's at most"


def _draw_shares(figure: Figure, axes: Axes, lines: Sequence[TrainStep]) -> None:
    """Draw a column for each step, with the share of each expert relative to an even one."""
    width = -(-len(lines) // MOST_COLUMNS)
    columns: list[list[float]] = []
    for start in range(0, len(lines), width):
        counts = [line.tokens_per_expert or () for line in lines[start : start + width]]
        sums = [sum(of_expert) for of_expert in zip(*counts, strict=True)]
        columns.append([count * len(sums) / max(1, sum(sums)) for count in sums])
    extent = (lines[0].step - 0.5, lines[-1].step + 0.5, len(columns[0]) - 0.5, -0.5)
    rows = [list(row) for row in zip(*columns, strict=True)]
    image = axes.imshow(rows, aspect="auto", extent=extent, cmap="viridis", vmin=0, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, pad=0.015)
    bar.outline.set_visible(False)
    quantity(axes, "tokens of each expert, over all layers; 1 is an even share")
    axes.set_ylabel("expert")
    axes.grid(visible=False)


def _draw_routers(axes: Axes, lines: Sequence[TrainStep]) -> None:
    steps = [line.step for line in lines]
    axes.plot(steps, [line.router_entropy or 0.0 for line in lines], color=BLUE, label="entropy of the routers, nats")
    aux = [line.aux_loss for line in lines if line.aux_loss is not None]
    if len(aux) == len(lines):
        axes.plot(steps, aux, color=ORANGE, label="loss that balances experts")
    step_axis(axes)
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.legend(loc="best", ncols=2)
