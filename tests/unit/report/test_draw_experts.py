"""The figure of a mixture of experts, and what the report says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sophia_galore.records.files import METRICS
from sophia_galore.records.metrics import Metrics, TrainStep
from sophia_galore.report.draw_experts import draw_experts, has_experts
from sophia_galore.report.plots import plot_experts
from sophia_galore.report.style import styled


def steps(count: int, *, aux: bool = True) -> Metrics:
    return Metrics(
        tuple(
            TrainStep(
                step=step,
                loss=1.0,
                router_entropy=1.5,
                largest_expert_share=0.5,
                idle_experts=2,
                aux_loss=0.01 if aux else None,
                tokens_per_expert=(8, step % 4, 0, 4),
            )
            for step in range(1, count + 1)
        )
    )


@pytest.mark.drawn
@pytest.mark.parametrize("count", [1, 7, 900])
def test_each_step_is_a_column_until_there_are_too_many(count: int) -> None:
    with styled():
        figure = draw_experts(steps(count))
    (image,) = figure.axes[0].images
    shares = image.get_array()
    assert shares is not None and shares.shape[0] == 4
    assert shares.shape[1] == (count if count <= 400 else 300)
    assert shares.sum(axis=0).tolist() == pytest.approx([4.0] * shares.shape[1])  # 1 is an even share
    assert len(figure.axes[1].lines) == 2


@pytest.mark.drawn
def test_without_the_balancing_loss_there_is_one_line() -> None:
    with styled():
        assert len(draw_experts(steps(3, aux=False)).axes[1].lines) == 1


@pytest.mark.drawn
def test_a_run_without_experts_has_no_such_picture(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 1, "loss": 2.0}\n')
    assert not has_experts(Metrics((TrainStep(step=1, loss=2.0),)))
    assert plot_experts(tmp_path) is None
    (tmp_path / METRICS).write_text('{"step": 1, "loss": 2.0, "tokens_per_expert": [3, 1]}\n')
    path = plot_experts(tmp_path)
    assert path is not None and path.read_bytes()[:4] == b"\x89PNG"
