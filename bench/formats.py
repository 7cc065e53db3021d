"""What eight-bit weights and eight-bit state cost on a problem whose best weights are known, beside published ideas.

    python bench/formats.py --output outputs/formats.json

A matrix W (m, n) is trained from noisy gradients of E |(W - W*) x|^2 / 2 by GaLore's ordinary step, with each format
and with the same gradients' noise. W begins in fine-tuning's place: near W*, so that a step changes most weights by a
fraction of an eight-bit code. Printed is how far the loss at the end is above that with float32, as a mean over seeds
with its standard error. Takes some minutes on one thread. Beside formats that this project has:

- ECO (arXiv 2601.22101): the error of rounding a weight goes into the first moment, as much of it as the subspace
  holds, and is stepped back by the following updates: m += (1 - 1/beta1) (sqrt(v) + eps) e P / rate.
- companded state (arXiv 2602.23349): groups of 32 share a scale; x is stored as 2x / (1 + |x|), a second moment as its
  root, in eight bits, rounded to nearest.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from measured import provenance
from sophia_galore.numerics.hyper import Hyper
from sophia_galore.numerics.noise import Noise
from sophia_galore.numerics.subspace import project
from sophia_galore.optim.lowrank import with_deferred_update
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.optim.spec import ParamSpec, StateBits, SubspaceSpec
from sophia_galore.weights.int8 import Int8Format, Int8Weight, quantise
from sophia_galore.weights.plain import PlainWeight
from sophia_galore.weights.weight import Weight

NAME = "weight"
GROUP = 32
"""Elements of companded state that share a scale."""
AfterStep = Callable[[ParamOptimizer, Weight, Tensor, int, float], None]


@dataclass(frozen=True)
class Variant:
    """A way to store weights and state.

    Args:
        int8: The weights' format; None: float32.
        state_bits: Of the moments.
        folds_late: Whether updates are rounded into the weights at refreshes only.
        then: Done after each step: optimizer, weight, wanted values (m, n), step, rate.
    """

    int8: Int8Format | None = None
    state_bits: StateBits = 32
    folds_late: bool = False
    then: AfterStep | None = None


def feed_error_back(optimizer: ParamOptimizer, weight: Weight, wanted: Tensor, step: int, rate: float) -> None:
    """Add the error of rounding to the first moment (ECO)."""
    spec, state = optimizer.specs[NAME], optimizer.states.of(NAME, weight.device)
    assert spec.subspace is not None
    hyper, length = spec.hyper, rate * spec.subspace.scale
    if not length:
        return
    error = project(wanted - weight.values(torch.float32), state.basis())
    root = state.tensors["exp_avg_sq"].sqrt() / math.sqrt(1 - hyper.beta2**step) + hyper.eps
    unbias = 1 - hyper.beta1**step
    state.tensors["exp_avg"].add_(error * root, alpha=(1 - 1 / hyper.beta1) * unbias / length)


def compand(
    optimizer: ParamOptimizer, weight: Weight, wanted: Tensor, step: int, rate: float, *, stochastic: bool = False
) -> None:
    """Round the moments to companded eight bits, to nearest or stochastically."""
    state = optimizer.states.of(NAME, weight.device)
    draw = torch.Generator().manual_seed(step)

    def rounded(codes: Tensor) -> Tensor:
        return (codes + torch.rand(codes.shape, generator=draw)).floor() if stochastic else codes.round()

    groups = state.tensors["exp_avg"].view(-1, GROUP)
    scales = groups.abs().amax(1, keepdim=True).clamp_min(1e-38)
    relative = groups / scales
    codes = rounded(127 * 2 * relative / (1 + relative.abs())) / 127
    groups.copy_(codes / (2 - codes.abs()) * scales)
    groups = state.tensors["exp_avg_sq"].view(-1, GROUP)
    scales = groups.amax(1, keepdim=True).clamp_min(1e-38)
    groups.copy_((rounded((groups / scales).sqrt() * 255) / 255).square() * scales)


_BLOCKS = Int8Format(128)
VARIANTS: dict[str, Variant] = {
    "float32": Variant(),
    "int8, blocks of 128": Variant(_BLOCKS),
    "int8, blocks of 64": Variant(Int8Format(64)),
    "int8, a scale a row": Variant(Int8Format(0)),
    "int8, blocks of 128, to nearest": Variant(Int8Format(128, stochastic=False)),
    "int8, blocks of 128, ECO": Variant(_BLOCKS, then=feed_error_back),
    "int8, to nearest, ECO": Variant(Int8Format(128, stochastic=False), then=feed_error_back),
    "int8, blocks of 128, rounded at refreshes": Variant(_BLOCKS, folds_late=True),
    "float32, 16-bit state": Variant(state_bits=16),
    "float32, 8-bit state": Variant(state_bits=8),
    "float32, companded 8-bit state": Variant(then=compand),
    "float32, companded 8-bit state, stochastic": Variant(then=partial(compand, stochastic=True)),
    "int8, blocks of 128, 8-bit state": Variant(_BLOCKS, state_bits=8),
}


class Problem:
    """A regression with a known answer.

    Args:
        seed: Of weights and noise.
        rows: m.
        columns: n.
    """

    def __init__(self, seed: int, rows: int, columns: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.begin = 0.05 * torch.randn(rows, columns, generator=self.draw)
        # The covariance of inputs falls off as activations' does; the answer has a few strong directions, and all weak.
        self.variances = torch.arange(1, columns + 1).float().pow(-0.8)
        self.variances *= columns / self.variances.sum()
        strong = torch.randn(rows, 8, generator=self.draw) @ torch.randn(8, columns, generator=self.draw)
        weak = torch.randn(rows, columns, generator=self.draw)
        self.answer = self.begin + 4e-3 * strong + 4e-3 * weak

    def loss(self, values: Tensor) -> float:
        """E |(W - W*) x|^2 / 2."""
        return float(((values - self.answer).square() * self.variances).sum() / 2)

    def grad(self, values: Tensor, examples: int = 64) -> Tensor:
        """Gradient over some examples, whose answers are noisy."""
        inputs = torch.randn(examples, values.shape[1], generator=self.draw) * self.variances.sqrt()
        noise = 0.05 * torch.randn(examples, values.shape[0], generator=self.draw)
        return (inputs @ (values - self.answer).T + noise).T @ inputs / examples


def final_loss(variant: Variant, seed: int, rate: float, asked: argparse.Namespace) -> float:
    """Train with a variant; return the loss at the end."""
    problem = Problem(seed, asked.rows, asked.columns)
    subspace = SubspaceSpec(asked.rank, asked.gap, kind="tracked", transport=True, scale=0.25)
    subspace = replace(subspace, folds_late=variant.folds_late)
    shape = (asked.rows, asked.columns)
    spec = ParamSpec(NAME, shape, rate, 0.0, Hyper(), state_bits=variant.state_bits, subspace=subspace)
    optimizer = ParamOptimizer([spec], seed=seed)
    weight: Weight = PlainWeight(problem.begin.clone())
    if variant.int8 is not None:
        weight = quantise(problem.begin, variant.int8)
    state = optimizer.states.of(NAME, weight.device)
    for step in range(1, asked.steps + 1):
        factor = 1 - (step - 1) / asked.steps
        shown = with_deferred_update(spec, state, weight) if variant.folds_late else weight
        grad = problem.grad(shown.values(torch.float32))
        with _wanted() as wanted:
            optimizer.step_param(NAME, shown, grad, step=step, factor=factor)
        if variant.then is not None:
            variant.then(optimizer, weight, wanted[-1] if wanted else problem.begin, step, rate * factor)
    shown = with_deferred_update(spec, state, weight) if variant.folds_late else weight
    return problem.loss(shown.values(torch.float32))


@contextmanager
def _wanted() -> Iterator[list[Tensor]]:
    """Note the values that are written into eight-bit weights; the matrix must be one block of rows."""
    found: list[Tensor] = []
    write = Int8Weight.write

    def noting(self: Int8Weight, values: Tensor, noise: Noise | None) -> None:
        found.append(values.clone())
        write(self, values, noise)

    with patch.object(Int8Weight, "write", noting):
        yield found


def main() -> None:
    """Choose the rate with float32, and run each variant with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--gap", type=int, default=100)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3, 1.6e-2])
    asked = parser.parse_args()
    tried = {rate: final_loss(VARIANTS["float32"], 0, rate, asked) for rate in asked.rates}
    rate = min(tried, key=lambda one: tried[one])
    found: dict[str, Any] = {}
    exact = [final_loss(VARIANTS["float32"], seed, rate, asked) for seed in range(asked.seeds)]
    print("| format | loss above float32's | standard error |\n|---|---|---|", flush=True)
    for name, variant in VARIANTS.items():
        losses = exact if name == "float32" else [final_loss(variant, seed, rate, asked) for seed in range(asked.seeds)]
        above = [loss / best - 1 for loss, best in zip(losses, exact, strict=True)]
        spread = statistics.stdev(above) / math.sqrt(len(above)) if len(above) > 1 else 0.0
        found[name] = {"losses": losses, "above": statistics.mean(above), "standard_error": spread}
        print(f"| {name} | {statistics.mean(above):+.2%} | {spread:.2%} |", flush=True)
    started = Problem(0, asked.rows, asked.columns)
    about = {"rate": rate, "rates": tried, "loss_before": started.loss(started.begin), "formats": found}
    settings = {key: value for key, value in vars(asked).items() if key != "output"}
    asked.output.write_text(json.dumps(provenance() | {"settings": settings} | about, indent=2) + "\n")


if __name__ == "__main__":
    main()
