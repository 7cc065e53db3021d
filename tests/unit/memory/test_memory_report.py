"""One memory report over all parts of a run."""

from __future__ import annotations

from typing import Any

import pytest

from sophia_galore.memory.report import merge_reports


def part(peak_bytes: int, steps: list[int], **more: Any) -> dict[str, Any]:
    return {
        "device": "cpu",
        "measured_by": f"tracker, {peak_bytes}",
        "limit_bytes": None,
        "predicted_peak_bytes": peak_bytes + 1,
        "predicted_ratio": 1.0,
        "adaptations": [],
        "peak_allocated_bytes": peak_bytes,
        "peak_reserved_bytes": peak_bytes,
        "peak_process_bytes": peak_bytes * 2,
        "phases": {"load": peak_bytes // 2, "forward": peak_bytes},
        "categories": {"weights": peak_bytes},
        "steps": [{"step": step, "allocated_bytes": peak_bytes} for step in steps],
        "timeline": {"step": steps[0], "points": []},
        **more,
    }


@pytest.mark.parametrize(("first", "second"), [(100, 70), (70, 100)])
def test_the_highest_peak_and_what_belongs_to_it_are_kept(first: int, second: int) -> None:
    earlier, later = part(first, [1, 2], adaptations=["a"]), part(second, [3, 4], adaptations=["a", "b"])
    whole = merge_reports(earlier, later)
    highest = earlier if first > second else later
    for key in ("categories", "timeline", "predicted_peak_bytes", "peak_allocated_bytes", "measured_by"):
        assert whole[key] == highest[key], key
    assert whole["peak_process_bytes"] == 200
    assert whole["phases"] == {"load": 50, "forward": 100}
    assert [line["step"] for line in whole["steps"]] == [1, 2, 3, 4]
    assert whole["adaptations"] == ["a", "b"]
    assert set(whole) == set(later)


def test_what_was_not_measured_stays_unknown() -> None:
    unknown = part(0, [1], peak_allocated_bytes=None, peak_reserved_bytes=None)
    assert merge_reports(unknown, unknown)["peak_allocated_bytes"] is None
