"""The memory monitor: what is in its report, whatever the run did or did not do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sophia_galore.config.schema import MemoryConfig
from sophia_galore.memory.monitor import MemoryMonitor
from sophia_galore.memory.report import peak_process_bytes, process_bytes
from sophia_galore.records.memory import MemoryReport

CPU = torch.device("cpu")
KEYS = [
    "device",
    "measured_by",
    "limit_bytes",
    "predicted_peak_bytes",
    "predicted_ratio",
    "adaptations",
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "peak_process_bytes",
    "phases",
    "categories",
    "steps",
    "timeline",
]
PHASES = ["load", "forward", "head", "backward", "step", "eval"]
CATEGORIES = ["weights", "gradients", "optimizer state", "projections", "activations", "logits", "other"]


@pytest.fixture
def monitor() -> Iterator[MemoryMonitor]:
    made = MemoryMonitor(CPU, MemoryConfig(track_steps=2))
    made.__enter__()
    yield made
    made.stop()


def one_step(monitor: MemoryMonitor, num_floats: int, step: int) -> dict[str, int | None]:
    with monitor.phase("forward"):
        assert torch.zeros(num_floats).numel() == num_floats
    return monitor.end_step(step)


def assert_whole(report: dict[str, Any]) -> None:
    """What every report has, of a run of any length on any device."""
    assert list(report) == KEYS
    assert list(report["phases"]) == PHASES
    assert list(report["categories"]) == CATEGORIES
    assert all(report[key] > 0 for key in KEYS if key.startswith("peak"))
    assert report["device"] and report["measured_by"]
    json.dumps(report)


@pytest.mark.parametrize("track_steps", [0, 1, 2])
@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_a_report_is_never_empty(track_steps: int, num_steps: int, tmp_path: Path) -> None:
    monitor = MemoryMonitor(CPU, MemoryConfig(track_steps=track_steps))
    monitor.__enter__()
    for step in range(1, num_steps + 1):
        one_step(monitor, 100, step)
    monitor.stop()
    report = monitor.report()
    assert_whole(report)
    assert [entry["step"] for entry in report["steps"]] == list(range(1, num_steps + 1))
    assert all(entry["process_bytes"] > 0 for entry in report["steps"])
    (tmp_path / "memory_report.json").write_text(json.dumps(report))
    assert MemoryReport.read(tmp_path / "memory_report.json").peak_allocated_bytes == report["peak_allocated_bytes"]


def test_the_peak_is_that_of_the_largest_phase_and_the_categories_add_up(monitor: MemoryMonitor) -> None:
    with monitor.phase("load"):
        weights = torch.zeros(100)
    with monitor.phase("forward"):
        activations = torch.zeros(50)
    with monitor.phase("head"):
        logits = torch.zeros(30)
        monitor.tag(logits, "logits")
        del logits
    with monitor.phase("backward"):
        gradients = torch.zeros(100)
        monitor.tag(gradients, "gradients")
        del activations
    with monitor.phase("step"):
        monitor.tag_state([("w/exp_avg", torch.zeros(10)), ("w/basis", torch.zeros(10))])
        del gradients
    report = monitor.report()
    assert_whole(report)
    assert report["phases"] == {"load": 400, "forward": 600, "head": 720, "backward": 1000, "step": 880, "eval": 0}
    assert report["peak_allocated_bytes"] == report["peak_reserved_bytes"] == max(report["phases"].values()) == 1000
    assert sum(report["categories"].values()) == 1000
    assert report["categories"]["weights"] == 400 == weights.untyped_storage().nbytes()
    assert report["categories"]["gradients"] == 400
    assert report["categories"]["activations"] == 200


def test_state_and_projections_are_told_apart(monitor: MemoryMonitor) -> None:
    with monitor.phase("load"):
        state = {"w/exp_avg": torch.zeros(10), "w/exp_avg_sq": torch.zeros(10), "w/basis": torch.zeros(5)}
        monitor.tag_state(state.items())
        assert torch.zeros(1).numel() == 1  # a later peak, at which the tags hold
    categories = monitor.report()["categories"]
    assert (categories["optimizer state"], categories["projections"]) == (80, 20)


def test_phases_nest_and_the_innermost_counts(monitor: MemoryMonitor) -> None:
    with monitor.phase("eval"):
        outer = torch.zeros(10)
        with monitor.phase("head"):
            inner = torch.zeros(100)
        del inner
        assert outer.numel() == 10
    report = monitor.report()
    assert report["phases"]["head"] == 440
    assert report["phases"]["eval"] == 440  # what the inner phase left was still there when it ended
    assert report["phases"]["forward"] == 0


def test_the_tracker_stops_after_its_steps_and_the_process_is_still_read(monitor: MemoryMonitor) -> None:
    records = [one_step(monitor, size, step) for step, size in enumerate((100, 200, 4000), 1)]
    assert [record["allocated_bytes"] for record in records] == [400, 800, None]
    assert [record["reserved_bytes"] for record in records] == [400, 800, None]
    assert all(record["process_bytes"] for record in records)
    assert not monitor.watches_tensors
    assert monitor.report()["peak_allocated_bytes"] == 800


def test_loading_and_evaluation_are_not_a_steps_memory(monitor: MemoryMonitor) -> None:
    with monitor.phase("load"):
        assert torch.zeros(1000).numel() == 1000
    with monitor.phase("eval"):
        assert torch.zeros(2000).numel() == 2000
    assert one_step(monitor, 100, 1)["allocated_bytes"] == 400
    assert monitor.report()["peak_allocated_bytes"] == 8000


def test_an_exception_leaves_the_phase(monitor: MemoryMonitor) -> None:
    with pytest.raises(ValueError, match="x"), monitor.phase("forward"):
        raise ValueError("x")
    with monitor.phase("eval"):
        assert torch.zeros(10).numel() == 10
    assert monitor.report()["phases"]["forward"] == 0
    assert monitor.report()["phases"]["eval"] == 40


def test_start_and_stop_may_be_repeated(monitor: MemoryMonitor) -> None:
    monitor.__enter__()
    assert monitor.watches_tensors
    monitor.stop()
    monitor.stop()
    assert not monitor.watches_tensors
    monitor.tag(torch.zeros(10), "weights")
    assert monitor.report()["categories"]["weights"] == 0


def test_resident_size_is_that_of_this_process() -> None:
    now = process_bytes()
    # Interpreter and torch alone are above 50 MiB; the peak may lag behind by the pages of this call.
    assert 50 * 2**20 < now < 2**40
    assert peak_process_bytes() >= 0.9 * now


class FakeAllocator:
    """Stands in for `torch.cuda`'s statistics: bytes that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.peak = self.reserved = 0
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: self.reserved)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.reserved)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: self.reset())
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")

    def use(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        self.reserved = max(self.reserved, 2 * self.now)

    def reset(self) -> None:
        self.peak = self.now


def test_on_a_gpu_the_allocator_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = FakeAllocator(monkeypatch)
    with MemoryMonitor(torch.device("cuda", 0), MemoryConfig(track_steps=2)) as monitor:
        with monitor.phase("load"):
            allocator.use(1000)
        for step in (1, 2, 3):
            with monitor.phase("backward"):
                allocator.use(500 * step)
                allocator.use(-500 * step)
            record = monitor.end_step(step)
            # The allocator answers in every step, long after storages are no longer followed.
            assert record["allocated_bytes"] == 1000 + 500 * step
            assert record["reserved_bytes"] == 2 * (1000 + 500 * step)
            assert monitor.watches_tensors == (step < 2)
    report = monitor.report()
    assert_whole(report)
    assert report["device"] == "Some GPU" and report["measured_by"].startswith("CUDA allocator")
    assert report["peak_allocated_bytes"] == max(report["phases"].values()) == 2500
    assert report["peak_reserved_bytes"] == 5000
    assert report["phases"]["load"] == 1000


def test_the_step_that_was_expected_to_need_most_is_followed_too() -> None:
    with MemoryMonitor(CPU, MemoryConfig(track_steps=1)) as monitor:
        monitor.predicted_bytes, monitor.expected_step = 4 * 300, 4
        for step in range(1, 6):
            one_step(monitor, 300 if step == 4 else 100, step)
            if step < 4:
                assert monitor.report()["predicted_ratio"] is None, "it has not been measured yet"
        report = monitor.report()
    assert [entry["allocated_bytes"] is not None for entry in report["steps"]] == [True, False, False, True, False]
    assert report["peak_allocated_bytes"] == 4 * 300 and report["predicted_ratio"] == 1.0
    assert report["timeline"]["step"] == 4 and "first 1 steps, step 4" in report["measured_by"]


def test_a_run_that_took_less_at_once_is_not_compared() -> None:
    with MemoryMonitor(CPU, MemoryConfig(track_steps=1)) as monitor:
        monitor.predicted_bytes, monitor.expected_step = 10**6, 1
        monitor.adaptations.append("Memory ran out in the head at step 1: from here on tiles are smaller.")
        one_step(monitor, 100, 1)
    report = monitor.report()
    assert report["predicted_peak_bytes"] == 10**6 and report["predicted_ratio"] is None
    assert report["adaptations"] == monitor.adaptations
