"""The `torch.optim` optimizers against GaLore in float64, torch's AdamW, and Sophia written down."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sophia_galore
from small_net import VARIANTS, loss_of, make_batch, make_net, train, weights

sys.path.insert(0, str(Path(__file__).parent))
from plain import PlainGaLore


@pytest.mark.parametrize("shape", [(24, 10), (10, 24)])
def test_galore_equals_the_plain_form(shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=draw))
    plain = PlainGaLore(weight.detach(), rank=4, gap=5, scale=0.5, lr=1e-2, weight_decay=0.1)
    optimizer = sophia_galore.GaLore(
        [("w", weight)],
        lr=1e-2,
        rank=4,
        update_proj_gap=5,
        scale=0.5,
        weight_decay=0.1,
        subspace="svd",
        moment_transport=False,
        stagger=False,
        projection_bits=32,
    )
    for _ in range(20):
        weight.grad = torch.randn(shape, generator=draw)
        plain.step(weight.grad)
        optimizer.step()
    error = (weight.detach() - plain.weight).norm() / plain.weight.norm()
    assert float(error) <= 1e-6  # worst seen 3.3e-7


def test_dense_parameters_equal_torch_adamw() -> None:
    """With a rank that nothing exceeds, `dense_lr` makes GaLore plain AdamW."""
    net, twin = make_net(), make_net()
    with pytest.warns(UserWarning, match="projects nothing"):
        ours = sophia_galore.GaLore(net.named_parameters(), lr=1e-2, dense_lr=2e-3, weight_decay=0.1)
    vectors = [param for param in twin.parameters() if param.ndim < 2]
    matrices = [param for param in twin.parameters() if param.ndim >= 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=2e-3, weight_decay=0.1, foreach=False)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(one, 20) for one in (ours, reference)]
    train(net, ours, range(1, 21), schedulers[0])
    train(twin, reference, range(1, 21), schedulers[1])
    for (name, one), other in zip(net.named_parameters(), twin.parameters(), strict=True):
        error = (one - other).detach().norm() / other.detach().norm()
        assert float(error) <= 1e-6, name  # worst seen 1.9e-7


def moved(variant: str, lr: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """How far the weights of a net went in two steps with the same gradients, in float64."""
    net = make_net(dtype)
    optimizer = VARIANTS[variant](net, lr=lr, weight_decay=0.1)
    before = weights(net)
    draw = torch.Generator().manual_seed(0)
    for _ in range(2):
        for param in net.parameters():
            param.grad = torch.randn(param.shape, generator=draw).to(dtype)
        if optimizer.curved_parameters() and optimizer.curvature_is_due():
            optimizer.observe_curvature(num_samples=16)
            for param in net.parameters():
                param.grad = torch.ones_like(param)
        optimizer.step()
    return {name: param.detach().double() - before[name].double() for name, param in net.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_weights_are_moved_in_float64(variant: str) -> None:
    """By what float32 weights are moved by; and steps of 1e-9, which float32 can't hold, are as exact."""
    large, small = moved(variant, 1e-4, torch.float64), moved(variant, 1e-9, torch.float64)
    single, lost = moved(variant, 1e-4, torch.float32), moved(variant, 1e-9, torch.float32)
    if variant == "rule-sgd":  # whose rate says nothing of what AdamW trains beside it
        large = {name: large[name] for name in ("rise.weight", "fall.weight")}
    for name, step in large.items():
        # Two steps are rounded to float32 beside weights of at most 2.
        assert torch.allclose(step, single[name], rtol=0, atol=2.5e-7), name
        # What is not linear in the rate is its product with the decay, 1e-5.
        assert step.norm() > 0 and (small[name] * 1e5 - step).norm() <= 1e-4 * step.norm(), name
    assert variant == "rule-sgd" or not lost["temperature"].any()


def test_float64_adamw_equals_torch() -> None:
    net, twin = make_net(torch.float64), make_net(torch.float64)
    with pytest.warns(UserWarning, match="projects nothing"):
        ours = sophia_galore.GaLore(net.parameters(), lr=1e-2, dense_lr=2e-3)
    reference = torch.optim.AdamW(twin.parameters(), lr=2e-3, weight_decay=0, foreach=False)
    train(net, ours, range(1, 21))
    train(twin, reference, range(1, 21))
    for (name, one), other in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert one.dtype == torch.float64
        error = (one - other).detach().norm() / other.detach().norm()
        assert float(error) <= 1e-6, name  # moments are float32


@pytest.mark.parametrize("shape", [(24, 10), (10, 24)])
def test_float64_galore_equals_the_plain_form(shape: tuple[int, int]) -> None:
    """Ten thousand times a step's size away from float32's own rounding of the weight."""
    draw = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64))
    start = weight.detach().clone()
    plain = PlainGaLore(start, rank=4, gap=5, scale=0.5, lr=1e-9, weight_decay=0.1)
    optimizer = sophia_galore.GaLore(
        [weight],
        lr=1e-9,
        rank=4,
        update_proj_gap=5,
        scale=0.5,
        weight_decay=0.1,
        subspace="svd",
        moment_transport=False,
        stagger=False,
        projection_bits=32,
    )
    for _ in range(20):
        weight.grad = torch.randn(shape, generator=draw, dtype=torch.float64)
        plain.step(weight.grad)
        optimizer.step()
    path = plain.weight - start
    assert float((weight.detach() - plain.weight).norm() / path.norm()) <= 1e-5


def sampled_grads(net: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    params = {name: param for name, param in net.named_parameters() if name != "idle"}
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


def test_sophia_equals_its_formula() -> None:
    """Algorithm 3 written down, with the curvature seen by hand every second step."""
    net, twin = make_net(), make_net()
    rate, beta1, beta2, rho = 1e-3, 0.965, 0.99, 0.04
    optimizer = sophia_galore.Sophia(net.named_parameters(), lr=rate, curvature_every=2)
    h: dict[str, Tensor] = {}
    m = {name: torch.zeros_like(param) for name, param in twin.named_parameters()}
    draw = torch.Generator().manual_seed(5)
    for step in range(1, 7):
        if optimizer.curvature_is_due():
            x, _ = make_batch(step)
            labels = torch.multinomial(net(x).detach().softmax(-1), 1, generator=draw)[:, 0]
            nn.functional.cross_entropy(net(x), labels).backward()
            optimizer.observe_curvature(num_samples=len(labels))
            assert all(param.grad is None for param in net.parameters())
            for name, grad in sampled_grads(twin, nn.functional.cross_entropy(twin(x), labels)).items():
                estimate = len(labels) * grad**2
                h[name] = estimate if name not in h else beta2 * h[name] + (1 - beta2) * estimate
        train(net, optimizer, range(step, step + 1))
        for name, grad in sampled_grads(twin, loss_of(twin, step)).items():
            m[name] = beta1 * m[name] + (1 - beta1) * grad
            direction = (m[name] / (rho * h[name]).clamp_min(1e-8)).clamp(-1, 1)
            with torch.no_grad():
                twin.get_parameter(name).sub_(rate * direction)
    for name, param in net.named_parameters():
        # worst seen 5.3e-8
        assert torch.allclose(param, twin.get_parameter(name), rtol=0, atol=2e-7), name
