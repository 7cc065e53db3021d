"""Sizes: what is understood, what is refused and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sophia_galore.config import load_config
from sophia_galore.config.schema import MemoryConfig
from sophia_galore.config.size import LEAST_BYTES, bytes_in_words, parse_size
from sophia_galore.errors import ArgumentError, ConfigError

UNDERSTOOD: list[tuple[str | int, int]] = [
    (2**20, 2**20),
    ("1048576", 2**20),
    ("1048576 bytes", 2**20),
    ("4GiB", 4 * 2**30),
    (" 4 GiB ", 4 * 2**30),
    ("4gib", 4 * 2**30),
    ("3.5GiB", 7 * 2**29),
    ("512MiB", 2**29),
    ("2048KiB", 2**21),
    ("1TiB", 2**40),
    ("4GB", 4 * 10**9),
    ("3.3GB", 33 * 10**8),
    ("512mb", 512 * 10**6),
    ("2000KB", 2 * 10**6),
    ("1TB", 10**12),
    ("4G", 4 * 2**30),
    ("4g", 4 * 2**30),
    ("512M", 2**29),
    ("2048k", 2**21),
    ("1T", 2**40),
    # A fraction of a byte is left out: 3.3 x 2^30 = 3543348019.2.
    ("3.3GiB", 3543348019),
]

REFUSED: list[tuple[object, str, str]] = [
    (0, "The size is 0 bytes", "The least is 1MiB"),
    ("0GiB", "The size is 0 bytes", "The least is 1MiB"),
    (1, "The size is 1 byte", "Write a unit, such as 4GiB."),
    (4, "The size is 4 bytes", "Write a unit, such as 4GiB."),
    (2**20 - 1, "The size is 1048575 bytes", "The least is 1MiB"),
    ("1023KiB", "The size is 1047552 bytes", "The least is 1MiB"),
    (-1, "no size: -1", "such as 4GiB"),
    ("-4GiB", 'no size: "-4GiB"', "such as 4GiB"),
    ("4 apples", 'no size: "4 apples"', "such as 4GiB"),
    ("", 'no size: ""', "such as 4GiB"),
    ("GiB", "no size", "such as 4GiB"),
    ("1,5GiB", "no size", "such as 4GiB"),
    ("1048576.5", "no size", "such as 4GiB"),
    ("nan", "no size", "such as 4GiB"),
    ("inf", "no size", "such as 4GiB"),
    (float("nan"), "no size", "such as 4GiB"),
    (float("inf"), "no size", "such as 4GiB"),
    (True, "no size: true", "such as 4GiB"),
    (None, "no size: null", "such as 4GiB"),
    ([4], "no size: [4]", "such as 4GiB"),
    (2**63, "more than any machine has", "such as 4GiB"),
    (10**4000, "more than any machine has", "such as 4GiB"),
    ("9" * 5000, "no size", "such as 4GiB"),
    ("99999999999999TiB", "more than any machine has", "such as 4GiB"),
]


@pytest.mark.parametrize(("text", "num_bytes"), UNDERSTOOD, ids=str)
def test_a_size_is_understood(text: str | int, num_bytes: int) -> None:
    assert parse_size(text) == parse_size(text, zero=True) == num_bytes


@pytest.mark.parametrize(("text", "cause", "remedy"), REFUSED, ids=range(len(REFUSED)))
def test_another_one_is_refused(text: object, cause: str, remedy: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parse_size(text)  # type: ignore[arg-type]
    assert cause in caught.value.cause and remedy in caught.value.remedy
    assert len(caught.value.cause) < 120


def test_zero_is_a_size_where_it_is_asked_for() -> None:
    assert parse_size(0, zero=True) == parse_size("0", zero=True) == parse_size("0 GiB", zero=True) == 0
    with pytest.raises(ArgumentError, match="or 0"):
        parse_size(5, zero=True)


UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "g": 2**30, "TiB": 2**40, "kb": 10**3, "MB": 10**6, "Gb": 10**9}


@given(st.integers(LEAST_BYTES, 2**22), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " ", "  "]))
def test_a_number_with_a_unit_is_their_product(number: int, unit: str, between: str) -> None:
    num_bytes = parse_size(f"{number}{between}{unit}")
    assert num_bytes == number * UNITS[unit]
    assert parse_size(num_bytes) == parse_size(str(num_bytes)) == num_bytes


@given(st.integers(LEAST_BYTES, 2**50))
def test_words_are_close_to_the_size_that_they_say(num_bytes: int) -> None:
    # Whole MiB above 1 MiB, hundredths of a GiB above 1 GiB: at most half of 1 MiB, or 2^30 / 200.
    assert abs(parse_size(bytes_in_words(num_bytes)) - num_bytes) <= max(2**19, 2**30 / 200) + 1


@given(st.one_of(st.text(), st.integers(), st.floats(), st.from_regex(r"[0-9.]{0,9} ?[kKmMgGtT]?i?[bB]?")))
def test_whatever_is_written_is_a_size_or_refused(text: object) -> None:
    try:
        assert LEAST_BYTES <= parse_size(text) < 2**63  # type: ignore[arg-type]
    except ArgumentError as error:
        assert error.cause.startswith("The size is ") and error.remedy


def test_the_keys_take_sizes_and_name_themselves(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("memory:\n  limit: 4GiB\n  reserve: 300MiB\n")
    memory = load_config(path).memory
    assert (memory.limit, memory.reserve, memory.on_oom) == (2**32, 300 * 2**20, "stop")
    assert load_config(path, ["memory.limit=4e9", "memory.reserve=0"]).memory == MemoryConfig(limit="4GB", reserve=0)
    assert load_config(path, ["memory.limit=null"]).memory.limit is None
    path.write_text("memory:\n  limit: 4\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.cause.endswith("run.yaml:2: memory.limit is 4 bytes")
    assert caught.value.remedy == "Write a unit, such as 4GiB. Left out, it is null."
