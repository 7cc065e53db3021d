"""The monitor's limit, and how it tells where memory went when there is none left."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from sophia_galore.config.schema import MemoryConfig
from sophia_galore.errors import EnvironmentProblem, ModelError, OutOfMemory
from sophia_galore.memory.monitor import MemoryMonitor
from sophia_galore.memory.out_of_memory import storage_names
from sophia_galore.memory.tracker import StorageTracker
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.weights.deferred import DeferredWeight
from sophia_galore.weights.int8 import Int8Format, quantise
from sophia_galore.weights.store import WeightStore

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MIB = 2**20
CUDA_ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has more.\nmore")


def floats(mib: float) -> Tensor:
    return torch.zeros(int(mib * MIB) // 4)


def limited(limit_mib: int = 10, **more: int) -> MemoryMonitor:
    return MemoryMonitor(CPU, MemoryConfig(limit=limit_mib * MIB, **more))


def test_with_a_limit_storages_are_followed_to_the_end() -> None:
    with limited(track_steps=0) as monitor:
        for step in (1, 2, 3):
            with monitor.phase("forward"):
                assert floats(step).numel()
            assert monitor.end_step(step)["allocated_bytes"] == step * MIB
            assert monitor.watches_tensors
    report = monitor.report()
    assert (report["limit_bytes"], report["peak_allocated_bytes"]) == (10 * MIB, 3 * MIB)
    assert report["measured_by"] == "storage tracker (the whole run)"
    json.dumps(report)


def test_a_refusal_is_explained_after_all_is_gone() -> None:
    with limited() as monitor:
        monitor.advice = lambda: "Do with less."
        with monitor.phase("load"):
            weights = torch.zeros(1024, 1024)
            monitor.names = lambda: {StorageTracker.storage_key(weights): "w"}
        explaining = monitor.explaining(lambda: "There is a way back.")
        with pytest.raises(OutOfMemory) as caught, explaining, monitor.phase("backward"):
            activations = [floats(1), floats(2)]
            monitor.tag(floats(0.5), "gradients")
            activations.append(floats(5))
        assert weights.numel()
    error = caught.value
    assert error.cause == (
        "Out of memory, in backward: 5 MiB more (1310720, float32) do not fit into memory.limit (10 MiB), "
        "7 MiB are taken. Since that began, activations grew most, from 0 bytes to 3 MiB. "
        "Largest: w (1024 x 1024, float32, 4 MiB); activations (524288, float32, 2 MiB); "
        "activations (262144, float32, 1 MiB)."
    )
    assert error.remedy == "Do with less. There is a way back."
    assert isinstance(error.__cause__, OutOfMemory)
    assert monitor.report()["peak_allocated_bytes"] <= 10 * MIB


def test_growth_is_told_from_the_beginning_of_the_innermost_phase() -> None:
    with limited() as monitor:
        with pytest.raises(OutOfMemory) as caught, monitor.explaining(), monitor.phase("eval"):
            outer = floats(6)
            with monitor.phase("head"):
                logits = floats(1)
                monitor.tag(logits, "logits")
                floats(4)
        assert "in the head: 4 MiB more" in caught.value.cause
        assert "logits grew most, from 0 bytes to 1 MiB" in caught.value.cause
        assert "Largest: activations (1572864, float32, 6 MiB); logits (" in caught.value.cause
        del outer, logits


def test_between_phases_there_is_no_growth_to_tell() -> None:
    with limited() as monitor, pytest.raises(OutOfMemory) as caught, monitor.explaining():
        floats(11)
    assert caught.value.cause == (
        "Out of memory: 11 MiB more (2883584, float32) do not fit into memory.limit (10 MiB), 0 bytes are taken."
    )
    assert caught.value.remedy.startswith("Raise memory.limit, or lower training.max_length")


def test_what_was_overcome_is_forgotten() -> None:
    with limited() as monitor:
        with pytest.raises(OutOfMemory), monitor.phase("forward"):
            floats(11)
        with pytest.raises(OutOfMemory) as caught, monitor.explaining():
            with monitor.phase("backward"):
                half = floats(5)
                assert half.numel()
            with monitor.phase("step"):
                floats(12)
    assert "in the optimizer's step: 12 MiB more" in caught.value.cause


@pytest.mark.parametrize(
    "error", [CUDA_ERROR, MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_other_allocators_errors_are_explained_too(error: Exception) -> None:
    with MemoryMonitor(CPU, MemoryConfig()) as monitor:
        with monitor.phase("load"):
            weights = floats(4)
        with pytest.raises(OutOfMemory) as caught, monitor.explaining(), monitor.phase("backward"):
            activations = floats(1)
            raise error
        assert weights.numel() and activations.numel()
    said = str(error).splitlines()[0].rstrip(".") if str(error) else "MemoryError"
    assert caught.value.cause == (
        f"Out of memory, in backward: {said}. Since that began, activations grew most, from 0 bytes to 1 MiB. "
        "Largest: weights (1048576, float32, 4 MiB); activations (262144, float32, 1 MiB)."
    )
    assert caught.value.remedy.startswith("Lower training.max_length")


@pytest.mark.parametrize("error", [ValueError("x"), ModelError("says out of memory", "Do."), KeyboardInterrupt()])
def test_other_errors_pass(error: BaseException) -> None:
    with limited() as monitor, pytest.raises(type(error)) as caught, monitor.explaining(), monitor.phase("forward"):
        raise error
    assert caught.value is error


def test_an_explanation_is_not_explained_again() -> None:
    monitor = limited()
    with pytest.raises(OutOfMemory) as caught, monitor.explaining(lambda: "More."), monitor.phase("forward"):
        raise OutOfMemory("The probe step is too large.", "Do with less.")
    assert (caught.value.cause, caught.value.remedy) == ("The probe step is too large.", "Do with less. More.")


def test_advice_may_be_found_by_trying_things_out() -> None:
    with limited() as monitor:

        def advice() -> str:
            return f"{floats(20).numel()} are too many."

        monitor.advice = advice
        with pytest.raises(OutOfMemory, match="5242880 are too many"), monitor.explaining(), monitor.phase("forward"):
            floats(11)
        assert monitor.watches_tensors
    assert monitor.report()["phases"]["forward"] == 0


def test_what_files_are_written_from_is_not_counted() -> None:
    with limited() as monitor, monitor.phase("load"):
        weights = floats(8)
        with monitor.apart():
            assert not monitor.watches_tensors
            copy = weights.clone()
        assert monitor.watches_tensors and copy.numel()
        with pytest.raises(OutOfMemory):
            weights.clone()
    assert monitor.report()["peak_allocated_bytes"] == 8 * MIB
    with MemoryMonitor(CPU, MemoryConfig(track_steps=0)) as monitor, monitor.apart():
        pass
    assert not monitor.watches_tensors


def test_names_are_those_of_files_and_cost_nothing() -> None:
    codes = quantise(torch.randn(4, 8), Int8Format(4), CPU)

    def factors() -> tuple[Tensor, Tensor]:
        raise AssertionError("would make tensors")

    folded = DeferredWeight(quantise(torch.randn(4, 8), Int8Format(4), CPU), torch.ones(1), factors)
    plain = torch.zeros(3)
    names = storage_names(WeightStore({"a": plain, "b": codes, "c": folded}), ParamOptimizer((), seed=0, device=CPU))
    tensors = (plain, codes.codes, codes.scales, folded.base.codes, folded.base.scales)
    found = [names[StorageTracker.storage_key(tensor)] for tensor in tensors]
    assert found == ["a", "b", "b.scales", "c", "c.scales"]


# ---- on a card


class Card:
    """Stands in for a card of 8 GiB, of which another program takes 1 GiB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fractions: list[float] = []
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7 * 2**30, 8 * 2**30))
        for name in ("memory_reserved", "max_memory_reserved", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda device: 0)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        monkeypatch.setattr(
            torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: self.fractions.append(fraction)
        )


@pytest.mark.parametrize(
    ("asked", "fraction"),
    [({}, None), ({"limit": "4GiB"}, 3 / 8), ({"limit": "8GiB"}, 7 / 8), ({"limit": "4GiB", "reserve": 0}, 4 / 8)],
)
def test_the_allocator_is_capped_and_freed_again(
    asked: dict[str, object], fraction: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(monkeypatch)
    expected = [] if fraction is None else [fraction]
    with pytest.raises(ValueError, match="x"), MemoryMonitor(GPU, MemoryConfig.model_validate(asked)) as monitor:
        assert card.fractions == expected
        for step in (1, 2):
            monitor.end_step(step)
        assert not monitor.watches_tensors, "the allocator keeps the limit, so nobody has to look on"
        assert card.fractions == expected
        raise ValueError("x")
    assert card.fractions == expected + [1.0] * len(expected)


def test_a_limit_above_the_card_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    monitor = MemoryMonitor(GPU, MemoryConfig(limit=9 * 2**30))
    with pytest.raises(EnvironmentProblem, match=r"9.00 GiB, but the GPU has only 8.00 GiB"):
        monitor.__enter__()
    assert card.fractions == [] and not monitor.watches_tensors


def test_a_card_without_memory_names_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    Card(monkeypatch)
    monitor = MemoryMonitor(GPU, MemoryConfig(limit=4 * 2**30, track_steps=0))
    with monitor, pytest.raises(OutOfMemory) as caught, monitor.explaining(), monitor.phase("backward"):
        raise CUDA_ERROR
    assert caught.value.cause == (
        "Out of memory, in backward: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has more. "
        "The limit is memory.limit (4.00 GiB)."
    )
