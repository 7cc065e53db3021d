"""Our optimizers against torch's AdamW and against GaLore written plainly in float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from engines import CPU, load_parts, make_engine
from sophia_galore.numerics.rules import AdamWHyper
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.optim.spec import ParamSpec, SubspaceSpec
from tiny import autograd_loss, ragged_batches, tiny_model

sys.path.insert(0, str(Path(__file__).parent))
from plain import PlainGaLore

NUM_STEPS = 20


def test_adamw_equals_torch(tmp_path: Path) -> None:
    """The whole way: our engine and door against autograd and torch.optim.AdamW, 20 steps on the same data."""
    model = tiny_model("qwen2", tied=True).train()
    model.save_pretrained(tmp_path)
    reference = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, foreach=False)
    anatomy, store = load_parts(tmp_path)
    engine = make_engine(anatomy, store)
    optimizer = ParamOptimizer(
        [ParamSpec(name, tuple(shape), 1e-3, 0.01, AdamWHyper()) for name, shape in anatomy.parameter_shapes().items()],
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

        engine.step(batches, apply, step=step)
    start = dict(tiny_model("qwen2", tied=True).named_parameters())
    for name, parameter in model.named_parameters():
        # Relative to the weight. Adam divides by |gradient|: where that is rounding noise only (key biases
        # nearly cancel), the sign of a step is noise as well, so their bound is relative to the way moved.
        error = float((store[name] - parameter).norm() / parameter.norm())
        moved = float((parameter - start[name]).norm() / parameter.norm())
        assert error <= 1e-6 or ("k_proj.bias" in name and error <= 1e-3 * moved), (name, error, moved)


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (16, 16)], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_galore_equals_plain_float64(shape: tuple[int, int], weight_decay: float) -> None:
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=draw)
    plain = PlainGaLore(weight, rank=4, gap=7, scale=0.25, lr=1e-2, weight_decay=weight_decay)
    spec = ParamSpec("w", shape, 1e-2, weight_decay, AdamWHyper(), SubspaceSpec(rank=4, gap=7, offset=0, scale=0.25))
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
