"""What the layer-wise engine promises for every family of models."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engines import load_parts, make_engine, take_step
from sophia_galore.engine import cross_entropy, layerwise
from sophia_galore.engine.cross_entropy import cap
from sophia_galore.engine.head import Head
from sophia_galore.engine.layerwise import LayerwiseEngine
from sophia_galore.engine.observe import Category, Observer
from sophia_galore.errors import NonFiniteError, RunError
from sophia_galore.memory.tracker import StorageTracker
from sophia_galore.numerics.clocks import Clocks
from sophia_galore.weights.store import WeightStore
from tiny import FAMILIES, ragged_batches, tiny_model

TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def engine_for(folder: Path, family: str, tied: bool) -> tuple[LayerwiseEngine, WeightStore]:
    tiny_model(family, tied=tied).save_pretrained(folder)
    architecture, store = load_parts(folder)
    return make_engine(architecture, store), store


def all_gradients(engine: LayerwiseEngine, batches: list) -> dict[str, Tensor]:  # type: ignore[type-arg]
    got: dict[str, Tensor] = {}
    take_step(engine, batches, lambda grads: got.update(grads), step=1)
    return got


@TIED
@pytest.mark.parametrize("family", FAMILIES)
def test_one_layer_has_gradients_at_a_time(tmp_path: Path, family: str, tied: bool) -> None:
    """When a layer's gradients are handed on, no storage of an earlier layer's gradients is alive."""
    engine, _ = engine_for(tmp_path, family, tied)
    alive: list[tuple[str, weakref.ref[object]]] = []
    groups: list[set[str]] = []

    def apply(grads: dict[str, Tensor]) -> None:
        gc.collect()
        assert not [name for name, reference in alive if reference() is not None], "gradients of another layer live on"
        alive.clear()
        alive.extend((name, weakref.ref(grad.untyped_storage())) for name, grad in grads.items())
        groups.append({name.rsplit(".", 1)[0].split("self_attn")[0].split("mlp")[0] for name in grads})

    take_step(engine, ragged_batches(), apply, step=1)
    assert len(groups) == 3 + 2  # three layers, the head (with its norm), the embedding


class _GradientBytes(Observer):
    """Largest sum of bytes that were gradients at the same time."""

    watches_tensors = True

    def __init__(self, tracker: StorageTracker) -> None:
        self.tracker, self.peak = tracker, 0

    def tag(self, tensor: Tensor, category: Category) -> None:
        self.tracker.tag(tensor, category)
        self.peak = max(self.peak, self.tracker.by_category["gradients"])


@pytest.mark.parametrize("keep_layers", [0, 3])
@TIED
def test_gradient_storages_never_exceed_one_unit(tmp_path: Path, tied: bool, keep_layers: int) -> None:
    """Counted by storages: the sum of live gradients is at most that of the largest layer, head or embedding."""
    tiny_model("llama", tied=tied).save_pretrained(tmp_path)
    architecture, store = load_parts(tmp_path)
    sizes = {name: 4 * shape.numel() for name, shape in architecture.parameter_shapes().items()}
    units = [
        sum(size for name, size in sizes.items() if name.startswith(f"{layer}.")) for layer in architecture.layer_names
    ]
    units += [sizes[architecture.embed_name], sizes[architecture.head_name] + sizes["model.norm.weight"]]
    tracker = StorageTracker(torch.device("cpu"))
    observer = _GradientBytes(tracker)
    with tracker:
        engine = make_engine(architecture, store, observer=observer, keep_layers=keep_layers)
        take_step(engine, ragged_batches(), lambda grads: None, step=1)
    assert max(units) * 0.9 <= observer.peak <= max(units)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_order_of_micro_batches_does_not_matter(tmp_path: Path, family: str) -> None:
    engine, _ = engine_for(tmp_path, family, True)
    one = all_gradients(engine, ragged_batches())
    other = all_gradients(engine, list(reversed(ragged_batches())))
    for name, grad in one.items():
        # Sums of three float32 terms in another order; worst seen 3e-7.
        assert float((grad - other[name]).norm() / grad.norm()) <= 2e-6, name


def test_accumulation_is_exact(tmp_path: Path) -> None:
    """Micro-batches weigh as much as their counted tokens, not one each: gradients add up by token."""
    engine, _ = engine_for(tmp_path, "llama", True)
    batches = ragged_batches()
    whole = all_gradients(engine, batches)
    counts = [batch.num_counted for batch in batches]
    parts = [all_gradients(engine, [batch]) for batch in batches]
    for name, grad in whole.items():
        summed = sum(part[name] * count for part, count in zip(parts, counts, strict=True)) / sum(counts)
        assert float((grad - summed).norm() / grad.norm()) <= 2e-6, name  # as above


def test_chunks_of_the_head_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = engine_for(tmp_path, "gemma2", True)
    whole = all_gradients(engine, ragged_batches())
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", {"cpu": 1})
    monkeypatch.setattr(cross_entropy, "_MIN_TOKENS", 3)
    chunked = all_gradients(engine, ragged_batches())
    for name, grad in whole.items():
        assert float((grad - chunked[name]).norm() / grad.norm()) <= 2e-6, name  # sums in another order


def test_logits_never_exist_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", {"cpu": 1})
    monkeypatch.setattr(cross_entropy, "_MIN_TOKENS", 4)
    engine, _ = engine_for(tmp_path, "llama", True)
    rows: list[int] = []
    original = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        cross_entropy.functional, "cross_entropy", lambda z, *a, **k: rows.append(len(z)) or original(z, *a, **k)
    )
    take_step(engine, ragged_batches(), lambda grads: None, step=1)
    engine.evaluate(ragged_batches())
    assert rows and max(rows) == 4


def test_weights_step_while_the_engine_goes_back(tmp_path: Path) -> None:
    """A layer that was stepped must not change the gradients of the layers below it in the same step."""
    engine, store = engine_for(tmp_path, "llama", False)
    untouched = all_gradients(engine, ragged_batches())
    stepped: dict[str, Tensor] = {}

    def apply(grads: dict[str, Tensor]) -> None:
        stepped.update({name: grad.clone() for name, grad in grads.items()})
        for name in grads:
            store[name].first.add_(1.0)

    take_step(engine, ragged_batches(), apply, step=1)
    assert all(torch.equal(stepped[name], grad) for name, grad in untouched.items())


def test_a_bad_loss_stops_before_anything_is_handed_on(tmp_path: Path) -> None:
    engine, store = engine_for(tmp_path, "llama", True)
    store["model.layers.1.mlp.up_proj.weight"].first[0, 0] = float("nan")
    handed: list[object] = []
    with pytest.raises(NonFiniteError, match="at step 5"):
        take_step(engine, ragged_batches(), handed.append, step=5)
    assert not handed


def test_a_parameter_without_gradient_is_named(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    architecture, store = load_parts(tmp_path)
    mlp = architecture.layers[1].mlp
    mlp.forward = lambda hidden: hidden  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"model\.layers\.1\.mlp\.\w+\.weight gets no gradient"):
        take_step(make_engine(architecture, store), ragged_batches(), lambda grads: None, step=1)


def test_drawn_labels_are_a_function_of_seed_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[Head] = []
    monkeypatch.setattr(layerwise, "Head", lambda *args, **kwargs: heads.append(Head(*args, **kwargs)) or heads[-1])
    tiny_model("llama").save_pretrained(tmp_path)
    architecture, store = load_parts(tmp_path)

    def labels(seed: int, step: int, sampled: bool = True) -> Tensor:
        engine = make_engine(architecture, store, seed=seed)
        take_step(
            engine,
            ragged_batches(),
            lambda grads: None,
            step=step,
            sampled=sampled,
        )
        return heads[-1].labels

    first = labels(0, 1)
    torch.manual_seed(5)  # a draw is no part of torch's stream
    assert torch.equal(labels(0, 1), first)
    assert not torch.equal(labels(0, 2), first)
    assert not torch.equal(labels(1, 1), first)
    data = torch.cat([batch.labels[batch.labels != -100] for batch in ragged_batches()])
    assert torch.equal(labels(0, 1, sampled=False), data)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_drawn_labels_follow_the_softmax(softcap: float | None) -> None:
    num_draws, vocab = 20_000, 12
    logits = 2 * torch.randn(vocab, generator=torch.Generator().manual_seed(0))
    capped = cap(logits, softcap)
    _, drawn = Clocks(0, ("test",)).sample(capped.repeat(num_draws, 1), slice(0, num_draws), slice(0, vocab))
    expected = num_draws * capped.softmax(0)
    # Pearson's sum has 11 degrees of freedom: 11 on average, above 31.3 once in 1000. Worst seen of 50 keys: 26.5.
    assert float(((drawn.bincount(minlength=vocab) - expected) ** 2 / expected).sum()) <= 31.3


def test_the_mean_gradient_of_drawn_labels_vanishes(tmp_path: Path) -> None:
    """By its labels' own distribution a loss has gradient zero on average: what is left falls as 1 / sqrt(draws)."""
    engine, _ = engine_for(tmp_path, "llama", True)
    draws: list[Tensor] = []
    for step in range(64):
        got: dict[str, Tensor] = {}
        take_step(
            engine,
            ragged_batches(),
            lambda grads, got=got: got.update(grads),
            step=step,
            sampled=True,
        )
        draws.append(got["model.layers.1.mlp.down_proj.weight"])
    stacked = torch.stack(draws)
    # Independent draws of mean zero: the ratio is 1 / 8 on average; worst seen of 5 seeds 0.133.
    assert float(stacked.mean(0).norm() / stacked.norm(dim=(1, 2)).square().mean().sqrt()) <= 0.2


def test_a_loss_that_is_not_finite_stops_drawn_labels_too(tmp_path: Path) -> None:
    engine, store = engine_for(tmp_path, "llama", True)
    store["model.layers.1.mlp.up_proj.weight"].first[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="at step 5"):
        take_step(engine, ragged_batches(), lambda grads: None, step=5, sampled=True)
