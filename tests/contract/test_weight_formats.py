"""What `Weight` promises, of every format in which a weight is stored: a new one is a row of `FORMATS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sophia_galore.errors import RunError
from sophia_galore.numerics.noise import Noise
from sophia_galore.numerics.random import generator
from sophia_galore.numerics.row_blocks import ROW_ALIGNMENT
from sophia_galore.optim.move import read_decayed
from sophia_galore.weights.deferred import DeferredWeight
from sophia_galore.weights.int8 import Int8Format, quantise
from sophia_galore.weights.plain import PlainWeight
from sophia_galore.weights.row_int8 import RowInt8Weight
from sophia_galore.weights.weight import Rows, Weight

CPU = torch.device("cpu")
# Three aligned blocks of rows, the last one short; no block of codes divides the columns.
SHAPE = (2 * ROW_ALIGNMENT + 8, 150)
RANK = 3
# An aligned block that is neither the first nor the last, and rows out of order, one of them twice.
ROWS: dict[str, Rows] = {
    "slice": slice(ROW_ALIGNMENT, 2 * ROW_ALIGNMENT),
    "index": torch.tensor([SHAPE[0] - 1, 0, 3, 3]),
}
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def plain(dtype: torch.dtype) -> Callable[[int], Weight]:
    return lambda seed: PlainWeight(matrix(seed).to(dtype))


def int8(block: int) -> Callable[[int], Weight]:
    return lambda seed: quantise(matrix(seed), Int8Format(block))


def deferred(seed: int) -> Weight:
    draw = generator(seed, "update")
    left = (0.01 * torch.randn(SHAPE[0], RANK, generator=draw)).to(torch.bfloat16)
    right = torch.randn(RANK, SHAPE[1], generator=draw).to(torch.bfloat16)
    decay = torch.full((1,), 0.9 + 0.01 * seed)
    return DeferredWeight(quantise(matrix(seed), Int8Format(16)), decay, lambda: (left, right))


def row_int8(seed: int) -> Weight:
    values = matrix(seed)
    absmax = values.abs().amax(1)
    return RowInt8Weight((values / absmax[:, None] * 127).round().to(torch.int8), absmax)


@dataclass(frozen=True)
class Stored:
    """A format, and what is to be true of it.

    Attributes:
        make: Gives another weight for another seed.
        format: Its name.
        num_bytes: Of a weight of `SHAPE`, counted by hand.
        dtype: The narrowest precision in which its values lose nothing.
        is_packed: Whether it is decoded.
        refuses: What a write raises; None: it may be written.
        row_error: By how much a row's value may depend on which rows are decoded with it.
    """

    make: Callable[[int], Weight]
    format: str
    num_bytes: int
    dtype: torch.dtype = torch.float32
    is_packed: bool = False
    refuses: type[Exception] | None = None
    row_error: float = 0.0


M, N = SHAPE
FORMATS = {
    "fp32": Stored(plain(torch.float32), "fp32", 4 * M * N),
    "bf16": Stored(plain(torch.bfloat16), "bf16", 2 * M * N, torch.bfloat16),
    "fp16": Stored(plain(torch.float16), "fp16", 2 * M * N, torch.float16, refuses=TypeError),
    "fp64": Stored(plain(torch.float64), "float64", 8 * M * N, torch.float64),
    "int8, blocks of 128": Stored(int8(128), "int8", M * (N + 2 * 2), is_packed=True),
    "int8, blocks of 16": Stored(int8(16), "int8", M * (N + 2 * 10), is_packed=True),
    "int8, rows": Stored(int8(0), "int8", M * (N + 2 * 1), is_packed=True),
    "deferred": Stored(
        deferred,
        "int8",
        M * (N + 2 * 10) + 2 * RANK * (M + N) + 4,
        is_packed=True,
        refuses=TypeError,
        # A product's sums may run in another order; values are below 0.3, whose last bit in float32 is 3e-8.
        row_error=1e-7,
    ),
    "row int8": Stored(row_int8, "bnb8", M * (N + 4), is_packed=True, refuses=RunError),
}
ROWS_OF_TABLE = [pytest.param(stored, id=name) for name, stored in FORMATS.items()]
EVERY = pytest.mark.parametrize("stored", ROWS_OF_TABLE)
WRITTEN = pytest.mark.parametrize("stored", [row for row in ROWS_OF_TABLE if not FORMATS[str(row.id)].refuses])
FIXED = pytest.mark.parametrize("stored", [row for row in ROWS_OF_TABLE if FORMATS[str(row.id)].refuses])
NOISE = pytest.mark.parametrize("noise", [Noise.of(0, "rounding"), None], ids=["unbiased", "to nearest"])


def matrix(seed: int) -> Tensor:
    return 0.05 * torch.randn(SHAPE, generator=generator(seed, "matrix"))


def tensors(weight: Weight) -> dict[str, Tensor]:
    """A copy of what a weight consists of."""
    return {ending: tensor.clone() for ending, tensor in weight.tensors().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def exact(weight: Weight) -> torch.dtype:
    """The precision in which an optimizer sees a weight."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


@EVERY
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_rows_are_those_of_the_values(stored: Stored, dtype: torch.dtype, rows: Rows) -> None:
    weight = stored.make(0)
    part, whole = weight[rows].values(dtype), weight.values(dtype)[rows]
    assert part.dtype == dtype and part.shape == whole.shape == weight[rows].shape
    # A value of which another bit of float32 is rounded may be one step of a narrower precision off.
    step = torch.finfo(dtype).eps if stored.row_error else 0.0
    assert ((part.double() - whole.double()).abs() <= stored.row_error + 2 * step * whole.double().abs()).all()


@EVERY
def test_a_slice_is_a_view_and_row_numbers_give_a_copy(stored: Stored) -> None:
    weight = stored.make(0)
    view, copy = (weight[ROWS[kind]] for kind in ("slice", "index"))
    assert view.first.data_ptr() == weight.first[ROW_ALIGNMENT].data_ptr()
    before = tensors(copy)
    weight.first.zero_()
    assert not view.first.any() and same(tensors(copy), before)


@EVERY
def test_its_size_is_that_of_its_tensors(stored: Stored) -> None:
    weight = stored.make(0)
    held = weight.tensors()
    assert next(iter(held)) == "", "the first has the name itself"
    assert weight.first.data_ptr() == held[""].data_ptr() and weight.shape == held[""].shape == SHAPE
    assert weight.numel() == M * N and weight.values(torch.float32).shape == SHAPE
    assert all(tensor.device == weight.device == CPU for tensor in held.values())
    assert weight.num_bytes == sum(tensor.nbytes for tensor in held.values()) == stored.num_bytes


@EVERY
def test_it_says_what_it_is(stored: Stored) -> None:
    weight = stored.make(0)
    assert (weight.format, weight.dtype, weight.is_packed) == (stored.format, stored.dtype, stored.is_packed)
    assert not weight.held_by_module and weight.settled.settled is weight.settled
    if weight.format != "bnb8" and weight.settled is weight:  # whose products float32 rounds
        assert torch.equal(weight.values(weight.dtype).double(), weight.values(torch.float64)), "nothing is lost"


@EVERY
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_it_is_ready_where_its_values_are_what_is_stored(stored: Stored, dtype: torch.dtype) -> None:
    weight = stored.make(0)
    values = weight.values(dtype)
    assert values.dtype == dtype
    shares = values.untyped_storage().data_ptr() == weight.first.untyped_storage().data_ptr()
    assert weight.is_ready(dtype) is shares is (dtype == stored.dtype and not stored.is_packed)


@WRITTEN
@NOISE
@pytest.mark.parametrize("copied", [False, True], ids=["in place", "from elsewhere"])
def test_a_zero_update_changes_nothing(stored: Stored, noise: Noise | None, copied: bool) -> None:
    weight = stored.make(0)
    before = tensors(weight)
    values = read_decayed(weight, 0.1, 0.0)
    weight.write(values.clone() if copied else values, noise)
    assert same(tensors(weight), before)


@FIXED
@NOISE
def test_what_may_not_be_written_says_so_and_stays(stored: Stored, noise: Noise | None) -> None:
    weight = stored.make(0)
    before = tensors(weight)
    assert stored.refuses is not None
    with pytest.raises(stored.refuses):
        weight.write(torch.zeros(SHAPE), noise)
    assert same(tensors(weight), before)


@WRITTEN
@NOISE
def test_a_write_comes_back_as_it_was_rounded(stored: Stored, noise: Noise | None) -> None:
    """What a write leaves is what the next read gives, and writing that again moves nothing."""
    weight = stored.make(0)
    target = matrix(1).to(exact(weight))
    weight.write(target.clone(), noise)
    # One code, of which a scale leaves up to half unused; a step of bfloat16 is smaller, the others don't round.
    bound = float(target.abs().max()) / 60 if stored.dtype == torch.bfloat16 or stored.is_packed else 0.0
    assert (weight.values(target.dtype) - target).abs().max() <= bound
    before = tensors(weight)
    weight.write(weight.values(target.dtype).clone(), noise)
    assert same(tensors(weight), before)


@WRITTEN
@NOISE
def test_a_write_of_rows_is_that_of_the_rows_alone(stored: Stored, noise: Noise | None) -> None:
    """The rows become what they become in a write of the whole, and the others stay."""
    rows = slice(ROW_ALIGNMENT, 2 * ROW_ALIGNMENT)
    whole, parted, alone = (stored.make(0) for _ in range(3))
    before = tensors(parted)
    drawn = noise.rows(rows, N) if noise else None
    target = whole.values(exact(whole)) + 0.1 * matrix(1)
    whole.write(target.clone(), noise)
    parted[rows].write(target[rows].clone(), drawn)
    alone = alone[rows].copied_to(CPU)
    alone.write(target[rows].clone(), drawn)
    for ending, tensor in parted.tensors().items():
        assert torch.equal(tensor[rows], whole.tensors()[ending][rows])
        assert torch.equal(tensor[rows], alone.tensors()[ending])
        assert torch.equal(tensor[: rows.start], before[ending][: rows.start])
        assert torch.equal(tensor[rows.stop :], before[ending][rows.stop :])
    assert not torch.equal(parted.values(torch.float64)[rows], stored.make(0).values(torch.float64)[rows])


@EVERY
def test_a_copy_shares_nothing(stored: Stored) -> None:
    weight = stored.make(0)
    copy = weight.copied_to(CPU)
    assert type(copy) is type(weight) and same(tensors(copy), tensors(weight))
    own = {tensor.untyped_storage().data_ptr() for tensor in weight.tensors().values()}
    assert not own & {tensor.untyped_storage().data_ptr() for tensor in copy.tensors().values()}
    before = tensors(weight)
    for tensor in copy.tensors().values():
        tensor.zero_()
    assert same(tensors(weight), before)


@EVERY
def test_taking_over_another_is_exact(stored: Stored) -> None:
    weight, other = (stored.make(seed).settled for seed in (0, 1))
    given = tensors(other)
    assert not same(tensors(weight), given)
    weight.copy_(other)
    assert same(tensors(weight), given) and same(tensors(other), given)
    other.first.zero_()
    assert same(tensors(weight), given), "it shares nothing with the other"


@EVERY
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_what_is_not_finite_is_told(stored: Stored, value: float) -> None:
    """In whichever of its tensors it is; all that is packed has some in floating point beside its codes."""
    assert stored.make(0).problem() is None and stored.make(0).is_finite()
    endings = [ending for ending, tensor in stored.make(0).tensors().items() if tensor.is_floating_point()]
    assert endings
    for ending in endings:
        weight = stored.make(0)
        weight.tensors()[ending].view(-1)[-1] = value
        assert "not finite" in str(weight.problem()) and not weight.is_finite(), ending


def test_an_update_of_nothing_leaves_the_codes_values() -> None:
    base = quantise(matrix(0), Int8Format(16))
    none = (torch.zeros(M, RANK), torch.zeros(RANK, N))
    weight = DeferredWeight(base, torch.ones(1), lambda: none)
    for dtype in FLOATS:
        assert torch.equal(weight.values(dtype), base.values(dtype))
