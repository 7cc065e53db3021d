"""Records: read as written, tolerant of a kill, strict about everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sophia_galore.errors import UserError
from sophia_galore.records.memory import MemoryReport, Moment
from sophia_galore.records.metrics import Evaluation, read_metrics

TRAIN: dict[str, Any] = {
    "step": 1,
    "epoch": 0.1,
    "loss": 3.5,
    "learning_rate": 1e-3,
    "grad_norm": 1.5,
    "tokens": 100,
    "tokens_per_second": 50.5,
    "allocated_bytes": 1000,
    "reserved_bytes": None,
}


def train(step: int, loss: float = 3.0) -> str:
    return json.dumps(TRAIN | {"step": step, "loss": loss})


def evaluation(step: int, loss: float = 2.0) -> str:
    return json.dumps({"step": step, "epoch": step / 10, "eval_loss": loss})


def write(folder: Path, *lines: str, end: str = "\n") -> Path:
    (folder / "metrics.jsonl").write_text("\n".join(lines) + end, encoding="utf-8")
    return folder


def test_every_field_arrives(tmp_path: Path) -> None:
    metrics = read_metrics(write(tmp_path, evaluation(0), json.dumps(TRAIN), evaluation(1)))
    (line,) = metrics.train
    assert {name: getattr(line, name) for name in TRAIN} == TRAIN
    assert metrics.eval == (Evaluation(step=0, epoch=0, loss=2.0), Evaluation(step=1, epoch=0.1, loss=2.0))


def test_an_empty_file_is_a_run_without_steps(tmp_path: Path) -> None:
    assert read_metrics(write(tmp_path, "")).train == ()


@pytest.mark.parametrize("cut", range(1, len(train(2)), 7))
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_a_half_written_last_line_is_left_out(tmp_path: Path, cut: int, end: str) -> None:
    metrics = read_metrics(write(tmp_path, train(1), train(2)[:cut], end=end))
    assert [line.step for line in metrics.train] == [1]


def test_a_last_line_cut_inside_a_character_or_full_of_zeros_is_left_out(tmp_path: Path) -> None:
    for tail in (b'{"step": 2, "x": "\xc3', b"\x00" * 40):
        (tmp_path / "metrics.jsonl").write_bytes(train(1).encode() + b"\n" + tail)
        assert len(read_metrics(tmp_path).train) == 1


@pytest.mark.parametrize("broken", ['{"step": 2', "hello", "[1, 2]", "3"])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, broken: str) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: .*no JSON object") as caught:
        read_metrics(write(tmp_path, train(1), broken, train(3)))
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"step": 1}, "'loss' is missing"),
        ({"loss": 1.0}, "'step' is missing"),
        ({"step": 1, "loss": None}, "'loss' is missing"),
        ({"step": 1, "loss": "low"}, "'loss' is 'low', not a number"),
        ({"step": True, "loss": 1.0}, "'step' is True"),
        ({"step": 1.5, "loss": 1.0}, "'step' is 1.5"),
        ({"step": float("nan"), "loss": 1.0}, "'step' is nan"),
        ({"step": 1, "eval_loss": []}, "'eval_loss'"),
        ({"step": 1, "loss": 1.0, "allocated_bytes": "1 GB"}, "'allocated_bytes'"),
    ],
)
def test_a_wrong_field_is_named_with_its_line(tmp_path: Path, record: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_metrics(write(tmp_path, train(1), json.dumps(record)))
    assert "metrics.jsonl:2" in str(caught.value)
    assert words in str(caught.value)


def test_a_run_without_records_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl") as caught:
        read_metrics(tmp_path)
    assert "output_dir" in caught.value.remedy


def test_of_repeated_steps_after_a_resume_the_later_count(tmp_path: Path) -> None:
    # Killed after step 4, resumed from the checkpoint of step 2: the evaluation at 4 was of other weights.
    before = [evaluation(0), train(1), train(2), evaluation(2, 2.5), train(3, 9.0), train(4, 9.0), evaluation(4, 9.0)]
    metrics = read_metrics(write(tmp_path, *before, evaluation(2, 2.4), train(3, 1.0)))
    assert [(line.step, line.loss) for line in metrics.train] == [(1, 3.0), (2, 3.0), (3, 1.0)]
    assert [(line.step, line.loss) for line in metrics.eval] == [(0, 2.0), (2, 2.4)]


def test_the_memory_report_arrives(tmp_path: Path) -> None:
    record = {
        "device": "cpu",
        "measured_by": "storages",
        "peak_allocated_bytes": 5,
        "peak_reserved_bytes": None,
        "peak_process_bytes": 7,
        "phases": {"forward": 3, "backward": 5, "export": None},
        "categories": {"weights": 4},
        "steps": [{"step": 1, "allocated_bytes": 5, "reserved_bytes": None, "process_bytes": 7}],
    }
    (tmp_path / "memory_report.json").write_text(json.dumps(record))
    report = MemoryReport.read(tmp_path / "memory_report.json")
    assert (report.peak_allocated_bytes, report.peak_reserved_bytes, report.peak_process_bytes) == (5, None, 7)
    assert report.phases == {"forward": 3, "backward": 5}
    assert report.steps[0].process_bytes == 7


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"phases": 3}', '{"phases": {"a": "b"}}', '{"steps": [1]}', '{"steps": 3}']
)
def test_a_broken_memory_report_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "memory_report.json").write_text(text)
    with pytest.raises(UserError, match="memory_report"):
        MemoryReport.read(tmp_path / "memory_report.json")


def test_a_missing_memory_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="memory_report"):
        MemoryReport.read(tmp_path / "memory_report.json")


POINT = {"phase": "forward", "categories": {"weights": 1}}


def test_the_report_s_new_fields_arrive(tmp_path: Path) -> None:
    points = [{"time_s": 0.0, **POINT}, {"time_s": 0.1, "phase": "head", "categories": {"weights": 1, "logits": 2}}]
    timeline = {"step": 2, "points": points}
    record = {"limit_bytes": 9, "predicted_peak_bytes": 7, "predicted_ratio": 0.98, "timeline": timeline}
    (tmp_path / "memory_report.json").write_text(json.dumps(record))
    report = MemoryReport.read(tmp_path / "memory_report.json")
    assert (report.limit_bytes, report.predicted_peak_bytes, report.predicted_ratio) == (9, 7, 0.98)
    assert report.timeline is not None and report.timeline.step == 2 and report.timeline.timed
    assert report.timeline.moments[0] == Moment(time_s=0.0, phase="forward", categories={"weights": 1})
    assert report.timeline.peak_bytes == 3


@pytest.mark.parametrize(
    "record", [{}, {"limit_bytes": None, "predicted_peak_bytes": None, "predicted_ratio": None, "timeline": None}]
)
def test_older_reports_have_none_of_it(tmp_path: Path, record: dict[str, Any]) -> None:
    (tmp_path / "memory_report.json").write_text(json.dumps(record))
    report = MemoryReport.read(tmp_path / "memory_report.json")
    assert report.limit_bytes is report.predicted_peak_bytes is report.predicted_ratio is report.timeline is None


@pytest.mark.parametrize(
    ("timeline", "words"),
    [
        (3, "'timeline' is 3, not an object"),
        ({"points": 3}, "timeline: 'points' is 3, not a list"),
        ({"points": [3]}, "timeline: 'points[0]' is 3, not an object"),
        ({"points": [POINT, {"categories": 3}]}, "timeline.points[1]: 'categories' is 3, not a table"),
        (
            {"points": [{"categories": {"weights": "5"}}]},
            "points[0].categories: 'weights' is '5', not a number",
        ),
        ({"points": [{"categories": {"weights": -5}}]}, "{'weights': -5}, but no size is negative"),
        ({"points": [POINT | {"time_s": "now"}]}, "'time_s' is 'now', not a number"),
        ({"points": [POINT | {"time_s": float("inf")}]}, "'time_s' is inf"),
        ({"points": [POINT, POINT | {"time_s": 1}]}, "some points have a 'time_s'"),
        ({"points": [POINT], "step": 1.5}, "'step' is 1.5, not a whole number"),
    ],
)
def test_a_broken_timeline_is_named(tmp_path: Path, timeline: Any, words: str) -> None:
    (tmp_path / "memory_report.json").write_text(json.dumps({"timeline": timeline}))
    with pytest.raises(UserError) as caught:
        MemoryReport.read(tmp_path / "memory_report.json")
    assert words in str(caught.value) and "memory_report.json: " in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("record", [None, {}, {"points": None}, {"points": []}, {"points": [{"phase": "forward"}]}])
def test_where_nothing_is_allocated_there_is_no_timeline(record: Any) -> None:
    assert MemoryReport.of({"timeline": record}, "here").timeline is None
