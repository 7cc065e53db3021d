"""The table of bench/peers.py says what its lines say, and where ours is behind."""

from __future__ import annotations

from typing import Any

from peers_table import COLUMNS, rows_of, table

WORK = {
    "model": "tiny",
    "data": "data.json",
    "steps": 3,
    "batch_size": 3,
    "accumulation": 2,
    "max_length": 96,
    "eval_examples": 48,
    "seed": 0,
}
ABOUT: dict[str, Any] = {
    "date": "2026-01-02",
    "machine": "a machine",
    "threads": 2,
    "commit": "abc",
    "command": "python bench/peers.py",
    "versions": {"python": "3.11", "torch": "2.13"},
    "work": WORK,
}


def line(kind: str, side: str, rate: float = 1e-3, turn: int | None = None, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "side": side, "rate": rate, "turn": turn, **more, **ABOUT}


def timing(
    side: str, speed: float, turn: int = 0, *, peak: int = 2**30, first: float = 10.0, **more: Any
) -> dict[str, Any]:
    """Two steps at a speed after a slow first one, 100 tokens each."""
    steps = [[100, first], [100, 100 / speed], [100, 100 / speed]]
    return line("timing", side, turn=turn, steps=steps, peak_process_bytes=peak, **more)


LINES = [
    line("start", "trainer-adamw", eval_loss=3.5),
    timing("trainer-adamw", 50.0, 0, eval_loss=2.0),
    timing("ours-galore", 60.0, 0, eval_loss=2.1, peak=2**29),
    timing("trainer-adamw", 40.0, 1),
    timing("ours-galore", 44.0, 1, peak=2**29),
    line("memory", "trainer-adamw", peak_tracked_bytes=800 * 2**20),
    line("memory", "ours-galore", peak_tracked_bytes=200 * 2**20),
    line("resume", "trainer-adamw", same_bits=True),
    line("resume", "ours-galore", same_bits=True),
]


def cells(text: str, title: str) -> list[str]:
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in row.strip("|").split(" | ")]


def test_ratios_are_made_within_a_turn() -> None:
    title, rate, speed, ratio, *_ = cells(table(LINES), "ours, GaLore")
    assert (title, rate) == ("ours, GaLore", "0.001")
    # 60 and 44 against 50 and 40: the medians 52 and 45 would give 1.16.
    assert speed == "**52.0**"
    assert ratio == "1.15 (1.10 to 1.20)"


def test_the_times_of_a_disturbed_turn_do_not_count() -> None:
    (disturbed,) = [line for line in LINES if line["side"] == "ours-galore" and line["turn"] == 1]
    lines = [line if line is not disturbed else line | {"disturbed": True} for line in LINES]
    _, _, speed, ratio, *rest = cells(table(lines), "ours, GaLore")
    assert (speed, ratio) == ("**60.0**", "1.20")
    assert "turn 1 was disturbed: its times do not count" in rest[-1]
    # Its memory does.
    assert next(row for row in rows_of(lines) if row.key == "ours-galore").peaks.keys() == {0, 1}


def test_the_first_step_counts_in_the_second_speed_only() -> None:
    slow = [line for line in LINES if line["side"] != "ours-galore"]
    slow.append(timing("ours-galore", 50.0, first=96.0))
    row = next(row for row in rows_of(slow) if row.key == "ours-galore")
    assert row.speeds == {0: 50.0}
    assert row.whole_speeds == {0: 300 / 100}


def test_the_best_of_each_column_is_marked_and_where_ours_is_behind_is_said() -> None:
    text = table(LINES)
    base, ours = cells(text, "Trainer, AdamW"), cells(text, "ours, GaLore")
    assert [cell.startswith("**") for cell in base] == [cell == "**2.0000**" or cell == "**yes**" for cell in base]
    assert {"**200**", "**512**", "2.1000", "**yes**"} <= set(ours)
    assert "3.5000 before training" in text
    told = text.partition("Where ours is not the best:\n")[2].split("\n")[1:]
    # Eval loss alone: 2.1 against 2.0.
    assert told == ["- eval loss: Trainer, AdamW with 2.0000; our best is GaLore with 2.1000, 1.050 of it."]


def test_nothing_is_said_to_be_behind_that_is_level() -> None:
    # By less than what is written, the Trainer is better.
    ours = {"eval_loss": 2.00001}
    level = [one | (ours if one["side"] == "ours-galore" and "eval_loss" in one else {}) for one in LINES]
    text = table(level)
    assert "In every column that was measured the best number is one of ours." in text
    assert "**2.0000**" in cells(text, "Trainer, AdamW") and "**2.0000**" in cells(text, "ours, GaLore")


def test_every_column_can_be_lost() -> None:
    """The lead is computed: with the sides exchanged, all columns are named."""
    names = {"trainer-adamw": "ours-galore", "ours-galore": "trainer-adamw"}
    turned = [one | {"side": names[one["side"]]} for one in LINES if "eval_loss" not in one or one["kind"] == "timing"]
    turned = [one | ({"eval_loss": 4.1 - one["eval_loss"]} if "eval_loss" in one else {}) for one in turned]
    told = table(turned).partition("Where ours is not the best:")[2]
    assert [column.title for column in COLUMNS if f"- {column.title}:" in told] == [
        "tokens/s",
        "tokens/s with first step",
        "peak tensors MiB",
        "peak resident MiB",
        "eval loss",
    ]


def test_resuming_to_other_bits_of_ours_is_said() -> None:
    broken = [
        one | {"same_bits": False, "reason": "other weights"} if one["kind"] == "resume" else one for one in LINES
    ]
    assert "- resuming: not to the same bits: ours, GaLore." in table(broken)


def test_the_best_rate_counts_and_all_are_named() -> None:
    lines = [*LINES, line("timing", "ours-galore", 2e-3, steps=[[1, 1.0]] * 3, peak_process_bytes=1, eval_loss=1.5)]
    ours = cells(table(lines), "ours, GaLore")
    assert ours[1] == "0.002 (0.001, 0.002)"
    assert "**1.5000**" in ours
    assert ours[2] == "**52.0**"  # the other rate was not timed in turns


def test_a_side_that_failed_says_why_in_its_row() -> None:
    failed = line("timing", "trainer-galore", turn=0, failed="ImportError: You need to install `galore_torch` | first")
    row = cells(table([*LINES, failed]), "Trainer, galore_adamw")
    assert set(row[1:-1]) == {"-"}
    assert row[-1] == "could not run: ImportError: You need to install `galore_torch` \\| first"


def test_a_side_that_refused_the_setting_and_does_not_resume_says_both() -> None:
    key, why = "trainer-galore-layerwise", "ValueError: does not support gradient accumulation!"
    lines = [
        timing(key, 30.0, eval_loss=2.2, instead_of=why),
        line("memory", key, peak_tracked_bytes=2**29, instead_of=why),
        line("resume", key, same_bits=False, reason="it ends with other weights", instead_of=why),
    ]
    row = cells(table([*LINES, *lines]), "Trainer, galore_adamw_layerwise")
    assert row[-2] == "no"
    assert row[-1] == (
        f"the effective batch as one padded micro-batch, since: {why}; resuming: it ends with other weights"
    )


def test_a_part_that_failed_leaves_the_rest_of_the_row() -> None:
    lines = [timing("trainer-apollo", 20.0), line("memory", "trainer-apollo", failed="RuntimeError: no")]
    row = cells(table([*LINES, *lines]), "Trainer, apollo_adamw")
    assert row[2] == "20.0"
    assert row[-1] == "memory failed: RuntimeError: no"
