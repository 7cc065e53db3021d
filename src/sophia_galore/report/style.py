"""Style of all figures: few lines, readable text, colours that colour-blind people can distinguish.

matplotlib takes about a second to import, so it is only imported in the functions that use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sophia_galore.errors import EnvironmentProblem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito (jfly.uni-koeln.de/color), distinct for all kinds of colour blindness.
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
SKY = "#56B4E9"
AMBER = "#E69F00"
PURPLE = "#CC79A7"
# In addition: a paler sky blue, and greys.
PALE = "#B9DDF4"
SILVER = "#AEB7C0"
INK = "#1F2933"
MUTED = "#6B7785"
FAINT = "#E4E8EC"

CATEGORY_COLOURS = {
    "weights": BLUE,
    "optimizer state": SKY,
    "projections": PALE,
    "activations": GREEN,
    "gradients": AMBER,
    "logits": PURPLE,
    "other": SILVER,
}
"""The categories of memory, from the bottom of a stack to its top: blue ones stay for the whole run."""

MIB = 2**20

# Any: the type of the keys differs between versions of matplotlib.
_SETTINGS: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so the figure is the same everywhere
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "sophia-galore",  # ids are made from it, so the same figure gives the same bytes
}


@contextmanager
def styled() -> Iterator[None]:
    """Apply our style inside the context, whatever the user's matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure on the Agg canvas, which needs no display and no global state.

    Args:
        width: In inches.
        height: In inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)
    return figure


def headline(figure: Figure, title: str, subtitle: str) -> None:
    """Write a title and a grey subtitle; they take the top 0.9 inch of the figure."""
    height = figure.get_size_inches()[1]
    left = 0.35 / figure.get_size_inches()[0]
    figure.text(left, 1 - 0.22 / height, title, fontsize=15, fontweight="bold", va="top", ha="left")
    figure.text(left, 1 - 0.56 / height, subtitle, fontsize=10.5, color=MUTED, va="top", ha="left")


def mebibytes(size_bytes: float) -> str:
    """Return a size in MiB, with a decimal only below 10 MiB."""
    size = size_bytes / MIB
    return f"{size:,.0f} MiB" if size >= 10 or size == 0 else f"{size:.1f} MiB" if size >= 0.1 else "< 0.1 MiB"


def unit_of(peak_bytes: int) -> tuple[int, str]:
    """Return the unit, its bytes and its name, in which sizes up to this one are written."""
    return (2**20, "MiB") if peak_bytes >= 4 * 2**20 else (2**10, "KiB")


def size_in_unit(size_bytes: int, peak_bytes: int) -> str:
    """Return a size in the unit that fits the peak."""
    unit, name = unit_of(peak_bytes)
    if name == "MiB" or size_bytes >= 2**30:
        return mebibytes(size_bytes)
    size = size_bytes / unit
    return f"{size:,.0f} {name}" if size >= 1 or not size else f"< 1 {name}"


def stack_order(names: Iterable[str]) -> list[str]:
    """Return the names in the order of `CATEGORY_COLOURS`; unknown ones come last, in the given order."""
    known = list(CATEGORY_COLOURS)
    return sorted(dict.fromkeys(names), key=lambda name: known.index(name) if name in CATEGORY_COLOURS else len(known))


def colour_of(name: str) -> str:
    """Return the colour of a category; unknown ones have that of "other"."""
    return CATEGORY_COLOURS.get(name, CATEGORY_COLOURS["other"])


def step_axis(axes: Axes) -> None:
    """Set up the x axis for steps, which are whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y")
    axes.margins(x=0.02)
    first, last = axes.dataLim.intervalx
    if first == last:
        axes.set_xlim(first - 1, first + 1)


def quantity(axes: Axes, text: str) -> None:
    """Write the label of the y axis above it, horizontally."""
    axes.set_title(text, fontsize=10, fontweight="normal", color=MUTED, pad=6)


def note(axes: Axes, text: str) -> None:
    """Write into an empty panel why it is empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as PNG without dates or versions, so the same records give the same bytes.

    Raises:
        EnvironmentProblem: If the file can't be written.
    """
    try:
        figure.savefig(path, format="png", metadata={"Software": None})
    except OSError as error:
        cause = f"{path} can't be written: {error.strerror}"
        raise EnvironmentProblem(cause, "Check the folder's permissions and the free space.") from None
    return path


def as_svg(figure: Figure) -> bytes:
    """Return the figure as SVG, which is sharp at any size; the same records give the same bytes."""
    from io import BytesIO

    file = BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()
