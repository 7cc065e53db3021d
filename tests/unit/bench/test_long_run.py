"""The long runs: which is run next, what is divided how, and one contender of each kind in small."""

from __future__ import annotations

import argparse
import json
import signal
from pathlib import Path
from typing import Any

import pytest

import long_run
import ours
from long_run import CONTENDERS, Design, Job, best_rate, carry_out, next_job, prepare, table
from long_tasks import TASKS, divided, number_in_words, sums
from tiny import write_tiny_data, write_tiny_model

RATES_OF = {"adamw": (1e-4, 2e-4, 4e-4), "galore": (8e-4, 1.6e-3, 3.2e-3)}


def line(job: Job, loss: float) -> dict[str, Any]:
    return {**vars(job), "validation_loss": loss, "test_loss": loss, "tokens_per_second": 100.0, **PEAK}


PEAK = {"peak_process_bytes": 2**30}


def carried_out(names: tuple[str, ...], steps: int, rate_steps: int) -> tuple[list[Job], list[dict[str, Any]]]:
    """All runs of a study in which 2e-4 and 3.2e-3 are the best rates."""
    lines: list[dict[str, Any]] = []
    order: list[Job] = []
    while (job := next_job(lines, Design("answers", names, (0, 1), steps, rate_steps))) is not None:
        order.append(job)
        lines.append(line(job, 2.0 - (job.rate == 2e-4) - (job.rate == 3.2e-3) + job.seed))
    return order, lines


def test_rates_first_then_the_best_one_with_each_seed() -> None:
    order, lines = carried_out(("adamw", "galore"), 300, 100)
    assert order[:6] == [Job(name, rate, 0, 100) for name, rates in RATES_OF.items() for rate in rates]
    assert order[6:] == [
        *[Job("adamw", 2e-4, 0, 300), Job("galore", 3.2e-3, 0, 300)],
        *[Job("adamw", 2e-4, 1, 300), Job("galore", 3.2e-3, 1, 300)],
    ]
    assert "| adamw | 0.0001, 0.0002, 0.0004 | 0.0002 | 2 | 1.5000 ± 0.5000 |" in table(lines)


def test_with_as_many_steps_the_runs_that_choose_a_rate_count() -> None:
    order, lines = carried_out(("adamw",), 300, 300)
    assert order == [*[Job("adamw", rate, 0, 300) for rate in RATES_OF["adamw"]], Job("adamw", 2e-4, 1, 300)]
    assert "| 0.0002 | 2 | 1.5000 ± 0.5000 |" in table(lines)


def test_a_contender_takes_the_best_rate_of_another() -> None:
    order, lines = carried_out(("galore", "galore-int8"), 300, 100)
    assert order[3:] == [Job(name, 3.2e-3, seed, 300) for seed in (0, 1) for name in ("galore", "galore-int8")]
    assert "| galore-int8 | 0.0008, 0.0016, 0.0032 | 0.0032 | 2 |" in table(lines)
    failed = [{**one, "failed": "it did"} for one in lines if one["steps"] == 100]
    assert next_job(failed, Design("answers", ("galore", "galore-int8"), (0, 1), 300, 100)) is None


def test_a_rate_that_failed_is_never_the_best() -> None:
    failed = {"contender": "adamw", "rate": 1e-4, "seed": 0, "steps": 100, "failed": "it did"}
    lines = [failed, line(Job("adamw", 2e-4, 0, 100), 9.0)]
    assert best_rate(lines, "adamw", 100) == 2e-4 and best_rate(lines[:1], "adamw", 100) is None


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "zero"), (13, "thirteen"), (40, "forty"), (58, "fifty-eight"), (100, "one hundred")],
)
def test_numbers_in_words(number: int, words: str) -> None:
    assert number_in_words(number) == words
    assert number_in_words(107) == "one hundred and seven"


def test_sums_are_right_and_each_is_in_one_part() -> None:
    everything = sums()
    values = {number_in_words(number): number for number in range(200)}
    for record in everything:
        *_, one, sign, other = record["instruction"].removesuffix("?").split(" ")
        result = values[one] + values[other] * (1 if sign == "plus" else -1)
        assert values[record["output"]] == result
    parts = divided(everything)
    questions = [record["instruction"] for part in parts.values() for record in part]
    assert len(questions) == len({*questions}) == len(everything) == 10_000 + 5_050
    assert len(parts["test"]) == len(parts["validation"]) == len(everything) // 10


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What the command line would say, with a tiny model and little data."""

    def write(folder: Path) -> None:
        records = json.loads(write_tiny_data(folder / "all.json", 60).read_text())
        for part, chosen in divided(records).items():
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chosen))

    monkeypatch.setitem(TASKS, "sums", long_run.TASKS["sums"].__class__(write, length=64, exact=True))
    return argparse.Namespace(
        task="sums",
        folder=tmp_path,
        model=write_tiny_model(tmp_path / "model"),
        **{"steps": 4, "batch_size": 2, "accumulation": 1, "save_every": 2, "eval_examples": 4, "questions": 3},
        **{"rank": 8, "vocab_size": 300, "width": 32, "layers": 2},
    )


@pytest.mark.parametrize("name", ["adamw", "galore-int8", "fira", "lora-16"])
def test_a_run_in_small_is_measured_and_goes_on_after_it_was_ended(
    name: str, asked: argparse.Namespace, tmp_path: Path
) -> None:
    if CONTENDERS[name].side.startswith("lora"):
        pytest.importorskip("peft")
    prepare(asked)
    job = Job(name, 1e-3, 0, 4)
    whole = carry_out(job, asked)
    assert whole["test_loss"] > 0 and 0 <= whole["exact_match"] <= 1 and whole["questions"] == 3
    again = carry_out(job, asked)  # goes on from its last checkpoint
    assert {key: again[key] for key in ("validation_loss", "test_loss")} == {
        key: whole[key] for key in ("validation_loss", "test_loss")
    }


def test_a_run_that_is_stopped_has_no_result_and_goes_on(
    asked: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(asked)
    stepped = ours._Times.stepped

    def stops(self: ours._Times, record: dict[str, Any], **more: Any) -> None:
        stepped(self, record, **more)
        if record["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    job = Job("galore", 1e-3, 0, 4)
    with monkeypatch.context() as patch:
        patch.setattr(ours._Times, "stepped", stops)
        with pytest.raises(KeyboardInterrupt, match="stopped at step 3"):
            carry_out(job, asked)
    assert carry_out(job, asked)["test_loss"] > 0


@pytest.mark.thorough
def test_pre_training_in_small(tmp_path: Path, asked: argparse.Namespace) -> None:
    asked.task = "text"
    prepare(asked)
    found = carry_out(Job("galore", 1e-2, 0, 4), asked)
    assert 0 < found["validation_loss"] < 8
