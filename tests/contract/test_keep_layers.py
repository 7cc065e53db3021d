"""Graphs that are kept through forward: the numbers of recomputation, and memory that is free again layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engines import CPU, everything_projected, load_parts, make_engine, take_step
from sophia_galore.data.portion import whole
from sophia_galore.engine.layer_graph import LayerGraph
from sophia_galore.engine.observe import Category, Observer, Phase
from sophia_galore.engine.stepper import Stepper
from sophia_galore.memory.tracker import StorageTracker
from sophia_galore.model.architecture import Architecture
from sophia_galore.numerics.hyper import Hyper
from sophia_galore.numerics.subspace import tensor_of
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.optim.spec import ParamSpec, SubspaceSpec
from sophia_galore.weights.int8 import Int8Format, quantise
from sophia_galore.weights.store import WeightStore
from tiny import ragged_batches, tiny_model

NUM_LAYERS = 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SOME = [1, 2, NUM_LAYERS, 99]  # more than there are counts as all


def int8_parts(folder: Path) -> tuple[Architecture, WeightStore]:
    """The model's matrices in eight bits."""
    architecture, store = load_parts(folder, torch.bfloat16)
    for name, weight in list(store.items()):
        if len(weight.shape) == 2:
            store[name] = quantise(weight.values(torch.float32), Int8Format(block=16))
    return architecture, store


def run(parts: tuple[Architecture, WeightStore], keep_layers: int, **more: Any) -> tuple[float, dict[str, Tensor]]:
    projectors, sampled = more.pop("projectors", {}), more.pop("sampled", False)
    engine = make_engine(*parts, keep_layers=keep_layers, **more)
    got: dict[str, Tensor] = {}
    result = take_step(
        engine,
        ragged_batches(),
        got.update,
        step=3,
        wants=projectors.get,
        sampled=sampled,
    )
    return result.loss, got


def assert_same_bits(one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]]) -> None:
    assert one[0] == other[0] and one[1].keys() == other[1].keys()
    assert not [name for name, grad in one[1].items() if not torch.equal(grad, other[1][name])]


@pytest.mark.pairwise
@pytest.mark.parametrize("compute_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_the_bits_of_recomputation(tmp_path: Path, family: str, compute_dtype: torch.dtype, dropout: float) -> None:
    tiny_model(family, attention_dropout=dropout).save_pretrained(tmp_path)
    parts = load_parts(tmp_path)
    expected = run(parts, 0, compute_dtype=compute_dtype)
    for keep_layers in SOME:
        assert_same_bits(run(parts, keep_layers, compute_dtype=compute_dtype), expected)


@pytest.mark.parametrize("compute_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", ["fp32", "int8"])
def test_the_bits_of_products(tmp_path: Path, stored: str, compute_dtype: torch.dtype) -> None:
    tiny_model("qwen2", tied=False).save_pretrained(tmp_path)
    parts = int8_parts(tmp_path) if stored == "int8" else load_parts(tmp_path)
    for projectors in ({}, everything_projected(parts[0])):
        how: dict[str, Any] = {"compute_dtype": compute_dtype, "projectors": projectors}
        expected = run(parts, 0, **how)
        for keep_layers in SOME:
            assert_same_bits(run(parts, keep_layers, **how), expected)


def test_the_bits_of_drawn_labels(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    parts = load_parts(tmp_path)
    assert_same_bits(run(parts, 2, sampled=True), run(parts, 0, sampled=True))


@pytest.mark.parametrize("fast", [False, True], ids=["whole", "products"])
def test_the_bits_of_steps_with_curvature(tmp_path: Path, fast: bool) -> None:
    """Sophia's estimate goes through the same engine, before the step and on the same weights."""
    tiny_model("llama").save_pretrained(tmp_path)
    ends: list[dict[str, Tensor]] = []
    for keep_layers in (0, 2):
        architecture, store = load_parts(tmp_path)
        subspace = SubspaceSpec(rank=6, gap=2, scale=0.5, kind="tracked", fast=fast)
        specs = [
            ParamSpec(
                name, tuple(shape), 1e-2, 0.0, Hyper(), rule="sophia", subspace=subspace if len(shape) == 2 else None
            )
            for name, shape in architecture.parameter_shapes().items()
        ]
        optimizer = ParamOptimizer(specs, seed=0, device=CPU)
        stepper = Stepper(
            make_engine(architecture, store, keep_layers=keep_layers), optimizer, store, curvature_every=2
        )
        for step in (1, 2, 3):
            stepper.take(whole(ragged_batches(step)), step=step, factor=1.0)
        ends.append({spec.name: store[spec.name].first.clone() for spec in specs})
    assert not [name for name, weight in ends[0].items() if not torch.equal(weight, ends[1][name])]


def test_fp16_tries_again_by_recomputation(tmp_path: Path) -> None:
    """The first try of each layer overflows: the kept graph is used up, and the second try needs none."""
    tiny_model("llama").save_pretrained(tmp_path)
    parts = load_parts(tmp_path)
    projectors = everything_projected(parts[0])
    ends = []
    for keep_layers in (0, 2):
        engine = make_engine(*parts, compute_dtype=torch.float16, keep_layers=keep_layers)
        original, graphs = engine._layers._one_pass, list[bool]()

        def first_try_overflows(*args: Any, original: Any = original, graphs: list[bool] = graphs) -> Any:
            graphs.append(bool(args[1].kept))
            grads, in_grads = original(*args)
            if len(graphs) % 2:
                tensor_of(next(iter(grads.values())))[0, 0] = float("inf")
            return grads, in_grads

        engine._layers._one_pass = first_try_overflows  # type: ignore[method-assign]
        got: dict[str, Tensor] = {}
        loss = take_step(engine, ragged_batches(), got.update, step=1, wants=projectors.get).loss
        assert graphs == ([True, False, True, False, False, False] if keep_layers else [False] * 6)
        ends.append((loss, got))
    assert_same_bits(ends[1], ends[0])


class _Phases(Observer):
    """The phases in their order, and what is alive when gradients are handed on."""

    watches_tensors = True

    def __init__(self, tracker: StorageTracker) -> None:
        self.tracker, self.entered, self.depth, self.alive = tracker, list[str](), 0, list[int]()

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        self.entered.append(name)
        if name == "step":
            self.alive.append(self.tracker.allocated_bytes)
        self.depth += 1
        assert self.depth == 1  # none within another
        yield
        self.depth -= 1

    def tag(self, tensor: Tensor, category: Category) -> None:
        self.tracker.tag(tensor, category)


@pytest.mark.parametrize("keep_layers", [0, 2])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_order_of_phases(tmp_path: Path, tied: bool, keep_layers: int) -> None:
    """The planner of memory goes by it."""
    tiny_model("llama", tied=tied).save_pretrained(tmp_path)
    observer = _Phases(StorageTracker(CPU))
    engine = make_engine(*load_parts(tmp_path), keep_layers=keep_layers, observer=observer)
    take_step(engine, ragged_batches(), lambda grads: None, step=1)
    forward = ["forward"] + ["forward"] * NUM_LAYERS
    backward = ["backward", "step"] * NUM_LAYERS
    last = ["backward", "head" if tied else "backward", "step"]
    assert observer.entered == [*forward, "head", "step", *backward, *last]
    observer.entered.clear()
    engine.evaluate(ragged_batches())
    assert observer.entered == ["eval"]


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_graph_holds_is_free_when_its_layer_is_done(tmp_path: Path, compute_dtype: torch.dtype) -> None:
    """Beside recomputation, what is alive when a layer is handed on is the graphs of the layers before it."""
    tiny_model("llama").save_pretrained(tmp_path)

    def alive(keep_layers: int) -> list[int]:
        architecture, store = load_parts(tmp_path)
        tracker = StorageTracker(CPU)
        observer = _Phases(tracker)
        engine = make_engine(
            architecture, store, keep_layers=keep_layers, observer=observer, compute_dtype=compute_dtype
        )
        with tracker:
            take_step(engine, ragged_batches(), lambda grads: None, step=1)
        return observer.alive

    plain = alive(0)
    for keep_layers in (1, 2, 3):
        more = [kept - base for kept, base in zip(alive(keep_layers), plain, strict=True)]
        # Head, layers 2, 1, 0, embedding.
        assert more[keep_layers:] == [0] * (5 - keep_layers)
        assert all(before > after for before, after in pairwise(more[: keep_layers + 1]))


def test_a_graph_is_one_layers_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins at leaves: the weights as the store holds them, and what entered, which no graph leads up to."""
    tiny_model("llama").save_pretrained(tmp_path)
    architecture, store = load_parts(tmp_path)
    engine = make_engine(architecture, store, keep_layers=NUM_LAYERS)
    graphs: list[LayerGraph] = []
    keep = engine._layers.keep

    def look(index: int, inputs: list[Tensor], *args: Any) -> Any:
        assert not any(entering.requires_grad for entering in inputs)
        out, graph = keep(index, inputs, *args)
        assert not any(part.requires_grad for part in out)
        for run, entering in zip(graph.kept, inputs, strict=True):
            assert run.entering.is_leaf and run.entering.data_ptr() == entering.data_ptr()
        for key, leaf in graph.leaves.items():
            weight = store[f"{architecture.layer_names[index]}.{key}"].first
            assert isinstance(weight, Tensor) and leaf.is_leaf and leaf.data_ptr() == weight.data_ptr()
        graphs.append(graph)
        return out, graph

    monkeypatch.setattr(engine._layers, "keep", look)
    take_step(engine, ragged_batches(), lambda grads: None, step=1)
    assert len(graphs) == NUM_LAYERS and not any(graph.kept for graph in graphs)


def test_evaluation_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    parts = load_parts(tmp_path)
    engine = make_engine(*parts, keep_layers=NUM_LAYERS)
    monkeypatch.setattr(engine._layers, "keep", None)
    assert engine.evaluate(ragged_batches()) == make_engine(*parts).evaluate(ragged_batches())
