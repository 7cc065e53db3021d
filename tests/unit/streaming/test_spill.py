"""Tensors that wait elsewhere between forward and backward: they come back as they left, in whatever order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sophia_galore.errors import EnvironmentProblem, RunError
from sophia_galore.streaming.homes import DiskHome, Home
from sophia_galore.streaming.lanes import CpuLane, Jobs
from sophia_galore.streaming.spill import TensorSpill
from sophia_galore.streaming.units import Piece, Placement
from streaming_cases import CPU, PLACEMENTS


@contextmanager
def spill_in(placement: Placement, folder: Path, *, in_background: bool = True) -> Iterator[TensorSpill]:
    lane = CpuLane()
    jobs = Jobs(lane, in_background=in_background)
    try:
        yield TensorSpill(placement, lane, jobs, folder / "inputs", CPU)
    finally:
        jobs.close()


def some(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def put(spill: TensorSpill, number: int, tensors: list[torch.Tensor]) -> None:
    """Let copies leave, which nothing else refers to."""
    spill.put(number, [tensor.clone() for tensor in tensors])


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    kinds = [(tensor.dtype, tensor.shape) for tensor in found] == [(tensor.dtype, tensor.shape) for tensor in expected]
    return kinds and all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_tensors_come_back_as_they_left(placement: Placement, in_background: bool, tmp_path: Path) -> None:
    lists = [
        some(number, (2, 3, 8), (2, 5, 8), dtype=(torch.float32, torch.bfloat16, torch.float16)[number % 3])
        for number in range(5)
    ]
    with spill_in(placement, tmp_path, in_background=in_background) as spill:
        for step in range(3):  # as steps do: in order in forward, backwards in backward
            changed = [[tensor + step for tensor in tensors] for tensors in lists]
            for number, tensors in enumerate(changed):
                put(spill, number, tensors)
            for number in reversed(range(5)):
                if number:
                    spill.fetch(number - 1)
                assert same(spill.take(number), changed[number])
    assert (tmp_path / "inputs").exists() == (placement == "disk")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_order_of_taking_is_free(placement: Placement, tmp_path: Path) -> None:
    lists = [some(number, (4, 6)) for number in range(4)]
    with spill_in(placement, tmp_path) as spill:
        put(spill, 0, lists[0])
        assert same(spill.take(0), lists[0]), "at once, while it leaves"
        for number in (2, 0, 3, 1):
            put(spill, number, lists[number])
        spill.fetch(3)
        spill.fetch(3)
        spill.fetch(9)  # which never left
        for number in (1, 3, 0, 2):
            assert same(spill.take(number), lists[number])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_list_that_was_fetched_and_leaves_anew_comes_back_new(placement: Placement, tmp_path: Path) -> None:
    old, new = some(1, (4, 6)), some(2, (4, 6))
    with spill_in(placement, tmp_path) as spill:
        put(spill, 0, old)
        spill.fetch(0)
        put(spill, 0, new)
        assert same(spill.take(0), new)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_next_step_may_have_other_shapes(placement: Placement, tmp_path: Path) -> None:
    with spill_in(placement, tmp_path) as spill:
        for step, shapes in enumerate([((3, 8),), ((2, 8),), ((9, 8), (1, 8)), (), ((3, 8),), ((8, 3),)]):
            for number in range(2):
                put(spill, number, some(10 * step + number, *shapes))
            for number in (1, 0):
                assert same(spill.take(number), some(10 * step + number, *shapes))


def test_places_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    new = CpuLane.host_buffer

    def counted(self: CpuLane, num_bytes: int) -> object:
        made.append(num_bytes)
        return new(self, num_bytes)

    monkeypatch.setattr(CpuLane, "host_buffer", counted)
    with spill_in("host", tmp_path) as spill:
        for shape in ((64, 8), (64, 8), (16, 8), (64, 8)):
            put(spill, 0, some(0, shape))
            assert same(spill.take(0), some(0, shape))
        assert made == [64 * 8 * 4], "what is smaller fits into the same place"
        put(spill, 0, some(0, (65, 8)))
        assert same(spill.take(0), some(0, (65, 8)))
        assert made == [64 * 8 * 4, 65 * 8 * 4]


def test_files_are_used_again(tmp_path: Path) -> None:
    with spill_in("disk", tmp_path) as spill:
        for step in range(3):
            for number in range(2):
                put(spill, number, some(step, (4 + step // 2, 6)))
            for number in (1, 0):
                assert same(spill.take(number), some(step, (4 + step // 2, 6)))
        assert len(list((tmp_path / "inputs").iterdir())) == 2


def test_what_is_no_block_of_memory_arrives_too(tmp_path: Path) -> None:
    (whole,) = some(3, (6, 4))
    with spill_in("host", tmp_path) as spill:
        spill.put(0, [whole.T, whole[1:3]])
        assert same(spill.take(0), [whole.T, whole[1:3]])


@pytest.mark.parametrize("harm", ["a flipped bit", "cut short", "gone"])
def test_damage_is_noticed_where_it_would_be_used(harm: str, tmp_path: Path) -> None:
    with spill_in("disk", tmp_path) as spill:
        for number in range(2):
            put(spill, number, some(number, (4, 6)))
        assert same(spill.take(1), some(1, (4, 6)))
        (path,) = (tmp_path / "inputs").glob("*-00000.safetensors")
        content = bytearray(path.read_bytes())
        if harm == "a flipped bit":
            content[-5] ^= 1
            path.write_bytes(content)
        elif harm == "cut short":
            path.write_bytes(content[:-5])
        else:
            path.unlink()
        words = {"a flipped bit": "not what was written", "cut short": "it was cut short", "gone": "it is gone"}
        with pytest.raises(RunError, match=words[harm]):
            spill.take(0)


@pytest.mark.parametrize("in_background", [True, False])
def test_a_full_disk_is_said(in_background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Home, piece: Piece, content: memoryview) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiskHome, "write", full)
    with (
        spill_in("disk", tmp_path, in_background=in_background) as spill,
        pytest.raises(EnvironmentProblem, match="No space left on device"),
    ):
        put(spill, 0, some(0, (4, 6)))
        put(spill, 1, some(1, (4, 6)))
