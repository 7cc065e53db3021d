"""The optimizers under `fully_shard` (FSDP2): as one process, whatever the number of processes and the parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from processes import in_processes
from small_net import VARIANTS, assert_same, assert_same_entries, make_net

STEPS = 7


def gradients(net: nn.Module, step: int) -> dict[str, Tensor]:
    """The gradients of a step, the same for whole and for sharded parameters."""
    draw = torch.Generator().manual_seed(step)
    return {name: torch.randn(param.shape, generator=draw) for name, param in net.named_parameters() if name != "idle"}


def sharded(net: nn.Module, placement: Any = None) -> nn.Module:
    """The network, cut; torch cuts no scalars."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(net, mesh=mesh, ignored_params={net.temperature}, shard_placement_fn=placement)
    return net


def run(net: nn.Module, optimizer: Any, steps: range) -> None:
    """Steps with given gradients; where there is a curvature, it is observed at every other one."""
    for step in steps:
        for offset in (1000, 0) if optimizer.curved_parameters() and step % 2 else (0,):
            grads = gradients(net, step + offset)
            for name, param in net.named_parameters():
                if name in grads:
                    grad = grads[name].to(param.dtype)
                    whole = isinstance(param, DTensor)
                    param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if whole else grad
            if offset:
                optimizer.observe_curvature(32)
            else:
                optimizer.step()
        optimizer.zero_grad()


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def end(net: nn.Module, optimizer: Any) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Weights and states, whole."""
    weights = {name: whole(param.detach()) for name, param in net.named_parameters()}
    states = {
        name: {key: whole(value) for key, value in optimizer.state[param].items()}
        for name, param in optimizer.named_parameters().items()
    }
    return weights, states


CASES = [
    (variant, bits, dtype) for variant in VARIANTS for bits in (32, 16, 8) for dtype in (torch.float32, torch.bfloat16)
]


def compare(cases: list[tuple[str, int, torch.dtype]], num: int, folder: Path) -> None:
    def body() -> list[Any]:
        ends = []
        for variant, bits, dtype in cases:
            net = sharded(make_net(dtype))
            optimizer = VARIANTS[variant](net, state_bits=bits)
            run(net, optimizer, range(1, STEPS + 1))
            ends.append(end(net, optimizer))
        return ends

    results = in_processes(body, num, folder)
    for index, (variant, bits, dtype) in enumerate(cases):
        net = make_net(dtype)
        optimizer = VARIANTS[variant](net, state_bits=bits)
        run(net, optimizer, range(1, STEPS + 1))
        weights, states = end(net, optimizer)
        for result in results:
            assert_same(result[index][0], weights)
            assert_same_entries(result[index][1], states)


@pytest.mark.parametrize("num", [2, 3, 4])
def test_equals_one_process_to_the_bit(num: int, tmp_path: Path) -> None:
    """Every variant and format; with three and four, rows do not divide, and some processes have none."""
    compare(CASES[num - 2 :: 3], num, tmp_path)
