"""Our optimizers against torch's AdamW and against GaLore written plainly in float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from engines import CPU, load_parts, make_engine, take_step
from sophia_galore.numerics.hyper import Hyper
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.optim.spec import ParamSpec, SubspaceSpec
from tiny import autograd_loss, ragged_batches, tiny_model

sys.path.insert(0, str(Path(__file__).parent))
from plain import PlainGaLore

NUM_STEPS = 20
LEARNING_RATE = 1e-3


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True), ("gemma3", True)])
def test_adamw_equals_torch(tmp_path: Path, family: str, tied: bool) -> None:
    """The whole way: our engine and door against autograd and torch.optim.AdamW, 20 steps on the same data."""
    model = tiny_model(family, tied=tied).train()
    model.save_pretrained(tmp_path)
    reference = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, foreach=False)
    architecture, store = load_parts(tmp_path)
    engine = make_engine(architecture, store)
    optimizer = ParamOptimizer(
        [
            ParamSpec(name, tuple(shape), LEARNING_RATE, 0.01, Hyper())
            for name, shape in architecture.parameter_shapes().items()
        ],
        seed=0,
        device=CPU,
    )
    for step in range(1, NUM_STEPS + 1):
        batches = ragged_batches(seed=step)
        reference.zero_grad()
        autograd_loss(model, batches)
        reference.step()

        def apply(grads: dict[str, torch.Tensor], step: int = step) -> None:
            for name, grad in grads.items():
                optimizer.step_param(name, store[name], grad, step=step, factor=1.0)

        take_step(engine, batches, apply, step=step)
    for name, parameter in model.named_parameters():
        error = store[name].first - parameter.detach()
        if name.endswith("k_proj.bias"):
            # These gradients cancel to rounding noise, and Adam divides by their size: worst seen 6e-6,
            # under a hundredth of one step.
            assert float(error.abs().max()) <= 1e-2 * LEARNING_RATE, name
        else:
            assert float(error.norm() / parameter.detach().norm()) <= 1e-6, name  # worst seen 1.7e-7


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (16, 16)], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_galore_equals_plain_float64(shape: tuple[int, int], weight_decay: float) -> None:
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=draw)
    plain = PlainGaLore(weight, rank=4, gap=7, scale=0.25, lr=1e-2, weight_decay=weight_decay)
    spec = ParamSpec(
        "w", shape, 1e-2, weight_decay, Hyper(), subspace=SubspaceSpec(rank=4, gap=7, offset=0, scale=0.25)
    )
    optimizer = ParamOptimizer([spec], seed=0, device=CPU)
    for step in range(1, NUM_STEPS + 1):
        # Well separated singular values, or the basis is not defined.
        u, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=draw))
        v, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=draw))
        grad = u @ torch.diag(2.0 ** -torch.arange(min(shape))) @ v.T
        plain.step(grad)
        optimizer.step_param("w", weight, grad, step=step, factor=1.0)
    # float32 against float64 over 20 steps; worst seen 5e-7.
    assert float((weight - plain.weight).norm() / plain.weight.norm()) <= 2e-6
