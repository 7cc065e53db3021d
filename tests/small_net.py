"""A small network with every kind of parameter, and loops that train it by an optimizer of ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sophia_galore

NUM_CLASSES = 8


class Net(nn.Module):
    """Two matrices that are projected, a small one, a convolution, vectors, a scalar, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.rise = nn.Linear(64, 80)
        self.fall = nn.Linear(80, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.head = nn.Linear(128, NUM_CLASSES)
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.idle = nn.Parameter(torch.ones(70, 70))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.fall(torch.tanh(self.rise(x))))
        x = self.conv(x[:, None]).flatten(1)
        return self.head(x) * self.temperature


def make_net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def make_batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(16, 64, generator=draw)
    return x.to(dtype), (x[:, :NUM_CLASSES].argmax(1))


def loss_of(net: nn.Module, step: int) -> Tensor:
    x, y = make_batch(step, next(net.parameters()).dtype)
    return nn.functional.cross_entropy(net(x).float(), y)


def train(net: nn.Module, optimizer: Any, steps: range, scheduler: Any = None) -> list[float]:
    """The plain loop; the losses before each step."""
    losses = []
    for step in steps:
        loss = loss_of(net, step)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in net.named_parameters()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def entries(optimizer: Any) -> dict[str, dict[str, Any]]:
    """What an optimizer keeps of each parameter, by name; copies."""
    return {name: copy.deepcopy(optimizer.state[param]) for name, param in optimizer.named_parameters().items()}


def assert_same_entries(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> None:
    """The same keys, numbers, dtypes and bits."""
    assert one.keys() == other.keys()
    for name, entry in one.items():
        assert [*entry] == [*other[name]], name
        for key, value in entry.items():
            if isinstance(value, Tensor):
                assert value.dtype == other[name][key].dtype and torch.equal(value, other[name][key]), (name, key)
            else:
                assert type(value) is type(other[name][key]) and value == other[name][key], (name, key)


RULES = ["adamw", "sophia", "adafactor", "sgd", "muon"]
Make = Callable[..., Any]


def galore(**settings: Any) -> Make:
    return lambda net, **more: sophia_galore.GaLore(
        net.named_parameters(), **{"lr": 1e-2, "rank": 6, "update_proj_gap": 3, **settings, **more}
    )


def apollo(**settings: Any) -> Make:
    return lambda net, **more: sophia_galore.Apollo(
        net.named_parameters(), **{"lr": 1e-2, "rank": 6, "update_proj_gap": 3, **settings, **more}
    )


def sophia(**settings: Any) -> Make:
    return lambda net, **more: sophia_galore.Sophia(net.named_parameters(), **{"lr": 1e-3, **settings, **more})


VARIANTS: dict[str, Make] = {
    "svd": galore(subspace="svd", projection_bits=32, moment_transport=False),
    "tracked": galore(),
    "randomized-4-bit": galore(subspace="randomized", projection_bits=4),
    "random": galore(subspace="random"),
    "fira": galore(residual="fira"),
    "adaptive": galore(adaptive_gap=True, stagger=False),
    **{f"rule-{rule}": galore(rule=rule) for rule in RULES[1:]},
    "apollo": apollo(),
    "apollo-mini": apollo(rank=None, mini=True),
    "sophia": sophia(),
}
