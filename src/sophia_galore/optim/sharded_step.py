"""The steps of sharded parameters: which of them a process makes on its own part, and which the owners make."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sophia_galore.optim.local_step import LocalStep, is_local, step_locally
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.optim.owner_step import Job, run_on_owners
from sophia_galore.optim.sharding import sharding_of
from sophia_galore.optim.torch_states import TorchStates, from_entry, to_entry


def step_sharded(
    param_optimizer: ParamOptimizer, states: TorchStates, items: Mapping[str, tuple[Tensor, Tensor, float]]
) -> None:
    """Update sharded parameters.

    Args:
        param_optimizer: Makes the steps.
        states: The states.
        items: Parameter, gradient (both DTensors) and learning rate by name; the same names in all processes.
    """
    jobs = [_job(states, name, param, grad, with_weight=True) for name, (param, grad, _) in items.items()]

    def act(job: Job, weight: Tensor | None, grad: Tensor, tensors: dict[str, Tensor]) -> None:
        assert weight is not None
        step = states.step_of(job.name) + 1
        with param_optimizer.states.using(job.name, weight.device, tensors):
            param_optimizer.step_param(job.name, weight, grad.float(), step=step, factor=items[job.name][2])

    local, others = [], []
    for job in jobs:
        spec, step = param_optimizer.specs[job.name], states.step_of(job.name) + 1
        if is_local(spec, job, step):
            rate = spec.learning_rate * items[job.name][2]
            local.append(LocalStep(spec, job, step, rate, param_optimizer.seed))
        else:
            others.append(job)
    step_locally(local)
    run_on_owners(others, act)
    for job in jobs:
        entry = states.entries[job.name]
        entry |= {**to_entry(job.tensors), "step": states.step_of(job.name) + 1}


def observe_sharded(
    param_optimizer: ParamOptimizer,
    states: TorchStates,
    items: Mapping[str, tuple[Tensor, Tensor]],
    *,
    num_samples: int,
) -> None:
    """Update the curvatures of sharded parameters.

    Args:
        param_optimizer: Computes them.
        states: The states.
        items: Parameter and gradient (both DTensors) by name; the same names in all processes.
        num_samples: Number of sampled labels, of all processes together.
    """
    jobs = [_job(states, name, param, grad, with_weight=False) for name, (param, grad) in items.items()]

    def act(job: Job, weight: Tensor | None, grad: Tensor, tensors: dict[str, Tensor]) -> None:
        step = states.step_of(job.name) + 1
        with param_optimizer.states.using(job.name, grad.device, tensors):
            param_optimizer.observe_curvature(job.name, grad.float(), step=step, num_samples=num_samples)

    run_on_owners(jobs, act)
    for job in jobs:
        states.entries[job.name] |= to_entry(job.tensors)


def _job(states: TorchStates, name: str, param: Tensor, grad: Tensor, *, with_weight: bool) -> Job:
    sharding = sharding_of(name, param)
    assert sharding is not None
    entry = states.fill(name, param, begins=True)
    return Job(name, sharding, param if with_weight else None, grad, from_entry(entry))
