"""Blocks of rows bound temporaries, and change nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from contract.cases import Case, is_meaningful
from contract.drive import copies, go, make, start, values
from engines import CPU
from sophia_galore.memory.tracker import StorageTracker
from sophia_galore.numerics import row_blocks as numerics_row_blocks
from sophia_galore.numerics.bases import BasisKind
from sophia_galore.numerics.residual import Residual
from sophia_galore.numerics.rules import RULES
from sophia_galore.optim.state import ParamState

NUM_STEPS = 5
# Blocks begin at multiples of 128 rows: three each. Rows of 5 and 7 numbers do not end where blocks of states do.
RIGHT, LEFT = (300, 7), (290, 310)
WAYS: list[tuple[BasisKind | str, Residual]] = [
    ("dense", "none"),
    ("svd", "none"),
    ("tracked", "fira"),
    ("gaussian", "channel"),
    ("random", "tensor"),
]
CASES = [
    case
    for rule in RULES
    for kind, residual in WAYS
    for shape in (RIGHT, LEFT)
    if is_meaningful(case := Case(rule, kind, residual, shape=shape))
]


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics_row_blocks, "_BLOCK_ELEMENTS", 1)
    assert len(list(numerics_row_blocks.row_blocks((300, 7)))) == 3


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_are_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = go(make(case.spec()), start(case), range(1, NUM_STEPS))
    small_blocks(monkeypatch)
    blocked = go(make(case.spec()), start(case), range(1, NUM_STEPS))
    # Products of some rows may sum in another order than those of all.
    assert float((values(blocked) - values(whole)).abs().max()) <= 1e-6  # worst seen 2.4e-7


@pytest.mark.parametrize("case", [replace(case, dtype=torch.bfloat16) for case in CASES], ids=str)
def test_weights_in_bf16_are_the_same_but_for_ties(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise does not depend on the blocks; a sum in another order may tip a rounding over."""
    whole = go(make(case.spec()), start(case), range(1, NUM_STEPS))
    small_blocks(monkeypatch)
    blocked = go(make(case.spec()), start(case), range(1, NUM_STEPS))
    # What is added differs by some 1e-7, a step of bfloat16 is some 1e-3: one rounding in thousands tips over.
    assert float((values(blocked) != values(whole)).float().mean()) <= 2e-3


@pytest.mark.parametrize("case", [replace(case, state_bits=8) for case in CASES if RULES[case.rule].slots], ids=str)
def test_eight_bit_states_find_their_scales(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """After one step, codes are those of the whole tensor or their neighbours: a scale of another block would show."""
    read: list[dict[str, Tensor]] = []
    for blocks in (False, True):
        if blocks:
            small_blocks(monkeypatch)
        optimizer = make(case.spec())
        go(optimizer, start(case), [1])
        state = ParamState(case.spec(), CPU)
        state.tensors = {name.removeprefix("w/"): tensor for name, tensor in copies(optimizer).items()}
        read.append(state.read_all())
        for name, whole in read[-1].items():
            in_blocks = torch.cat([state.read(name, rows) for rows in numerics_row_blocks.row_blocks(whole.shape)])
            assert torch.equal(in_blocks, whole)
    for name, whole in read[0].items():
        # Signed codes are 1/8 of themselves apart at most, and below 2^-16 of a block's largest there are none.
        assert torch.allclose(read[1][name], whole, rtol=0.13, atol=2**-15 * float(whole.abs().max())), name


class Largest(StorageTracker):
    """Remembers the largest storage that was made while it was entered."""

    largest = 0

    def _add(self, tensor: Tensor, category) -> bool:  # type: ignore[no-untyped-def]
        before = self.allocated_bytes
        fits = super()._add(tensor, category)
        self.largest = max(self.largest, self.allocated_bytes - before)
        return fits


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        Case(rule, kind, residual, transport=kind == "tracked", state_bits=bits)
        for rule, kind, residual, bits in [
            ("adamw", "dense", "none", 32),
            ("adamw", "dense", "none", 8),
            ("sophia", "dense", "none", 32),
            ("sgd", "dense", "none", 16),
            ("scale", "dense", "none", 32),
            ("scale_momentum", "dense", "none", 8),
            ("adamw", "tracked", "none", 32),
            ("adamw", "tracked", "fira", 8),
            ("sophia", "tracked", "none", 16),
            ("adafactor", "randomized", "fira", 32),
            ("muon", "random", "none", 32),
            ("adamw", "gaussian", "channel", 32),
            ("adamw", "gaussian", "tensor", 32),
        ]
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(4096, 256), (512, 4096)], ids=["right", "left"])
def test_nothing_as_large_as_the_weight_is_made(
    case: Case, dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By any operation of a step: beside weight, gradient and state nothing of full size exists."""
    # 128 rows at a time: 1/32 of the tall matrix, a quarter of the wide one. What is in the subspace is 1/85 at most,
    # and the sketch of "randomized" 11 columns of 256.
    monkeypatch.setattr(numerics_row_blocks, "_BLOCK_ELEMENTS", 1 << 14)
    limit = 0.05 if shape == (4096, 256) else 0.26
    assert largest_share(replace(case, dtype=dtype, shape=shape)) <= limit  # worst seen 0.043 and 0.25


@pytest.mark.parametrize(("rule", "kind"), [("adafactor", "dense"), ("muon", "dense"), ("adamw", "svd")])
def test_what_needs_more_says_so(rule: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules that are not elementwise, on full gradients; svd's blocks are of 4096 rows in float64 (`_gram`)."""
    monkeypatch.setattr(numerics_row_blocks, "_BLOCK_ELEMENTS", 1 << 14)
    assert largest_share(Case(rule, kind, shape=(4096, 64))) >= 1
    assert not RULES[rule].elementwise or kind == "svd"


def largest_share(case: Case) -> float:
    """The largest tensor that two steps make, relative to the gradient."""
    spec = case.spec(gap=2)
    optimizer = make(spec)
    weight = start(case)
    grads = [torch.randn(case.shape, generator=torch.Generator().manual_seed(step)) for step in (1, 2)]
    tracker = Largest(CPU)
    for tensor in [weight.first, *grads, *optimizer.states.named().values()]:
        tracker.tag(tensor, "weights")
    tracker.largest = 0
    with tracker:
        for step, grad in enumerate(grads, 1):
            optimizer.observe_curvature("w", grad, step=step, num_samples=3)
            optimizer.step_param("w", weight, grad, step=step, factor=1.0)
    return tracker.largest / (4 * weight.numel())
