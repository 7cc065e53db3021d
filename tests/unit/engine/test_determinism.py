"""The switches for bits that repeat on a GPU; switches can be watched without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sophia_galore.engine.determinism import repeatable, strictly_repeatable

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def workspace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    torch.use_deterministic_algorithms(False)


def switches() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def test_on_a_gpu_a_run_warns_and_its_backward_refuses() -> None:
    before = switches()
    with repeatable(GPU):
        assert switches() == (True, True)
        with strictly_repeatable(GPU):
            assert switches() == (True, False)
        assert switches() == (True, True)
    assert switches() == before


def test_everything_comes_back_after_an_error() -> None:
    before = switches()
    with pytest.raises(ValueError, match="x"), repeatable(GPU), strictly_repeatable(GPU):
        raise ValueError("x")
    assert switches() == before


def test_nothing_is_switched_on_a_cpu_or_outside_a_run() -> None:
    before = switches()
    with repeatable(CPU), strictly_repeatable(CPU):
        assert switches() == before
    with strictly_repeatable(GPU):
        assert switches() == before
