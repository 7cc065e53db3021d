"""Layer-wise gradients against ordinary autograd of the same Hugging Face model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engines import by_expert, fixed, gradients_of, load_parts, make_engine, parts_of, take_step
from sophia_galore.data.batches import MicroBatch
from sophia_galore.engine import cross_entropy, layerwise
from sophia_galore.engine.head import Head
from sophia_galore.model.experts import run_one_by_one
from sophia_galore.numerics.subspace import Projector, projection_side
from tiny import FAMILIES, autograd_loss, more_families, ragged_batches, tiny_model

# Relative error of a parameter's gradient. Both sides are float32; over 12 seeds the worst seen is 1.2e-7.
FP32_TOLERANCE = 5e-7
# Half precision: one rounding is 2^-9 (bf16) or 2^-12 (fp16) relative; through three layers, forward
# and backward, the worst seen are 3.6e-2 and 5.2e-3.
HALF_TOLERANCE = {torch.bfloat16: 6e-2, torch.float16: 1e-2}


def gradients(folder: Path, compute_dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    architecture, store = load_parts(folder)
    got: dict[str, Tensor] = {}
    engine = make_engine(architecture, store, compute_dtype=compute_dtype)
    result = take_step(engine, ragged_batches(), lambda grads: got.update(grads), step=1)
    return result.loss, got


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_autograd(tmp_path: Path, family: str, tied: bool) -> None:
    model = tiny_model(family, tied=tied)
    model.save_pretrained(tmp_path)
    expected_loss = autograd_loss(model.train(), ragged_batches())
    loss, got = gradients(tmp_path, torch.float32)
    assert loss == pytest.approx(expected_loss, rel=1e-6)  # float32 sums of some 50 tokens
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert got.keys() == expected.keys()
    errors = {name: float((got[name] - grad).norm() / grad.norm()) for name, grad in expected.items()}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= FP32_TOLERANCE, worst


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", more_families())
def test_gradients_of_more_families_equal_autograd(family: str, tied: bool) -> None:
    """Mixtures by transformers' plainest way to run experts; others sum in another order."""
    model = tiny_model(family, tied=tied).train()
    run_one_by_one(model.config)
    expected_loss = autograd_loss(model, ragged_batches())
    architecture, store = parts_of(model)
    assert architecture.tied is tied
    got: dict[str, Tensor] = {}
    engine = make_engine(architecture, store, frozen=fixed(architecture))
    loss = take_step(engine, ragged_batches(), got.update, step=1).loss
    assert loss == pytest.approx(expected_loss, rel=1e-6)  # float32 sums of some 50 tokens
    expected = by_expert(architecture, gradients_of(model))
    # An expert without tokens is left alone.
    assert expected.keys() - got.keys() == {name for name, grad in expected.items() if not grad.any()}
    assert all(architecture.is_expert(name) for name in expected.keys() - got.keys())
    errors = {name: float((grad - expected[name]).norm() / expected[name].norm()) for name, grad in got.items()}
    worst = max(errors, key=errors.__getitem__)
    # The worst seen is 5.9e-7 (Gemma 4); autograd's own error, against float64, is up to 2.8e-4 (Qwen 3 Next).
    assert errors[worst] <= 1e-6, (worst, errors[worst])


@pytest.mark.parametrize("compute_dtype", HALF_TOLERANCE, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_half_precision_gradients_are_near(tmp_path: Path, family: str, compute_dtype: torch.dtype) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    autograd_loss(model, ragged_batches())
    _, got = gradients(tmp_path, compute_dtype)
    for name, parameter in model.named_parameters():
        assert got[name].dtype == torch.float32
        error = float((got[name] - parameter.grad).norm() / parameter.grad.norm())
        assert error <= HALF_TOLERANCE[compute_dtype], name


def repeated(batch: MicroBatch, times: int) -> MicroBatch:
    """A micro-batch with each of its rows so many times."""
    return replace(
        batch,
        input_ids=batch.input_ids.repeat(times, 1),
        attention_mask=None if batch.attention_mask is None else batch.attention_mask.repeat(times, 1),
        labels=batch.labels.repeat(times, 1),
        num_tokens=batch.num_tokens * times,
        num_counted=batch.num_counted * times,
    )


def test_fp16_does_not_underflow_where_plain_backward_would(tmp_path: Path) -> None:
    """A loss over very many tokens has gradients below fp16's smallest number, 6e-8."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    batches = [repeated(batch, 200) for batch in ragged_batches()]
    autograd_loss(model, batches)
    architecture, store = load_parts(tmp_path)
    got: dict[str, Tensor] = {}
    take_step(make_engine(architecture, store, compute_dtype=torch.float16), batches, lambda g: got.update(g), step=1)
    for name, parameter in model.named_parameters():
        error = float((got[name] - parameter.grad).norm() / parameter.grad.norm())
        assert error <= HALF_TOLERANCE[torch.float16], name


def test_buffers_are_not_rounded_to_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    """Gemma 3 scales embeddings by a buffer; hub checkpoints say bfloat16, in which that number is another."""
    model = tiny_model("gemma3", hidden_size=72, num_attention_heads=4)  # the root of 72 is no bfloat16
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    expected = autograd_loss(model, ragged_batches())
    loss, _ = gradients(tmp_path, torch.float32)
    assert loss == pytest.approx(expected, rel=1e-6)  # float32 sums of some 50 tokens


def test_evaluation_is_the_loss_of_the_model(tmp_path: Path) -> None:
    model = tiny_model("gemma2", tied=False).eval()
    model.save_pretrained(tmp_path)
    with torch.enable_grad():
        expected = autograd_loss(model, ragged_batches())
    architecture, store = load_parts(tmp_path)
    total, count = make_engine(architecture, store).evaluate(ragged_batches())
    assert total / count == pytest.approx(expected, rel=1e-6)  # float32 sums of some 50 tokens


@pytest.mark.parametrize("key", ["embd_pdrop", "resid_pdrop"])  # before the first layer, and inside of layers
def test_dropout_is_a_function_of_seed_and_step(key: str) -> None:
    architecture, store = parts_of(tiny_model("gpt2", **{key: 0.3}))

    def loss(step: int, seed: int = 0) -> float:
        engine = make_engine(architecture, store, seed=seed)
        return take_step(engine, ragged_batches(), lambda grads: None, step=step).loss

    first = loss(1)
    torch.manual_seed(5)  # a draw is no part of torch's stream
    assert loss(1) == first
    assert loss(2) != first and loss(1, seed=1) != first


def test_dropout_draws_the_same_in_forward_and_recomputation(tmp_path: Path) -> None:
    """With dropout the gradient is the derivative of the loss that was computed: checked by differences."""
    tiny_model("llama", attention_dropout=0.3).save_pretrained(tmp_path)
    architecture, store = load_parts(tmp_path)
    engine = make_engine(architecture, store)
    name = "model.layers.0.mlp.down_proj.weight"
    got: dict[str, Tensor] = {}
    take_step(engine, ragged_batches(), lambda grads: got.update(grads), step=7)
    direction = got[name] / got[name].norm()
    losses = []
    for shift in (1e-2, -1e-2):
        store[name].first.add_(direction, alpha=shift)
        losses.append(take_step(engine, ragged_batches(), lambda grads: None, step=7).loss)
        store[name].first.sub_(direction, alpha=shift)
    slope = (losses[0] - losses[1]) / 2e-2
    # Second order in the shift and float32 losses of about 6: worst seen 2e-4 relative.
    assert slope == pytest.approx(float(got[name].norm()), rel=5e-3)
    assert take_step(engine, ragged_batches(), lambda grads: None, step=8).loss != losses[0]


def drawn_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, projectors: dict[str, Projector]
) -> tuple[float, dict[str, Tensor], Tensor]:
    """Loss, gradients or products, and labels of a step on drawn labels."""
    heads: list[Head] = []
    monkeypatch.setattr(layerwise, "Head", lambda *args, **kwargs: heads.append(Head(*args, **kwargs)) or heads[-1])
    architecture, store = load_parts(folder)
    got: dict[str, Tensor] = {}
    result = take_step(
        make_engine(architecture, store),
        ragged_batches(),
        lambda grads: got.update(grads),
        step=1,
        wants=projectors.get,
        sampled=True,
    )
    return result.loss, got, heads[0].labels


@pytest.mark.parametrize("projected", [False, True], ids=["whole", "projected"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2 caps its logits
def test_gradients_of_drawn_labels_equal_autograd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, tied: bool, projected: bool
) -> None:
    """A tied head's second pass over the chunks has the labels that the first one drew."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", {"cpu": 1})
    monkeypatch.setattr(cross_entropy, "_MIN_TOKENS", 8)
    model = tiny_model(family, tied=tied)
    model.save_pretrained(tmp_path)
    projectors = {
        name: Projector(torch.randn(min(parameter.shape), 8), projection_side(parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and projected
    }
    loss, got, labels = drawn_step(tmp_path, monkeypatch, projectors)
    batches = ragged_batches()
    parts = labels.split([batch.num_counted for batch in batches])
    drawn = []
    for batch, part in zip(batches, parts, strict=True):
        its_labels = batch.labels.clone()
        its_labels[its_labels != -100] = part
        assert not torch.equal(its_labels, batch.labels)
        drawn.append(replace(batch, labels=its_labels))
    assert autograd_loss(model, drawn) == pytest.approx(loss, rel=1e-6)  # float32 sums of some 50 tokens
    for name, parameter in model.named_parameters():
        expected = projectors[name].of(parameter.grad) if name in projectors else parameter.grad
        error = float((got[name] - expected).norm() / expected.norm())
        assert error <= 2e-6, name  # chunks are sums in another order; worst seen 3.1e-7
