"""The GPU's measurements in small and on the CPU: that each section gets through and returns what the table shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import gpu
from gpu_sections import SECTIONS
from gpu_work import Work


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(tmp_path_factory.mktemp("work"), "cpu", tiny=True)


# The doctor has tests of its own.
@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in SECTIONS if name != "doctor"])
def test_a_section_in_small(name: str, work: Work) -> None:
    figures = SECTIONS[name](work)
    row = gpu.table({**gpu.machine("cpu"), "sections": {name: {**figures, "seconds": 1.0}}}).splitlines()[-1]
    assert row.startswith(f"| {name} |") and "FAILED" not in row
    if name == "bits":
        assert figures["same again"] and figures["same after resuming"]
    if "predicted_ratio" in figures:
        # Streamed in small, single bytes of bookkeeping show: worst seen 0.981.
        assert figures["predicted_ratio"] == pytest.approx(1.0, abs=0.03)


def test_what_fails_stands_in_the_table_with_its_reason() -> None:
    sections: dict[str, Any] = {"capped": {"failed": "no GPU", "seconds": 0.1}}
    assert "FAILED: no GPU" in gpu.table({**gpu.machine("cpu"), "sections": sections})


def test_a_section_that_raises_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Work) -> dict[str, Any]:
        raise RuntimeError("no such kernel. And more.")

    monkeypatch.setitem(SECTIONS, "capped", broken)
    gpu.child("capped", Work(tmp_path, "cpu", tiny=True), tmp_path / "result.json")
    assert '"failed": "RuntimeError: no such kernel."' in (tmp_path / "result.json").read_text()
