"""The head by blocks of the vocabulary, where its weight must be decoded, against the head in one piece."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engines import load_parts, make_engine, take_step
from sophia_galore.engine import cross_entropy, head, layerwise
from sophia_galore.engine import logits as logits_module
from sophia_galore.engine.head import Head
from sophia_galore.engine.logits import BlockLogits, LossOf, Tile, WholeLogits
from sophia_galore.engine.observe import Observer
from sophia_galore.model.architecture import Architecture
from sophia_galore.numerics.clocks import Clocks
from sophia_galore.numerics.subspace import Projector, Side
from sophia_galore.weights.int8 import Int8Format, quantise
from sophia_galore.weights.store import WeightStore
from tiny import VOCAB, autograd_loss, ragged_batches, tiny_model

TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
FORMATS = pytest.mark.parametrize("stored", ["int8", "bf16"])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Sums of up to 320 float32 terms in other orders, through the three layers; over all tests here the worst seen is
# 6.6e-7. In half precision a token's gradient is a float32 sum of rounded parts here, and rounded once in one
# piece, and three layers add to it: the worst seen are 1.1e-2 and 1.7e-3.
TOLERANCES = {"fp32": 3e-6, "bf16": 2e-2, "fp16": 3e-3}


@pytest.fixture(autouse=True, params=[(7, 8), (64, 24), (192, 5)], ids=["blocks of 7", "blocks of 64", "blocks of 192"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and chunks that do not divide 320 words and the counted tokens."""
    block, chunk = request.param
    monkeypatch.setattr(cross_entropy, "_MIN_ENTRIES", block)
    monkeypatch.setattr(cross_entropy, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", {"cpu": 4 * block * chunk})
    monkeypatch.setattr(cross_entropy, "_MIN_TOKENS", 1)
    monkeypatch.setattr(head, "_NORM_TOKENS", 11)


def parts(folder: Path, family: str, tied: bool, stored: str) -> tuple[Architecture, WeightStore]:
    """A tiny model whose matrices are in eight bits, or all of it in bfloat16."""
    tiny_model(family, tied=tied).save_pretrained(folder)
    architecture, store = load_parts(folder, torch.bfloat16)
    if stored == "int8":
        for name, weight in list(store.items()):
            if isinstance(weight, Tensor) and weight.ndim == 2:
                store[name] = quantise(weight.values(torch.float32), Int8Format(block=16))
    return architecture, store


def one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(store: WeightStore, name: str, dtype: torch.dtype, loss: LossOf, observer: Observer) -> WholeLogits:
        return WholeLogits(store, name, dtype, loss, observer)

    monkeypatch.setattr(head, "logits_of", whole)


def run(
    architecture: Architecture, store: WeightStore, dtype: str, projectors: dict[str, Projector] | None = None
) -> tuple[float, dict[str, Tensor]]:
    got: dict[str, Tensor] = {}
    engine = make_engine(architecture, store, compute_dtype=DTYPES[dtype])
    wanted = (projectors or {}).get
    result = take_step(engine, ragged_batches(), lambda grads: got.update(grads), step=1, wants=wanted)
    return result.loss, got


def worst(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    # Biases of keys have gradients that cancel to roundings.
    return max(
        float((got[name] - grad).norm() / grad.norm()) for name, grad in expected.items() if "k_proj.bias" not in name
    )


def head_projectors(architecture: Architecture, side: Side | None) -> dict[str, Projector]:
    if side is None:
        return {}
    draw, shapes = torch.Generator().manual_seed(1), architecture.parameter_shapes()
    made = {}
    for name in {architecture.head_name, architecture.embed_name}:
        length = shapes[name][1 if side == "right" else 0]
        made[name] = Projector(torch.randn(length, 8, generator=draw) / length**0.5, side)
    return made


@pytest.mark.pairwise
@TIED
@FORMATS
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_give_what_one_piece_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str, tied: bool, side: Side | None, dtype: str
) -> None:
    if stored == dtype:
        pytest.skip("what is stored as it is computed with is worked on in one piece")
    architecture, store = parts(tmp_path, "gemma2", tied, stored)
    projectors = head_projectors(architecture, side)
    loss, got = run(architecture, store, dtype, projectors)
    one_piece(monkeypatch)
    expected_loss, expected = run(architecture, store, dtype, projectors)
    assert loss == pytest.approx(expected_loss, rel=1e-6)  # float32 sums of 320 exponentials; worst seen 3.8e-8
    assert worst(got, expected) <= TOLERANCES[dtype]


@TIED
@FORMATS
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])  # gemma2 caps its logits
def test_gradients_equal_autograd_on_the_decoded_weights(tmp_path: Path, stored: str, tied: bool, family: str) -> None:
    architecture, store = parts(tmp_path, family, tied, stored)
    model = tiny_model(family, tied=tied).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(store[name].values(torch.float32))
    expected_loss = autograd_loss(model, ragged_batches())
    loss, got = run(architecture, store, "fp32")
    assert loss == pytest.approx(expected_loss, rel=1e-6)  # float32 sums of some 50 tokens
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert worst(got, expected) <= TOLERANCES["fp32"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_tiles_against_float64(tmp_path: Path, dtype: str, softcap: float | None) -> None:
    """Loss, and both gradients that come of a walk, by autograd in float64 from the decoded, rounded weight."""
    _, store = parts(tmp_path, "llama", True, "int8")
    name, compute = "model.embed_tokens.weight", DTYPES[dtype]
    draw = torch.Generator().manual_seed(0)
    normed = torch.randn(50, 64, generator=draw).to(compute)
    labels = torch.randint(VOCAB, (50,), generator=draw)
    logits = BlockLogits(store, name, compute, LossOf(labels, softcap, None, 4 * 64 * 16), Observer())
    normed_grad, weight_grad = torch.zeros(50, 64), torch.zeros(VOCAB, 64)

    def visit(tile: Tile) -> None:
        assert tile.weight.dtype == compute and tile.grad.dtype == torch.float32
        normed_grad[tile.tokens] += tile.grad @ tile.weight.float()
        weight_grad[tile.vocab_slice] += tile.grad.T @ normed[tile.tokens].float()

    loss = logits.walk(normed, 1 / 50.0, visit)
    assert loss == logits.loss_sum(normed)
    wide_normed = normed.double().requires_grad_()
    wide_weight = store[name].values(compute).double().requires_grad_()
    wide = wide_normed @ wide_weight.T
    capped = wide if softcap is None else softcap * torch.tanh(wide / softcap)
    expected = torch.nn.functional.cross_entropy(capped, labels, reduction="sum")
    (expected / 50).backward()
    # Logits of up to 4 are rounded to the compute precision: 2^-9 (bf16), 2^-12 (fp16) of them, of either sign:
    # worst seen 2.3e-7, 1.6e-4 and 2e-5.
    tolerance = {"fp32": 2e-6, "bf16": 1e-3, "fp16": 1e-4}[dtype]
    assert loss == pytest.approx(float(expected.detach()), rel=tolerance)
    for got, leaf in ((normed_grad, wide_normed), (weight_grad, wide_weight)):
        assert leaf.grad is not None
        assert float((got - leaf.grad).norm() / leaf.grad.norm()) <= tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sampled", [False, True], ids=["given", "sampled"])
def test_logits_that_are_kept_are_those_that_would_be_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, softcap: float | None, sampled: bool
) -> None:
    """The same bits of loss and gradients in every walk, and half of the products; afterwards nothing is kept."""
    _, store = parts(tmp_path, "llama", True, "int8")
    draw, num_chunk_bytes = torch.Generator().manual_seed(0), 4 * 50 * VOCAB
    normed = torch.randn(50, 64, generator=draw).to(DTYPES[dtype])
    monkeypatch.setattr(
        logits_module, "chunks", lambda num, *_: [slice(start, start + 7) for start in range(0, num, 7)]
    )
    monkeypatch.setattr(logits_module, "blocks", lambda *_: [slice(s, min(s + 96, VOCAB)) for s in range(0, VOCAB, 96)])
    products: list[Tensor] = []
    original = logits_module.LossOf.logits
    monkeypatch.setattr(logits_module.LossOf, "logits", lambda *args: products.append(original(*args)) or products[-1])

    def walks(chunk_bytes: int) -> tuple[list[float], list[Tensor], int]:
        products.clear()
        clocks = Clocks(1, ("test",)) if sampled else None
        labels = torch.arange(50)
        logits = BlockLogits(
            store, "model.embed_tokens.weight", DTYPES[dtype], LossOf(labels, softcap, clocks, chunk_bytes), Observer()
        )
        grads: list[Tensor] = []
        losses = [logits.walk(normed, 1 / 50.0, lambda tile: grads.append(tile.grad.clone())) for _ in range(2)]
        assert logits._kept is None
        return losses, grads, len(products)

    losses, grads, num_products = walks(num_chunk_bytes)
    expected_losses, expected, num_expected = walks(num_chunk_bytes - 1)
    assert losses == expected_losses and all(map(torch.equal, grads, expected))
    assert num_products * 3 == num_expected * 2, "of three passes, one is saved"


def test_evaluation_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, store = parts(tmp_path, "gemma2", True, "int8")
    total, count = make_engine(architecture, store).evaluate(ragged_batches())
    one_piece(monkeypatch)
    expected, same_count = make_engine(architecture, store).evaluate(ragged_batches())
    assert total == pytest.approx(expected, rel=1e-6) and count == same_count  # as above


@TIED
def test_gradients_of_drawn_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    """Each walk has the labels that the first one drew, a function of seed and step; one piece gets them as data."""
    heads: list[Head] = []
    monkeypatch.setattr(layerwise, "Head", lambda *args, **kwargs: heads.append(Head(*args, **kwargs)) or heads[-1])
    architecture, store = parts(tmp_path, "gemma2", tied, "int8")

    def drawn(step: int, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        got: dict[str, Tensor] = {}
        take_step(
            make_engine(architecture, store, seed=seed),
            ragged_batches(),
            lambda grads: got.update(grads),
            step=step,
            sampled=True,
        )
        return heads[-1].labels, got

    labels, got = drawn(1)
    torch.manual_seed(5)  # a draw is no part of torch's stream
    again, same = drawn(1)
    assert torch.equal(again, labels) and all(torch.equal(same[name], grad) for name, grad in got.items())
    assert not torch.equal(drawn(2)[0], labels) and not torch.equal(drawn(1, seed=1)[0], labels)

    one_piece(monkeypatch)
    batches, expected = ragged_batches(), dict[str, Tensor]()
    for batch, part in zip(batches, labels.split([batch.num_counted for batch in batches]), strict=True):
        batch.labels[batch.labels != -100] = part
    take_step(make_engine(architecture, store), batches, lambda grads: expected.update(grads), step=1)
    assert worst(got, expected) <= TOLERANCES["fp32"]


def test_a_weight_that_is_ready_is_worked_on_in_one_piece(tmp_path: Path) -> None:
    architecture, store = parts(tmp_path, "llama", True, "bf16")
    loss = LossOf(torch.zeros(1, dtype=torch.int64), None, None, 64)
    ready = head.logits_of(store, architecture.head_name, torch.bfloat16, loss, Observer())
    assert isinstance(ready, WholeLogits)
    assert isinstance(head.logits_of(store, architecture.head_name, torch.float32, loss, Observer()), BlockLogits)
