"""Two answers to one question: in columns on a terminal that is wide enough, else one below the other."""

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
"""Below so many characters, columns hold too few words."""

_LABELS = ("base", "fine-tuned")


class SideBySide(AbstractContextManager["SideBySide"]):
    """Shows the answers to one question as they come: first all of the first one, then the second.

    Args:
        console: Where to.
        titles: The names of the models, from before and after training.
    """

    def __init__(self, console: Console, titles: Sequence[str]) -> None:
        self._console, self._titles = console, titles
        self._texts = [Text() for _ in titles]
        self._place = -1
        columns = console.is_terminal and console.width >= _NARROWEST
        # What is higher than the screen ends in dots while it grows, and is whole at the end.
        self._live = Live(self._table(), console=console, auto_refresh=False) if columns else None

    def __enter__(self) -> Self:
        """Take the screen."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave what is there."""
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.stop()
        elif self._place >= 0:
            self._console.print()

    def begin(self) -> None:
        """The next model's turn: it is loaded, and then reads the question."""
        self._place += 1
        if self._live is None:
            above = "\n\n" if self._place else ""
            self._console.print(
                f"{above}{_LABELS[self._place]}: {self._titles[self._place]}", style="bold", markup=False
            )
        else:
            self._live.update(self._table(), refresh=True)

    def add(self, text: str) -> None:
        """A new part of this model's answer."""
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
