"""The table of `peers.py`, made from its lines alone: a row a side, the best of each column, where ours is not it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peers_sides import BASE, SIDES, Side
from quiet import is_disturbed

Line = Mapping[str, Any]


@dataclass
class Row:
    """What is known of one side.

    Args:
        key: Its name among the sides.
        side: What it is.
        speeds: Median tokens a second of each turn, without the first step.
        whole_speeds: Tokens a second of each turn over all its steps.
        peaks: Peak resident bytes of each turn.
        losses: Eval loss by rate.
        tracked_bytes: Peak of live tensors.
        resumes: Whether the weights of a resumed run were those of an uninterrupted one; None: not known.
        remarks: What there is to say.
    """

    key: str
    side: Side
    speeds: dict[int, float] = field(default_factory=dict)
    whole_speeds: dict[int, float] = field(default_factory=dict)
    peaks: dict[int, float] = field(default_factory=dict)
    losses: dict[float, float] = field(default_factory=dict)
    tracked_bytes: float | None = None
    resumes: bool | None = None
    remarks: list[str] = field(default_factory=list)

    def remark(self, text: str) -> None:
        """Say it once."""
        if text not in self.remarks:
            self.remarks.append(text)

    def take(self, line: Line) -> None:
        """Add what a line says."""
        if "instead_of" in line:
            self.remark(f"the effective batch as one padded micro-batch, since: {line['instead_of']}")
        if "failed" in line:
            # Without a first run nothing else was tried.
            began = "could not run" if line["kind"] == "timing" and not self.speeds else f"{line['kind']} failed"
            self.remark(f"{began}: {line['failed']}")
        elif line["kind"] == "memory":
            self.tracked_bytes = line["peak_tracked_bytes"]
            if self.side.remark:
                self.remark(self.side.remark)
        elif line["kind"] == "resume":
            self.resumes = line["same_bits"]
            if "reason" in line:
                self.remark(f"resuming: {line['reason']}")
        elif line["kind"] == "timing":
            self._take_timing(line)

    def _take_timing(self, line: Line) -> None:
        if line["turn"] is not None:
            steps, turn = line["steps"], line["turn"]
            if is_disturbed(line):
                self.remark(f"turn {turn} was disturbed: its times do not count")
            else:
                self.speeds[turn] = statistics.median(tokens / seconds for tokens, seconds in steps[1:])
                self.whole_speeds[turn] = sum(tokens for tokens, _ in steps) / sum(seconds for _, seconds in steps)
            self.peaks[turn] = line["peak_process_bytes"]
        if "eval_loss" in line:
            self.losses[line["rate"]] = line["eval_loss"]

    @property
    def best_rate(self) -> float | None:
        """The rate that gave the lowest loss."""
        return min(self.losses, key=lambda rate: self.losses[rate]) if self.losses else None


@dataclass(frozen=True)
class Column:
    """A number in which sides are compared.

    Args:
        title: Its heading.
        values: The numbers of a row, by turn; empty: not measured.
        shown: How one is written.
        highest: Whether more is better.
        ratio: Whether ratios to the first row are shown.
    """

    title: str
    values: Callable[[Row], Mapping[int, float]]
    shown: Callable[[float], str]
    highest: bool = False
    ratio: bool = True

    def value(self, row: Row) -> float | None:
        """A row's number: the median of its turns."""
        values = self.values(row)
        return statistics.median(values.values()) if values else None

    def level(self, one: float, other: float) -> bool:
        """Whether two numbers are the same as they are written: less than that is rounding."""
        return self.shown(one) == self.shown(other)


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.0f}"


COLUMNS = (
    Column("tokens/s", lambda row: row.speeds, "{:.1f}".format, highest=True),
    Column("tokens/s with first step", lambda row: row.whole_speeds, "{:.1f}".format, highest=True),
    Column("peak tensors MiB", lambda row: {0: row.tracked_bytes} if row.tracked_bytes else {}, _mib),
    Column("peak resident MiB", lambda row: row.peaks, _mib),
    Column("eval loss", lambda row: {0: min(row.losses.values())} if row.losses else {}, "{:.4f}".format, ratio=False),
)


def rows_of(lines: Iterable[Line]) -> list[Row]:
    """One row for each side that the lines speak of, in the order of `SIDES`."""
    rows: dict[str, Row] = {}
    for line in lines:
        if line["kind"] != "start":
            rows.setdefault(line["side"], Row(line["side"], SIDES[line["side"]])).take(line)
    return [rows[key] for key in SIDES if key in rows]


def best(rows: Sequence[Row], column: Column) -> float | None:
    """The best number of a column."""
    values = [value for row in rows if (value := column.value(row)) is not None]
    return (max if column.highest else min)(values) if values else None


def table(lines: Sequence[Line]) -> str:
    """The whole text: about, table, and where ours is not the best.

    Args:
        lines: What `peers.py` wrote.

    Returns:
        Markdown.
    """
    rows = rows_of(lines)
    headings = ["side", "rate (of those tried)"]
    for column in COLUMNS:
        headings += [column.title, "ratio"] if column.ratio else [column.title]
    headings += ["resumes to the same bits", "remarks"]
    text = [*_about(lines), "", _line(headings), "|" + "---|" * len(headings)]
    base = next((row for row in rows if row.key == BASE), None)
    text += [_line(_cells(row, rows, base)) for row in rows]
    text += ["", *_behind(rows)]
    return "\n".join(text)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cells(row: Row, rows: Sequence[Row], base: Row | None) -> list[str]:
    rate = "-" if row.best_rate is None else f"{row.best_rate:g}"
    if len(row.losses) > 1:
        rate += f" ({', '.join(f'{tried:g}' for tried in sorted(row.losses))})"
    cells = [row.side.title, rate]
    for column in COLUMNS:
        value = column.value(row)
        shown = "-" if value is None else column.shown(value)
        first = best(rows, column)
        leads = value is not None and first is not None and column.level(value, first)
        cells.append(f"**{shown}**" if leads else shown)
        if column.ratio:
            cells.append(_ratio(column.values(row), column.values(base) if base else {}))
    resumes = {None: "-", True: "**yes**", False: "no"}[row.resumes]
    return [*cells, resumes, "; ".join(row.remarks) or "-"]


def _ratio(values: Mapping[int, float], base: Mapping[int, float]) -> str:
    """The median of the turns' ratios, and the lowest and the highest where they differ."""
    ratios = [values[turn] / base[turn] for turn in values if turn in base]
    if not ratios:
        return "-"
    middle, lowest, highest = (f"{ratio:.2f}" for ratio in (statistics.median(ratios), min(ratios), max(ratios)))
    return middle if lowest == highest else f"{middle} ({lowest} to {highest})"


def _behind(rows: Sequence[Row]) -> list[str]:
    """In words: the columns in which no row of ours has the best number."""
    ours = [row for row in rows if row.side.is_ours]
    told = []
    for column in COLUMNS:
        best_value, our_value = best(rows, column), best(ours, column)
        if best_value is None or (our_value is not None and column.level(our_value, best_value)):
            continue
        first = _named(rows, column, best_value)
        if our_value is None:
            told.append(f"- {column.title}: {first}; ours was not measured.")
        else:
            share = f"{our_value / best_value:.3f} of it"
            told.append(f"- {column.title}: {first}; our best is {_named(ours, column, our_value)}, {share}.")
    broken = [row.side.title for row in ours if row.resumes is False]
    if broken:
        told.append(f"- resuming: not to the same bits: {', '.join(broken)}.")
    if all(best(ours, column) is None for column in COLUMNS):
        return ["Nothing of ours was measured."]
    if not told:
        return ["In every column that was measured the best number is one of ours."]
    return ["Where ours is not the best:", "", *told]


def _named(rows: Sequence[Row], column: Column, value: float) -> str:
    title = next(row.side.title for row in rows if column.value(row) == value)
    return f"{title.removeprefix('ours, ')} with {column.shown(value)}"


def _about(lines: Sequence[Line]) -> list[str]:
    """What was done, on what, with what; several values where lines differ."""
    work = lines[0]["work"]
    said = (
        f"{work['model']}, {work['steps']} steps of {work['batch_size']} x {work['accumulation']} examples of at most "
        f"{work['max_length']} tokens from {work['data']}, seed {work['seed']}; "
        f"loss on {work['eval_examples']} held-out examples"
    )
    start = [line["eval_loss"] for line in lines if line["kind"] == "start" and "eval_loss" in line]
    said += f", {start[0]:.4f} before training." if start else "."
    turns = {line["turn"] for line in lines if line["kind"] == "timing" and line["turn"] is not None}
    return [
        said,
        f"Turns: {len(turns)}. Dates: {_all(lines, 'date')}. Machine: {_all(lines, 'machine')}, threads: "
        f"{_all(lines, 'threads')}. Commit: {_all(lines, 'commit')}.",
        "Versions: "
        + " / ".join(_distinct(", ".join(f"{k} {v}" for k, v in line["versions"].items()) for line in lines)),
    ]


def _all(lines: Iterable[Line], key: str) -> str:
    return " / ".join(_distinct(str(line[key]) for line in lines if line.get(key) is not None)) or "-"


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
