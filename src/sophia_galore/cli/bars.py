"""Memory by category, as one bar on the terminal with a legend, and wide tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from sophia_galore.config.size import bytes_in_words
from sophia_galore.report.style import colour_of, stack_order

LEGEND_WIDTH = 80
"""The largest width of the legend, in columns."""

_BLOCK, _FREE_BLOCK = "\u2588", "\u2591"
_FREE_MARK, _OVER_MARK = ".", "!"
_LETTERS = {"optimizer state": "S"}
"""Where the first letter of a category's name is not its mark: "other" has the O."""

_FREE, _OVER = "free", "over the limit"


def memory_bar(categories: Mapping[str, int], *, limit_bytes: int | None, width: int = LEGEND_WIDTH) -> RenderableType:
    """Return a stacked bar of the categories with a legend of sizes and per cent.

    The whole bar is the limit, or the total if there is no limit or it is exceeded. A terminal with at least 256
    colours shows coloured blocks, any other shows letters. Empty categories are left out.

    Args:
        categories: Allocated bytes by category.
        limit_bytes: The limit in bytes, or None. Per cent are of the limit, else of the total.
        width: The largest width of the bar, in columns.

    Returns:
        A renderable for a console.
    """
    positive = {name: categories[name] for name in stack_order(categories) if categories[name] > 0}
    return _MemoryBar(positive, limit_bytes if limit_bytes and limit_bytes > 0 else None, max(width, 1))


def print_wide(console: Console, table: Table) -> None:
    """Print a table in its full width: a terminal that is narrower breaks its rows, and nothing is cut off."""
    width = console.measure(table, options=console.options.update(width=10_000)).maximum
    Console(highlight=False, soft_wrap=True, width=max(width, console.width)).print(table)


def segments(sizes: Mapping[str, int], whole_bytes: int, width: int) -> dict[str, int]:
    """Cells of a bar for each size: within one cell of its share, and together within one of theirs.

    Args:
        sizes: In the bar's order, in bytes.
        whole_bytes: What the bar stands for.
        width: Cells of the bar.
    """
    cells, end, total = {}, 0, 0
    for name, size in sizes.items():
        total += size
        before, end = end, (2 * total * width + whole_bytes) // (2 * whole_bytes)
        cells[name] = end - before
    return cells


@dataclass(frozen=True)
class _MemoryBar:
    sizes: dict[str, int]
    limit_bytes: int | None
    width: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.sizes and self.limit_bytes is None:
            return
        blocks = (
            console.is_terminal
            and not console.no_color
            and not options.ascii_only
            and not options.legacy_windows
            and console.color_system in ("256", "truecolor")
        )
        yield self._bar(min(self.width, options.max_width), blocks=blocks)
        yield from self._legend(blocks=blocks)

    @property
    def _whole_bytes(self) -> int:
        """What the bar stands for."""
        return max(sum(self.sizes.values()), self.limit_bytes or 0)

    @property
    def _over_bytes(self) -> int:
        return self._whole_bytes - self.limit_bytes if self.limit_bytes else 0

    def _bar(self, width: int, *, blocks: bool) -> Text:
        marks = _marks(self.sizes)
        bar = Text(no_wrap=True, overflow="ignore")
        for name, count in segments(self.sizes, self._whole_bytes, width).items():
            bar.append((_BLOCK if blocks else marks[name]) * count, style=colour_of(name))
        if self.limit_bytes and self._over_bytes:
            # However little is too much, it is seen.
            inside = min(round(self.limit_bytes / self._whole_bytes * width), width - 1)
            bar = bar[:inside]
            bar.append((_BLOCK if blocks else _OVER_MARK) * (width - inside), style="bold red")
        else:
            bar.append((_FREE_BLOCK if blocks else _FREE_MARK) * (width - len(bar)), style="dim")
        return bar

    def _legend(self, *, blocks: bool) -> list[Text]:
        """A row for each category, the largest first; last what is free, or too much."""
        marks = _marks(self.sizes)
        of_bytes = self.limit_bytes or self._whole_bytes
        rows = [
            (_BLOCK if blocks else marks[name], name, size, colour_of(name))
            for name, size in sorted(self.sizes.items(), key=lambda item: -item[1])
        ]
        if self._over_bytes:
            rows.append((_BLOCK if blocks else _OVER_MARK, _OVER, self._over_bytes, "bold red"))
        elif self.limit_bytes:
            free = self.limit_bytes - sum(self.sizes.values())
            rows.append((_FREE_BLOCK if blocks else _FREE_MARK, _FREE, free, "dim"))
        words = [bytes_in_words(size) for _, _, size, _ in rows]
        shares = [_percent(size, of_bytes) for _, _, size, _ in rows]
        after = max(map(len, words)) + max(map(len, shares)) + 4
        tail = f" of {bytes_in_words(self.limit_bytes)}" if self.limit_bytes else ""
        room = min(max(len(name) for _, name, _, _ in rows), LEGEND_WIDTH - 2 - after - len(tail))
        lines = []
        for (mark, name, _, style), size, share in zip(rows, words, shares, strict=True):
            shown = name if len(name) <= room else f"{name[: room - 2]}.."
            line = Text.assemble((mark, style), " ", no_wrap=True, overflow="ignore")
            line.append(
                f"{shown:<{room}}  {size:>{max(map(len, words))}}  {share:>{max(map(len, shares))}}",
                style=style if name in (_FREE, _OVER) else "",
            )
            lines.append(line)
        if tail:
            lines[-1].append(tail, style=rows[-1][3])
        return lines


def _percent(size_bytes: int, of_bytes: int) -> str:
    percent = 100 * size_bytes / of_bytes
    return f"{percent:.0f} %" if percent >= 1 or not size_bytes else "< 1 %"


def _marks(names: Mapping[str, int]) -> dict[str, str]:
    """A letter or digit for each name, its own where it can be: its first one that is free."""
    marks: dict[str, str] = {}
    for name in names:
        own = [_LETTERS.get(name, ""), *name.upper(), *"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"]
        free = [sign for sign in own if sign.isascii() and sign.isalnum() and sign not in marks.values()]
        marks[name] = free[0] if free else "?"
    return marks
