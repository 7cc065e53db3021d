"""The bar of memory: exact text for small cases; never too wide, never without a category."""

from __future__ import annotations

import io
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sophia_galore.cli.bars import LEGEND_WIDTH, memory_bar, segments
from sophia_galore.cli.train import prediction_line
from sophia_galore.records.memory import MemoryReport

MIB = 2**20
CATEGORIES = {"activations": 250 * MIB, "weights": 500 * MIB, "other": MIB, "logits": 0, "optimizer state": 125 * MIB}


def shown(categories: dict[str, int], limit_bytes: int | None, width: int, **look: Any) -> list[str]:
    console = Console(file=io.StringIO(), highlight=False, soft_wrap=True, **({"width": 80} | look))
    console.print(memory_bar(categories, limit_bytes=limit_bytes, width=width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def styled(limit_bytes: int | None, width: int = 20, **look: Any) -> str:
    terminal = {"force_terminal": True, "color_system": "truecolor", "legacy_windows": False, "no_color": False}
    return "\n".join(shown(CATEGORIES, limit_bytes, width, **(terminal | look)))


def test_below_a_limit_the_rest_is_free() -> None:
    assert shown(CATEGORIES, 1000 * MIB, 40) == [
        "WWWWWWWWWWWWWWWWWWWWSSSSSAAAAAAAAAA.....",
        "W weights          500 MiB   50 %",
        "A activations      250 MiB   25 %",
        "S optimizer state  125 MiB   12 %",
        "O other              1 MiB  < 1 %",
        ". free             124 MiB   12 % of 1000 MiB",
    ]


def test_above_a_limit_the_end_is_too_much() -> None:
    assert shown(CATEGORIES, 800 * MIB, 40) == [
        "WWWWWWWWWWWWWWWWWWWWWWWSSSSSSAAAAAAAA!!!",
        "W weights          500 MiB   62 %",
        "A activations      250 MiB   31 %",
        "S optimizer state  125 MiB   16 %",
        "O other              1 MiB  < 1 %",
        "! over the limit    76 MiB   10 % of 800 MiB",
    ]


@pytest.mark.parametrize("limit_bytes", [None, 0])
def test_without_a_limit_the_bar_is_the_total(limit_bytes: int | None) -> None:
    assert shown({"weights": 3 * MIB, "gradients": MIB}, limit_bytes, 8) == [
        "WWWWWWGG",
        "W weights    3 MiB  75 %",
        "G gradients  1 MiB  25 %",
    ]


def test_a_byte_too_much_is_seen_and_nothing_is_shown_of_nothing() -> None:
    assert shown({"weights": 1000 * MIB + 1}, 1000 * MIB, 10)[0] == "WWWWWWWWW!"
    assert shown({}, None, 10) == shown({"weights": 0}, None, 10) == []
    assert shown({}, MIB, 4) == ["....", ". free  1 MiB  100 % of 1 MiB"]


def test_on_a_terminal_the_bar_is_of_coloured_blocks() -> None:
    blue, red, dim = "\x1b[38;2;0;114;178m", "\x1b[1;31m", "\x1b[2m"
    below, above = styled(1000 * MIB), styled(800 * MIB)
    assert f"{blue}{'█' * 10}\x1b[0m" in below and f"{dim}░░\x1b[0m" in below
    assert f"{blue}█\x1b[0m weights" in below and f"{dim}░\x1b[0m {dim}free" in below
    assert f"{red}██\x1b[0m" in above and f"{red}over the limit" in above


@pytest.mark.parametrize(
    "look", [{"color_system": "standard"}, {"color_system": None}, {"no_color": True}, {"legacy_windows": True}]
)
def test_what_can_t_show_coloured_blocks_gets_letters(look: dict[str, Any]) -> None:
    assert styled(1000 * MIB, **look).isascii()
    assert "W" * 10 in styled(1000 * MIB, **look)


def test_an_encoding_without_blocks_gets_letters() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    console = Console(file=file, force_terminal=True, color_system="truecolor", legacy_windows=False)
    console.print(memory_bar(CATEGORIES, limit_bytes=None, width=20))
    file.flush()
    assert isinstance(file.buffer, io.BytesIO) and b"WWWW" in file.buffer.getvalue()


NAMES = st.one_of(st.sampled_from(list(CATEGORIES)), st.from_regex(r"[a-z_ ]{0,98}[a-z]", fullmatch=True))
SIZES = st.dictionaries(NAMES, st.integers(0, 2**50), max_size=9)
LIMITS = st.one_of(st.none(), st.integers(1, 2**50))


@given(SIZES, LIMITS, st.integers(1, 120), st.integers(1, 120), st.booleans())
def test_no_line_is_too_wide_and_no_category_is_left_out(
    sizes: dict[str, int], limit_bytes: int | None, width: int, columns: int, terminal: bool
) -> None:
    look = {"force_terminal": terminal, "color_system": "truecolor", "legacy_windows": False, "no_color": False}
    console = Console(file=io.StringIO(), highlight=False, soft_wrap=True, width=columns, **look)  # type: ignore[arg-type]
    bar = memory_bar(sizes, limit_bytes=limit_bytes, width=width)
    lines = "".join(segment.text for segment in console.render(bar)).splitlines()
    if not lines:
        assert limit_bytes is None and not any(sizes.values())
        return
    assert len(lines[0]) == min(width, columns)
    assert all(len(line) <= LEGEND_WIDTH for line in lines[1:])
    used = sorted((size for size in sizes.values() if size), reverse=True)
    assert len(lines) == 1 + len(used) + (limit_bytes is not None)
    for name, size in sizes.items():
        assert any(line[2:].startswith(name[:20]) for line in lines[1:]) or not size


@given(st.lists(st.integers(0, 2**60), min_size=1, max_size=9), st.integers(0, 2**60), st.integers(1, 200))
def test_segments_are_their_share_within_a_cell(sizes: list[int], free_bytes: int, width: int) -> None:
    whole = max(sum(sizes) + free_bytes, 1)
    cells = segments({str(index): size for index, size in enumerate(sizes)}, whole, width)
    for index, size in enumerate(sizes):
        assert cells[str(index)] >= 0
        assert abs(cells[str(index)] * whole - size * width) <= whole
    for count, size in zip(accumulate(cells.values()), accumulate(sizes), strict=True):
        # In halves of a cell, so that no number is rounded.
        assert 2 * abs(count * whole - size * width) <= whole
    assert sum(cells.values()) <= width


@pytest.mark.parametrize(
    ("ratio", "words", "style"),
    [
        (0.98, "Predicted: 1.02 GiB, 0.98 of what was measured.", ""),
        (1.05, "Predicted: 1.02 GiB, 1.05 of what was measured.", ""),
        (None, "Predicted: 1.02 GiB.", ""),
        (
            0.9,
            "Predicted: 1.02 GiB, 0.90 of what was measured: "
            "more than 5% too low, so do not rely on it near the limit.",
            "bold yellow",
        ),
        (
            1.2,
            "Predicted: 1.02 GiB, 1.20 of what was measured: "
            "more than 5% too high, so a plan may refuse what would fit.",
            "bold yellow",
        ),
    ],
)
def test_the_prediction_is_judged(ratio: float | None, words: str, style: str) -> None:
    line = prediction_line(MemoryReport(predicted_peak_bytes=int(1.02 * 2**30), predicted_ratio=ratio))
    assert line is not None and (line.plain, line.style) == (words, style)


def test_without_a_prediction_nothing_is_said() -> None:
    assert prediction_line(MemoryReport()) is None


def test_what_was_asked_is_not_held_against_what_had_to_be_made_smaller() -> None:
    line = prediction_line(MemoryReport(predicted_peak_bytes=2**30, adaptations=("Memory ran out.",)))
    assert line is not None
    assert line.plain == "Predicted: 1.00 GiB for what was asked; memory ran out, so less was taken at once."
