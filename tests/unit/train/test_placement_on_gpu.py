"""A run on a GPU has the same bits wherever its layers are between uses; also on what stands for a GPU."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fake_cuda import Order, fake_cuda
from sophia_galore.engine.stepper import Stepper
from sophia_galore.records.files import METRICS
from sophia_galore.streaming import open as opening
from sophia_galore.streaming.lanes import CudaLane
from sophia_galore.weights.safetensors_layout import bytes_of
from unit.cli.tiny_run import World, json_lines, make_world

Way = tuple[str, str]
"""Where layers are, and whether they are fetched ahead."""

# How weights are stored, and how many layers stay.
KINDS: dict[str, tuple[tuple[str, ...], int]] = {
    "plain": ((), 0),
    "int8 with late updates": (("quantization.enabled=true", "quantization.fold=refresh"), 1),
}


@contextmanager
def standing_for_cuda(copies: Order) -> Iterator[None]:
    """The steps of a run on a CPU are made as on a GPU, in the worst order for copies that come late, or early."""
    take = Stepper.take
    with fake_cuda(copies) as fake, pytest.MonkeyPatch.context() as patch:

        def watched(*args: Any, **kwargs: Any) -> Any:
            with fake.watching():
                result = take(*args, **kwargs)
                torch.cuda.current_stream().synchronize()  # as what follows does, which reads results
                return result

        patch.setattr(Stepper, "take", watched)
        patch.setattr(opening, "CpuLane", lambda: CudaLane(torch.device("cpu"), 1 << 20))
        yield


def digest(folder: Path) -> str:
    """Digest of a run's final tensors, however many files they are in."""
    files = [load_file(file) for file in folder.glob("model*.safetensors")]
    assert files
    found = hashlib.sha256()
    for name, tensor in sorted((name, tensor) for file in files for name, tensor in file.items()):
        found.update(name.encode() + bytes_of(tensor.contiguous()))
    return found.hexdigest()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def trained(world: World) -> Callable[..., tuple[str, list[float]]]:
    """Train; gives the digest of the model and the losses."""
    runs: dict[tuple[str, ...], tuple[str, list[float]]] = {}

    def train(*words: str) -> tuple[str, list[float]]:
        folder = f"run{len(runs)}"
        ended = world.train(folder, "training.max_steps=4", *words)
        assert ended.code == 0, ended.err
        records = json_lines(world.folder / folder / METRICS)
        losses = [record["loss"] for record in records if "loss" in record]
        runs[words] = digest(world.folder / folder), losses
        return runs[words]

    return lambda *words: runs.get(words) or train(*words)


def words_of(kind: str, way: Way) -> tuple[str, ...]:
    weights, num_resident = KINDS[kind]
    placement, prefetch = way
    return (
        *weights,
        f"memory.placement={placement}",
        f"memory.prefetch={prefetch}",
        f"memory.resident_layers={num_resident}",
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "copies, way",
    [
        ("late", ("host", "true")),
        ("early", ("host", "false")),
        ("late", ("disk", "false")),
        ("early", ("disk", "true")),
    ],
)
def test_on_what_stands_for_a_gpu(
    copies: Order, way: Way, kind: str, trained: Callable[..., tuple[str, list[float]]]
) -> None:
    weights, _ = KINDS[kind]
    expected = trained("training.device=cpu", "memory.placement=device", *weights)
    with standing_for_cuda(copies):
        assert trained("training.device=cpu", *words_of(kind, way)) == expected


@pytest.mark.parametrize(
    "copies, left_out, way", [("late", "wait_here", ("host", "true")), ("early", "begin", ("disk", "true"))]
)
def test_it_would_show_a_missing_wait(
    copies: Order,
    left_out: str,
    way: Way,
    trained: Callable[..., tuple[str, list[float]]],
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = trained("training.device=cpu", "memory.placement=device")
    with standing_for_cuda(copies):
        monkeypatch.setattr(CudaLane, left_out, lambda self, mark: None)
        folder = f"without_{left_out}"
        ended = world.train(folder, "training.max_steps=4", "training.device=cpu", *words_of("plain", way))
    assert ended.code != 0 or digest(world.folder / folder) != expected[0]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", list(product(("host", "disk"), ("true", "false"))))
def test_on_a_gpu(way: Way, kind: str, trained: Callable[..., tuple[str, list[float]]]) -> None:
    weights, _ = KINDS[kind]
    expected = trained("training.device=cuda", "memory.placement=device", *weights)
    assert trained("training.device=cuda", *words_of(kind, way)) == expected


def test_a_run_leaves_no_thread(world: World) -> None:
    words = ("training.device=cpu", "training.max_steps=1", *words_of("plain", ("host", "true")))
    assert world.train("ended", *words).code == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("streaming")]
