"""A run on a GPU has the same bits wherever its layers are between uses; also on what stands for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path

import pytest
import torch

from fake_cuda import fake_cuda
from sophia_galore.records.files import METRICS
from sophia_galore.streaming import open as opening
from sophia_galore.streaming.lanes import CudaLane
from unit.cli.tiny_run import World, json_lines, make_world, sha256

WAYS = list(product(("host", "disk"), ("true", "false")))
# How weights are stored, and what of them streams.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "plain": ((), ("memory.resident_layers=0",)),
    "int8 with late updates": (
        ("quantization.enabled=true", "quantization.fold=refresh"),
        ("memory.resident_layers=1",),
    ),
}


@contextmanager
def late_copies() -> Iterator[None]:
    """Units visit a CPU as they would visit a GPU whose copies come as late as they may."""
    with fake_cuda("late"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "CpuLane", lambda: CudaLane(torch.device("cpu"), 1 << 20))
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bits_are_the_same_wherever_layers_are(device: str, kind: str, world: World) -> None:
    def trained(name: str, *words: str) -> tuple[str, list[float]]:
        output = f"{device} {name}".replace(" ", "-")
        ended = world.train(output, f"training.device={device}", *words)
        assert ended.code == 0, ended.err
        folder: Path = world.folder / output
        losses = [record["loss"] for record in json_lines(folder / METRICS) if "loss" in record]
        return sha256(folder / "model.safetensors"), losses

    weights, streams = KINDS[kind]
    expected = trained(f"{kind} device", "memory.placement=device", *weights)
    for placement, prefetch in WAYS:
        words = (f"memory.placement={placement}", f"memory.prefetch={prefetch}", *weights, *streams)
        with late_copies() if device == "cpu" else nullcontext():
            assert trained(f"{kind} {placement} {prefetch}", *words) == expected
