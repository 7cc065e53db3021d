"""What others take of the processors beside a measurement."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from quiet import CpuTimes, cpu_times, is_disturbed, others_share, quietness


@pytest.mark.parametrize(
    ("used", "own", "share"),
    [
        pytest.param(20.0, 20.0, 0.0, id="all of it is ours"),
        pytest.param(15.0, 10.0, 0.25, id="a quarter is theirs"),
        pytest.param(9.0, 10.0, 0.0, id="clocks of the system are coarser than ours"),
    ],
)
def test_share_of_others(used: float, own: float, share: float) -> None:
    assert others_share(CpuTimes(100.0, 50.0, 5.0), CpuTimes(110.0, 50.0 + used, 5.0 + own), processors=2) == share


def test_no_time_no_share() -> None:
    assert others_share(CpuTimes(1.0, 1.0, 1.0), CpuTimes(1.0, 2.0, 1.0), processors=2) == 0.0


def test_child_processes_are_our_own() -> None:
    begun = cpu_times()
    subprocess.run([sys.executable, "-c", "sum(range(10_000_000))"], check=True)
    ended = cpu_times()
    own = ended.own - begun.own
    # A clock tick is 10 ms; ten million sums take far longer on any machine.
    assert own > 0.05
    assert ended.used - begun.used >= own - 0.05 * (os.cpu_count() or 1)


def test_what_a_line_says(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for share in (0.0, 0.2):
        monkeypatch.setattr("quiet.others_share", lambda *_, share=share: share)
        found[share] = quietness(cpu_times())
    assert found == {0.0: {"others_cpu": 0.0}, 0.2: {"others_cpu": 0.2, "disturbed": True}}
    assert [is_disturbed(line) for line in found.values()] == [False, True]
