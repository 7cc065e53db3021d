"""`metrics.jsonl`: appended line by line, cut back on resume; `trainer_state.json` in Hugging Face's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState

from sophia_galore.records.metrics import read_metrics
from sophia_galore.train.metrics import MetricsLog
from sophia_galore.train.progress import trainer_state


def train_line(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / 4,
        "loss": 3.0 / step,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "tokens": 100,
        "tokens_per_second": 7.5,
        "allocated_bytes": 10,
        "reserved_bytes": 20,
        "process_bytes": 30,
    }


def eval_line(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": step / 4, "eval_loss": 2.5}


LINES = [eval_line(0), train_line(1), train_line(2), eval_line(2), train_line(3), train_line(4), eval_line(4)]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    log = MetricsLog(tmp_path / "metrics.jsonl", None)
    for line in LINES:
        log.add(line)
    log.close()
    return tmp_path / "metrics.jsonl"


def test_each_line_is_on_its_way_before_the_next_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", None)
    for number, line in enumerate(LINES, 1):
        log.add(line)
        assert lines_of(tmp_path / "metrics.jsonl") == LINES[:number]
    log.close()
    assert log.records == LINES


def test_a_new_run_begins_an_empty_file(path: Path) -> None:
    MetricsLog(path, None).close()
    assert path.read_text() == ""


@pytest.mark.parametrize(("up_to_step", "kept"), [(0, 1), (1, 2), (2, 4), (3, 5), (4, 7), (9, 7)])
def test_resuming_drops_what_will_be_written_again(path: Path, up_to_step: int, kept: int) -> None:
    log = MetricsLog(path, up_to_step)
    assert log.records == lines_of(path) == LINES[:kept]
    log.add(train_line(99))
    log.close()
    assert lines_of(path) == [*LINES[:kept], train_line(99)]
    assert not list(path.parent.glob("*.tmp"))


@pytest.mark.parametrize(
    "damage", [b"\xff\xfe", b"[1, 2]", b"null", b'{"loss": 1.0}', b'{"step": "2"}', b'{"step": 1, "lo']
)
def test_a_damaged_line_costs_that_line_alone_and_is_said(path: Path, damage: bytes) -> None:
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]) + b"\n")
    said: list[str] = []
    log = MetricsLog(path, 4, said.append)
    log.close()
    assert log.records == [LINES[0], *LINES[2:]] == lines_of(path)
    assert said == [f"Line 2 of {path} is damaged, so the records of the run will lack it."]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_half_written_last_line_is_dropped(path: Path, cut: int) -> None:
    text = path.read_text()
    path.write_text(text[:-cut])
    log = MetricsLog(path, 4)
    expected = LINES if cut == 1 else LINES[:-1]  # one character less is only the line's end
    assert log.records == expected
    log.add(eval_line(5))
    log.close()
    assert lines_of(path) == [*expected, eval_line(5)]


def test_resuming_without_a_file_starts_one(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 3)
    log.add(train_line(4))
    log.close()
    assert lines_of(tmp_path / "metrics.jsonl") == [train_line(4)]


def test_the_reports_can_read_it(path: Path) -> None:
    metrics = read_metrics(path.parent)
    assert [line.step for line in metrics.train] == [1, 2, 3, 4]
    assert [line.step for line in metrics.eval] == [0, 2, 4]
    assert metrics.train[0].allocated_bytes == 10


def test_trainer_state_is_one_that_transformers_reads(path: Path, tmp_path: Path) -> None:
    log = MetricsLog(path, 4)
    log.close()
    state = trainer_state(log.records, [], None, None, step=4, num_steps=8, steps_per_epoch=4).to_json()
    assert (state["global_step"], state["epoch"], state["max_steps"], state["num_train_epochs"]) == (4, 1.0, 8, 2.0)
    assert [entry["step"] for entry in state["log_history"]] == [line["step"] for line in LINES]
    assert state["log_history"][0] == eval_line(0)
    assert state["log_history"][1] == {
        key: train_line(1)[key] for key in ("step", "epoch", "loss", "learning_rate", "grad_norm")
    }
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    read = TrainerState.load_from_json(str(tmp_path / "trainer_state.json"))
    assert (read.global_step, read.max_steps, len(read.log_history)) == (4, 8, len(LINES))
