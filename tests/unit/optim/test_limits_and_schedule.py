"""Clipping and learning rate schedules against torch and transformers."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from transformers import get_scheduler

from sophia_galore.config.schema import SchedulerName
from sophia_galore.optim.limits import clip_, grad_norm
from sophia_galore.optim.schedule import schedule


def test_norm_and_clipping_equal_torch() -> None:
    grads = [torch.randn(7, 3), torch.randn(11)]
    parameters = [torch.nn.Parameter(grad.clone()) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(parameters, 0.7)
    norm = grad_norm(grads)
    assert norm == pytest.approx(float(expected), rel=1e-6)  # float32 sums in another order
    clip_(grads, norm, 0.7)
    assert grad_norm(grads) == pytest.approx(0.7, rel=1e-5)
    for parameter, grad in zip(parameters, grads, strict=True):
        # torch divides by norm + 1e-6.
        assert torch.allclose(grad, parameter.grad, rtol=1e-5)


@pytest.mark.parametrize("max_norm", [0.0, 100.0])
def test_off_or_within_the_limit_changes_nothing(max_norm: float) -> None:
    grads = [torch.ones(4)]
    clip_(grads, grad_norm(grads), max_norm)
    assert torch.equal(grads[0], torch.ones(4))


def test_no_gradients_have_norm_zero() -> None:
    assert grad_norm([]) == 0.0


@pytest.mark.parametrize("name", get_args(SchedulerName))
def test_rates_are_those_of_the_trainer(name: str) -> None:
    """The rate at step k is the one that a torch loop with get_scheduler uses in its k-th step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    reference = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=12)
    factor = schedule(name, warmup_steps=3, num_steps=12)
    for step in range(1, 13):
        assert 0.3 * factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-6)
        optimizer.step()
        reference.step()


def test_the_schedule_is_a_function_of_the_step() -> None:
    factor = schedule("cosine", warmup_steps=2, num_steps=10)
    forward = [factor(step) for step in range(1, 11)]
    assert [factor(step) for step in range(10, 0, -1)] == forward[::-1]
