"""Codes with one scale a row: the values, the rows, the refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sophia_galore.errors import RunError
from sophia_galore.weights.row_int8 import RowInt8Weight


def make(rows: int = 5, columns: int = 7) -> RowInt8Weight:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (rows, columns), generator=draw, dtype=torch.int8)
    return RowInt8Weight(codes, torch.rand(rows, generator=draw))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_are_rounded_once(dtype: torch.dtype) -> None:
    weight = make()
    values = weight.values(dtype)
    assert values.dtype == dtype and values.shape == weight.shape == (5, 7)
    # absmax / 127 is a float32; the product of a code with it is exact in float64.
    exact = weight.codes.double() * weight.absmax.mul(1 / 127).double()[:, None]
    assert torch.equal(values, exact.to(torch.float32).to(dtype) if dtype != torch.float64 else exact)
    assert (exact - weight.codes.double() * weight.absmax.double()[:, None] / 127).abs().max() <= 2**-23


def test_rows_are_those_of_the_whole() -> None:
    weight = make()
    whole = weight.values(torch.float32)
    assert torch.equal(weight[1:3].values(torch.float32), whole[1:3])
    picked = torch.tensor([4, 0, 4])
    assert torch.equal(weight[picked].values(torch.float32), whole[picked])
    assert weight[1:3].codes.data_ptr() == weight.codes[1:].data_ptr(), "a slice is a view"
    assert (weight.numel(), weight.device) == (35, torch.device("cpu"))


def test_a_copy_shares_nothing() -> None:
    weight = make()
    copy = weight.copied_to(torch.device("cpu"))
    assert torch.equal(copy.codes, weight.codes) and torch.equal(copy.absmax, weight.absmax)
    assert copy.codes.data_ptr() != weight.codes.data_ptr() and copy.absmax.data_ptr() != weight.absmax.data_ptr()


def test_it_is_frozen() -> None:
    weight = make()
    kept = weight.copied_to(weight.device)
    with pytest.raises(RunError, match="frozen"):
        weight.write(torch.zeros(5, 7), torch.Generator())
    assert torch.equal(weight.codes, kept.codes) and torch.equal(weight.absmax, kept.absmax)


ONES = torch.ones(5)
PROBLEMS: list[tuple[Tensor, Tensor, str]] = [
    (torch.zeros(5, 7), ONES, "float32 codes"),
    (make().codes, ONES.bfloat16(), "bfloat16 scales"),
    (make().codes, torch.ones(4), "scales of shape (4,)"),
    (make().codes, torch.ones(5, 1), "scales of shape (5, 1)"),
    (make().codes[0], ONES, "codes of shape (7,)"),
    (make().codes, ONES * torch.nan, "not finite"),
    (make().codes, ONES * torch.inf, "not finite"),
    (make().codes, -ONES, "negative"),
    (torch.full((5, 7), -128, dtype=torch.int8), ONES, "-128"),
    (make().codes, ONES.to("meta"), "on meta"),
]


@pytest.mark.parametrize(("codes", "absmax", "cause"), PROBLEMS, ids=[cause for *_, cause in PROBLEMS])
def test_what_is_wrong_is_told(codes: Tensor, absmax: Tensor, cause: str) -> None:
    assert cause in str(RowInt8Weight(codes, absmax).problem())
    assert make().problem() is None
