"""Without memory the engine does what it does with it: the same bytes, category by category, in every phase.

The same code is run twice, once on tensors that have no bytes and once on real ones, and both runs write down what
each phase did. Nothing is rounded, so nothing may differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

import pytest
import torch

from planning import asked, tiny_planner
from sophia_galore.config.dump import changed
from sophia_galore.config.schema import RunConfig
from sophia_galore.memory import simulation
from sophia_galore.memory.simulation import FewLayers, Simulated, simulate, take_layers
from sophia_galore.memory.tracker import StorageTracker
from sophia_galore.plan.decisions import Decisions
from sophia_galore.weights.plain import PlainWeight
from tiny import FAMILIES as ALL_FAMILIES
from tiny import packed_batches, ragged_batches

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "tracked": {},
    "svd": {"optimizer.galore.subspace": "svd"},
    "random": {"optimizer.galore.subspace": "random"},
    "adafactor": {"optimizer.galore.rule": "adafactor", "optimizer.galore.adaptive_gap": True},
    "sgd": {"optimizer.galore.rule": "sgd"},
    "galore, sophia": {"optimizer.galore.rule": "sophia", "optimizer.sophia.curvature_every": 2},
    "fira": {"optimizer.galore.residual": "fira"},
    "muon": {"optimizer.galore.rule": "muon"},
    "adamw": {"optimizer.type": "adamw"},
    "8-bit state": {"optimizer.state_bits": 8},
    "4-bit bases": {"optimizer.galore.projection_bits": 4},
    "fold": {"quantization.enabled": True, "quantization.fold": "refresh"},
    "randomized": {"optimizer.galore.subspace": "randomized", "optimizer.galore.projection_bits": 32},
    "sophia": {"optimizer.type": "sophia", "optimizer.sophia.curvature_every": 2},
    "apollo": {"optimizer.type": "apollo"},
    "apollo_mini": {"optimizer.type": "apollo_mini"},
    "scale": {"optimizer.type": "scale"},
    "adamw, 16-bit state": {"optimizer.type": "adamw", "optimizer.state_bits": 16},
}
FAMILIES = ("llama", "qwen2", "gemma3")  # Qwen 2 with a head of its own; Gemma 3 with two kinds of attention
COMPUTE = ("fp32", "bf16", "fp16")
STORES = ("fp32", "bf16", "int8")
CLIPS = ("nothing", "model", "layer")
TABLES: tuple[tuple[Any, ...], ...] = (FAMILIES, COMPUTE, STORES, CLIPS, (0, 1))


def deal() -> Iterator[tuple[Any, ...]]:
    """The words of each case: two hands of an orthogonal array, in which each pair of words meets."""
    for index, name in enumerate(OPTIMIZERS):
        row, column = divmod(index % 9, 3)
        kept = index // 9
        yield name, FAMILIES[column], COMPUTE[row], STORES[(row + column) % 3], CLIPS[(row + 2 * column) % 3], kept


CASES = list(deal())


def test_every_pair_meets() -> None:
    for (one, words), (other, more) in combinations(enumerate(TABLES), 2):
        assert {(case[1 + one], case[1 + other]) for case in CASES} == set(product(words, more))
    assert [case[3] for case in CASES if case[0] == "fold"] == ["int8"], "it is about weights in eight bits"


def config_of(name: str, compute: str, store: str, clip: str) -> RunConfig:
    values = {**OPTIMIZERS[name], "training.compute_dtype": compute}
    values |= {"quantization.enabled": True} if store == "int8" else {"model.store": store}
    if clip != "nothing":
        # By the model only where that can be done: else by the layer as well.
        values |= {"training.max_grad_norm": 0.5, "training.clip_by": "auto" if clip == "model" else "layer"}
    return asked(values)


_empty_store = simulation._empty_store


def random_store(*given: Any) -> Any:
    """Weights that are no zeros, from which losses and bases follow that are none either."""
    store, draw = _empty_store(*given), torch.Generator().manual_seed(0)
    for _, weight in store.items():
        if isinstance(weight, PlainWeight):
            weight.tensor.copy_(0.1 * torch.randn(weight.shape, generator=draw))
        else:
            weight.codes.random_(-100, 100, generator=draw)
            weight.scales.fill_(0.001)
    return store


def simulate_with_memory(monkeypatch: pytest.MonkeyPatch, *given: Any, **more: Any) -> Simulated:
    with monkeypatch.context() as patched:
        patched.setattr(simulation, "FakeTensors", StorageTracker)
        patched.setattr(simulation, "_empty_store", random_store)
        return simulate(*given, **more)


def assert_same(without: Simulated, real: Simulated) -> None:
    assert without.evaluation == real.evaluation
    for step, (passes, others) in enumerate(zip(without.steps, real.steps, strict=True)):
        for one, other in zip(passes, others, strict=True):
            for place, (change, same) in enumerate(zip(one.changes, other.changes, strict=True)):
                assert change == same, f"step {step}, segment {place}, {same.phase}"


def few_layers(config: RunConfig, family: str) -> tuple[FewLayers, Decisions]:
    planner = tiny_planner(family, tied=family != "qwen2", num_layers=2)
    decided = planner.decide(config)
    return take_layers(planner.model_config, decided.routes, planner.layer_names, (0, 1)), decided


@pytest.mark.parametrize(
    ("name", "family", "compute", "store", "clip", "kept"), CASES, ids=["-".join(map(str, case)) for case in CASES]
)
def test_the_bytes_are_the_same(
    name: str, family: str, compute: str, store: str, clip: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, decided = few_layers(config_of(name, compute, store, clip), family)
    # Padded and ragged; at the second step some bases are made for the second time, and others are not.
    given: tuple[Any, ...] = (few, decided, ragged_batches()[1:], (1, 2))
    more: dict[str, Any] = {"eval_batches": ragged_batches()[:1], "keep_layers": kept}
    real = simulate_with_memory(monkeypatch, *given, **more)
    assert_same(simulate(*given, **more), real)
    num_passes = [len(passes) for passes in real.steps]
    assert num_passes == ([2, 1] if decided.curvature_every else [1, 1])


@pytest.mark.parametrize(
    ("compute", "store", "clip", "kept"),
    [("fp32", "fp32", "nothing", 0), ("fp16", "bf16", "layer", 1), ("bf16", "int8", "model", 0)],
)
def test_the_bytes_of_full_gradients_apart_are_the_same(
    compute: str, store: str, clip: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = {"engine.full_gradients": "matrix"}
    few, decided = few_layers(changed(config_of("tracked", compute, store, clip), apart), "qwen2")
    given: tuple[Any, ...] = (few, decided, ragged_batches()[1:], (1, 2))
    more: dict[str, Any] = {"keep_layers": kept}
    real = simulate_with_memory(monkeypatch, *given, **more)
    assert_same(simulate(*given, **more), real)


@pytest.mark.parametrize(
    ("family", "kept"),
    [
        # In the default run each family once, in turn with and without kept graphs.
        pytest.param(family, kept, marks=[pytest.mark.thorough] if (number + kept) % 2 else [])
        for number, family in enumerate(ALL_FAMILIES)
        for kept in (0, 1)
    ],
)
def test_the_bytes_of_packed_rows_are_the_same(family: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    few, decided = few_layers(asked({"optimizer.type": "adamw"}), family)
    given: tuple[Any, ...] = (few, decided, packed_batches(), (1, 2))
    more: dict[str, Any] = {"eval_batches": packed_batches(), "keep_layers": kept}
    assert_same(simulate(*given, **more), simulate_with_memory(monkeypatch, *given, **more))
