"""The memory figure: one step, the peak of each phase, the peak by category, and the peaks over the steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sophia_galore.records.memory import MemoryReport, MemoryStep
from sophia_galore.records.metrics import Metrics, TrainStep
from sophia_galore.report.draw_timeline import Box, draw_timeline
from sophia_galore.report.style import (
    BLUE,
    GREEN,
    INK,
    MIB,
    MUTED,
    ORANGE,
    SKY,
    headline,
    mebibytes,
    new_figure,
    note,
    step_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BARS = 9
"""Most bars in a panel."""

TIMELINE_HEIGHT = 4.5
"""Height of the panel of one step in inches, labels included."""

ROW_HEIGHT = 0.36
"""Distance of two bars in inches."""

LONGEST_NAME = 26
"""Most characters of a bar's name."""

REST = "everything else"

KINDS = {"allocated": BLUE, "reserved": ORANGE, "process": GREEN}


def draw_memory(report: MemoryReport, metrics: Metrics) -> Figure:
    """Draw the figure of `memory.png`.

    Args:
        report: Peaks; any of them may be missing.
        metrics: The steps; may be empty, and without sizes.
    """
    series = {kind: course for kind, course in _courses(report, metrics).items() if course}
    phases, parts = _largest(report.phases), _few(report.categories)
    bars_height = ROW_HEIGHT * max(len(phases), len(parts), 2)
    steps_height, gap = (2.2, 0.85) if series else (0.0, 0.0)
    bottom, width = 0.65 if series else 0.3, 11.0
    timeline_height = TIMELINE_HEIGHT + 0.2 if report.timeline else 0.0
    height = bottom + steps_height + gap + bars_height + timeline_height + 1.4
    figure = new_figure(width, height)
    known = [report.device, f"measured by {report.measured_by}" if report.measured_by else ""]
    headline(figure, _title(report), "  \u00b7  ".join(word for word in known if word))

    def panel(left: float, panel_bottom: float, panel_width: float, panel_height: float) -> Axes:
        """Add axes; place and size are in inches."""
        return figure.add_axes((left / width, panel_bottom / height, panel_width / width, panel_height / height))

    if report.timeline:
        draw_timeline(
            figure,
            Box(0.35, height - 0.95 - TIMELINE_HEIGHT, width - 0.45, TIMELINE_HEIGHT),
            report.timeline,
            limit_bytes=report.limit_bytes,
            predicted_peak_bytes=report.predicted_peak_bytes,
        )
    left = max(0.95, _room(phases))
    half = (width - left - _room(parts) - 0.6) / 2
    upper = bottom + steps_height + gap
    _draw_phases(panel(left, upper, half, bars_height), phases)
    _draw_categories(panel(left + half + 0.25 + _room(parts), upper, half, bars_height), parts)
    if series:
        _draw_courses(panel(left, bottom, width - left - 0.35, steps_height), series)
    return figure


def _title(report: MemoryReport) -> str:
    peaks = {
        "tensors": report.peak_allocated_bytes,
        "reserved": report.peak_reserved_bytes,
        "process": report.peak_process_bytes,
    }
    words = [f"{mebibytes(size)} {name}" for name, size in peaks.items() if size is not None]
    return f"Peak memory: {', '.join(words)}" if words else "Peak memory"


def _label(name: str) -> str:
    name = name.replace("_", " ")
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}\u2026"


def _room(sizes: Mapping[str, int]) -> float:
    """Return the inches that the names left of the bars need, margin included."""
    return 0.5 + 0.083 * max((len(_label(name)) for name in sizes), default=0)


def _largest(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the `MOST_BARS` largest sizes in their order; the rest is dropped, since peaks of phases don't add up."""
    kept = sorted(sizes, key=lambda name: -sizes[name])[:MOST_BARS]
    return {name: size for name, size in sizes.items() if name in kept}


def _few(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes, largest first; with more than `MOST_BARS`, the smallest are summed into the last one."""
    ordered = sorted(((name, size) for name, size in sizes.items() if size > 0), key=lambda item: -item[1])
    if len(ordered) <= MOST_BARS:
        return dict(ordered)
    kept, rest = ordered[: MOST_BARS - 1], ordered[MOST_BARS - 1 :]
    return dict(kept) | {REST: sum(size for _, size in rest)}


def _draw_phases(axes: Axes, phases: Mapping[str, int]) -> None:
    axes.set_title("Peak in each phase")
    if not phases:
        note(axes, "no phase was measured")
        return
    peak = max(phases.values())
    colours = [BLUE if size == peak else SKY for size in phases.values()]
    _bars(axes, phases, colours, {name: mebibytes(size) for name, size in phases.items()})


def _draw_categories(axes: Axes, categories: Mapping[str, int]) -> None:
    axes.set_title("What the peak consists of")
    total = sum(categories.values())
    if not categories:
        note(axes, "the peak was not broken down")
        return
    labels = {name: f"{mebibytes(size)}  ({100 * size / total:.0f} %)" for name, size in categories.items()}
    _bars(axes, categories, [MUTED if name == REST else BLUE for name in categories], labels)


def _bars(axes: Axes, sizes: Mapping[str, int], colours: list[str], labels: Mapping[str, str]) -> None:
    """Draw horizontal bars, the first one on top, each with its size at the end instead of an axis."""
    places = range(len(sizes))
    axes.barh(list(places), [size / MIB for size in sizes.values()], height=0.62, color=colours)
    largest = max(sizes.values()) / MIB or 1
    for place, (name, size) in zip(places, sizes.items(), strict=True):
        axes.text(size / MIB + 0.02 * largest, place, labels[name], va="center", ha="left", fontsize=10, color=INK)
    axes.set_yticks(list(places), [_label(name) for name in sizes])
    axes.tick_params(axis="y", labelcolor=INK, labelsize=10, pad=6)
    # Bars have the same thickness for any number of them; the right part is for the sizes.
    rows = axes.get_window_extent().height / axes.figure.dpi / ROW_HEIGHT
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xlim(0, largest * 1.5)
    axes.set_xticks([])
    axes.spines[["bottom", "left"]].set_visible(False)


def _courses(report: MemoryReport, metrics: Metrics) -> dict[str, list[tuple[int, int]]]:
    """Return sizes over the steps for each kind of memory; `metrics.jsonl` takes precedence over the report."""
    courses = {}
    for kind in KINDS:
        # The metrics have the size of the process after each step, which is not a peak.
        lines: list[MemoryStep | TrainStep] = [*report.steps, *(metrics.train if kind != "process" else ())]
        sizes = [(line.step, getattr(line, f"{kind}_bytes")) for line in lines]
        courses[kind] = sorted({step: size for step, size in sizes if size is not None}.items())
    return courses


def _draw_courses(axes: Axes, series: Mapping[str, list[tuple[int, int]]]) -> None:
    for kind, course in series.items():
        steps, sizes = [step for step, _ in course], [size / MIB for _, size in course]
        axes.plot(
            steps,
            sizes,
            color=KINDS[kind],
            linewidth=1.8,
            marker="o" if len(course) <= 30 else "",
            markersize=4.5,
            label=kind,
        )
    axes.set_title("Peak of each step, MiB")
    axes.set_xlabel("step")
    step_axis(axes)
    axes.set_ylim(0, max(size for course in series.values() for _, size in course) / MIB * 1.12 or 1)
    axes.tick_params(axis="y", labelcolor=MUTED)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="lower right", ncols=3, bbox_to_anchor=(1, 1.0), borderaxespad=0.2)
