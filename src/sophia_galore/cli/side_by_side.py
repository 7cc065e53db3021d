"""Two answers to one question: in columns on a wide terminal, else one below the other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

_NARROWEST = 80
"""Narrower terminals, in characters, show no columns."""

_LABELS = ("base", "fine-tuned")


class SideBySide(AbstractContextManager["SideBySide"]):
    """Shows two answers to one question as they are generated, one after the other.

    Args:
        console: The console.
        titles: The names of the base model and the trained model.
    """

    def __init__(self, console: Console, titles: Sequence[str]) -> None:
        self._console, self._titles = console, titles
        self._texts = [Text() for _ in titles]
        self._place = -1
        columns = console.is_terminal and console.width >= _NARROWEST
        # What is higher than the screen ends in dots while it grows, and is whole at the end.
        self._live = Live(self._table(), console=console, auto_refresh=False) if columns else None

    def __enter__(self) -> Self:
        """Start the live table."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Print the final table."""
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.stop()
        elif self._place >= 0:
            self._console.print()

    def begin(self) -> None:
        """Begin the next model's answer."""
        self._place += 1
        if self._live is None:
            above = "\n\n" if self._place else ""
            self._console.print(
                f"{above}{_LABELS[self._place]}: {self._titles[self._place]}", style="bold", markup=False
            )
        else:
            self._live.update(self._table(), refresh=True)

    def add(self, text: str) -> None:
        """Add a part of this model's answer."""
        self._texts[self._place].append(text)
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        else:
            print(text, end="", flush=True)

    def _table(self) -> Table:
        table = Table(box=SIMPLE_HEAD, expand=True, pad_edge=False)
        table.show_edge = False
        for label, title in zip(_LABELS, self._titles, strict=True):
            table.add_column(Text(f"{label}: {title}"), ratio=1, overflow="fold")
        waits = Text("...", style="dim")
        table.add_row(
            *(text or waits if place == self._place else text for place, text in enumerate(self._texts)),
        )
        return table
