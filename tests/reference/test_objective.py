"""Losses of whole examples through the engine, against ordinary autograd; and cross-entropy as such a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from contract.running_out import TOLERANCE as SPLIT_TOLERANCE
from contract.running_out import RunsOut, shrink_tiles, worst
from engines import everything_projected, load_parts, make_engine, take_step
from sophia_galore.data.batches import IGNORED, MicroBatch, collate
from sophia_galore.engine.objective import CountedTokens, CrossEntropy, Objective, SampledCrossEntropy, sequence_numbers
from sophia_galore.errors import NonFiniteError
from sophia_galore.model.architecture import Architecture
from sophia_galore.numerics.subspace import Projector
from sophia_galore.optim.request import Wants, whole_gradients
from sophia_galore.weights.int8 import Int8Format, quantise
from sophia_galore.weights.store import WeightStore
from tiny import PACKED_LENGTHS, PACKED_ROWS, examples_of, packed_batches, ragged_batches, tiny_model

BETA = 0.05  # so that no sigmoid of some hundred nats is saturated

TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
STORED = pytest.mark.parametrize("stored", ["plain", "int8"])
LAID = pytest.mark.parametrize("laid", ["ragged", "packed"])
FORMS = pytest.mark.parametrize("form", ["whole", "projected", "basis from the gradient"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight tokens a tile, with `logits_chunk_bytes=1`; and 64 words, where the head is decoded."""
    shrink_tiles(monkeypatch)


@dataclass(frozen=True)
class Pairs(Objective):
    """Of two examples one is preferred: the mean of -log sigmoid(beta (sum log p preferred - sum log p other)).

    Args:
        pairs: Numbers of the examples; tokens of others do not matter.
    """

    pairs: tuple[tuple[int, int], ...]
    needs_log_probs = True

    def weigh(self, tokens: CountedTokens, log_probs: Tensor) -> tuple[float, Tensor]:
        weights, loss = torch.zeros_like(log_probs), 0.0
        for better, worse in self.pairs:
            one, other = tokens.sequences == better, tokens.sequences == worse
            margin = BETA * (log_probs[one].sum() - log_probs[other].sum())
            loss -= float(functional.logsigmoid(margin)) / len(self.pairs)
            slope = BETA * torch.sigmoid(-margin) / len(self.pairs)
            weights[one] += slope
            weights[other] -= slope
        return loss, weights


# Pairs lie in different micro-batches; the last packed example has no token that counts, and is in no pair.
BATCHES = {"ragged": ragged_batches, "packed": packed_batches}
PAIRS = {
    "ragged": Pairs(((0, 3), (4, 1), (5, 2))),
    "packed": Pairs(((1, 0), (2, 7), (3, 4), (5, 6))),
}


def autograd_pairs(model: Any, laid: str) -> float:
    """The same loss by ordinary backward through a Hugging Face model; packed examples one by one."""
    batches = ragged_batches()
    if laid == "packed":
        of = examples_of(PACKED_LENGTHS)
        batches = [collate([[of[number]]], pad_id=2) for rows in PACKED_ROWS for row in rows for number in row]
    sums: list[Tensor] = []
    for batch in batches:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        every = logits.float().log_softmax(-1).gather(2, batch.labels.clamp(min=0)[..., None])[..., 0]
        sums += [row[labels != IGNORED].sum() for row, labels in zip(every, batch.labels, strict=True)]
    margins = torch.stack([BETA * (sums[better] - sums[worse]) for better, worse in PAIRS[laid].pairs])
    loss = -functional.logsigmoid(margins).mean()
    sizes = margins.detach().abs()
    assert float(sizes.max()) < 8 and float(sizes.min()) > 0.1  # or the gradient shows little
    loss.backward()
    return float(loss.detach())


def expected_gradients(model: Any, projectors: dict[str, Projector]) -> dict[str, Tensor]:
    """The model's own, multiplied where products were asked for."""
    return {
        name: projectors[name].of(parameter.grad) if name in projectors else parameter.grad
        for name, parameter in model.named_parameters()
    }


def parts_of(folder: Path, model: Any, stored: str) -> tuple[Architecture, WeightStore]:
    """The model's parts; with matrices in eight bits, the model gets what these stand for."""
    model.save_pretrained(folder)
    architecture, store = load_parts(folder)
    if stored == "int8":
        own = dict(model.named_parameters())
        for name, weight in list(store.items()):
            if len(weight.shape) == 2:
                store[name] = quantise(weight.values(torch.float32), Int8Format(block=16))
                own[name].data.copy_(store[name].values(torch.float32))
    return architecture, store


def wants_of(form: str, architecture: Architecture) -> tuple[Wants, dict[str, Projector]]:
    """How gradients are asked for, and what they come multiplied with."""
    projectors = everything_projected(architecture)
    if form == "whole":
        return whole_gradients, {}
    if form == "projected":
        return projectors.get, projectors
    # A layer's gradient is formed all the same.
    late = {name: projectors[name] for name in {architecture.head_name, architecture.embed_name}}
    return lambda name: (lambda grad: late[name]) if name in late else None, late


def run(
    parts: tuple[Architecture, WeightStore],
    batches: Sequence[MicroBatch],
    objective: Objective,
    wants: Wants = whole_gradients,
    **more: Any,
) -> tuple[float, dict[str, Tensor]]:
    got: dict[str, Tensor] = {}
    engine = make_engine(*parts, logits_chunk_bytes=1, **more)
    result = take_step(engine, batches, got.update, step=1, wants=wants, objective=objective)
    return result.loss, got


@pytest.mark.pairwise
@FORMS
@LAID
@STORED
@TIED
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])  # gemma2 caps its logits
def test_gradients_equal_autograd(tmp_path: Path, family: str, tied: bool, stored: str, laid: str, form: str) -> None:
    model = tiny_model(family, tied=tied)
    parts = parts_of(tmp_path, model, stored)
    expected_loss = autograd_pairs(model.train(), laid)
    wants, projectors = wants_of(form, parts[0])
    loss, got = run(parts, BATCHES[laid](), PAIRS[laid], wants)
    assert loss == pytest.approx(expected_loss, rel=1e-6)  # float32 sums of some 20 tokens; worst seen 1.3e-7
    # Tiles are sums in another order, and what two examples say differs less than each: worst seen 6.8e-7.
    assert worst(got, expected_gradients(model, projectors)) <= 2e-6


@pytest.mark.pairwise
@FORMS
@LAID
@STORED
@pytest.mark.parametrize(
    ("compute_dtype", "tolerance"), [(torch.bfloat16, 4e-2), (torch.float16, 5e-3)], ids=["bf16", "fp16"]
)
def test_half_precision_gradients_are_near(
    tmp_path: Path, compute_dtype: torch.dtype, tolerance: float, stored: str, laid: str, form: str
) -> None:
    """A rounding is 2^-9 or 2^-12 relative; through three layers, forward and backward, worst seen 1.7e-2, 2.0e-3."""
    model = tiny_model("llama")
    parts = parts_of(tmp_path, model, stored)
    expected_loss = autograd_pairs(model.train(), laid)
    wants, projectors = wants_of(form, parts[0])
    loss, got = run(parts, BATCHES[laid](), PAIRS[laid], wants, compute_dtype=compute_dtype)
    assert loss == pytest.approx(expected_loss, rel=1e-3)  # sums of rounded logits' errors; worst seen 1.6e-4
    assert worst(got, expected_gradients(model, projectors)) <= tolerance


class WeighedCrossEntropy(CrossEntropy):
    """The mean over tokens, by weights that are asked for."""

    needs_log_probs = True


class WeighedSampledCrossEntropy(SampledCrossEntropy):
    """And of drawn labels, which the first pass over the logits draws."""

    needs_log_probs = True


@pytest.mark.pairwise
@FORMS
@STORED
@TIED
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sampled", [False, True], ids=["given", "drawn"])
def test_cross_entropy_by_weights_is_that_of_one_pass(
    tmp_path: Path, sampled: bool, compute_dtype: torch.dtype, tied: bool, stored: str, form: str
) -> None:
    parts = parts_of(tmp_path, tiny_model("gemma2", tied=tied), stored)
    wants, _ = wants_of(form, parts[0])
    once, weighed = (
        (SampledCrossEntropy(), WeighedSampledCrossEntropy()) if sampled else (CrossEntropy(), WeighedCrossEntropy())
    )
    step = partial(run, parts, ragged_batches(), wants=wants, compute_dtype=compute_dtype)
    expected_loss, expected = step(once)
    loss, got = step(weighed)
    assert loss == pytest.approx(expected_loss, rel=1e-6)  # float32 means of 42 tokens
    # On a CPU to the bit; a weight that is rounded otherwise may move single entries by a rounding.
    assert worst(got, expected) <= {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[compute_dtype]


@pytest.mark.pairwise
@pytest.mark.parametrize(("phase", "which"), [("forward", 0), ("forward", 2), ("head", 0), ("backward", 1)])
@STORED
@LAID
def test_a_part_that_is_repeated_sees_the_same_examples(
    tmp_path: Path, laid: str, stored: str, phase: Any, which: int
) -> None:
    """Micro-batches are split where memory runs out, and the examples keep their numbers."""
    parts = parts_of(tmp_path, tiny_model("llama"), stored)

    def step(memory: RunsOut) -> tuple[float, dict[str, Tensor]]:
        got: dict[str, Tensor] = {}
        engine = make_engine(*parts, on_oom="adapt", observer=memory)
        with memory:
            result = take_step(engine, BATCHES[laid](), got.update, step=1, objective=PAIRS[laid])
        return result.loss, got

    count = RunsOut()
    expected_loss, expected = step(count)
    number = next(number for *place, number in count.counts if place == [phase, which])
    for operation in (0, number // 3, number // 2, number - 1):
        memory = RunsOut(phase, which, operation)
        loss, got = step(memory)
        assert memory.ran_out == 1
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert worst(got, expected) <= SPLIT_TOLERANCE, operation  # worst seen 9.1e-8


def test_examples_are_numbered_through_the_effective_batch() -> None:
    ragged = sequence_numbers(ragged_batches())
    assert ragged.tolist() == [0] * 10 + [1] * 4 + [2] * 18 + [3] * 2 + [4] * 2 + [5] * 6
    packed = packed_batches()
    order = [number for rows in PACKED_ROWS for row in rows for number in row]
    # The first token is nobody's target, and the second one does not count.
    counted = [PACKED_LENGTHS[number] - 2 for number in order]
    assert sequence_numbers(packed).tolist() == [place for place, num in enumerate(counted) for _ in range(num)]
    assert counted[-1] == 0  # its number is nobody's


@dataclass(frozen=True)
class Remembering(Objective):
    """Cross-entropy that looks at what it is asked with, or tells a loss of its own."""

    seen: list[tuple[CountedTokens, Tensor]]
    loss: float | None = None
    needs_log_probs = True

    def weigh(self, tokens: CountedTokens, log_probs: Tensor) -> tuple[float, Tensor]:
        self.seen.append((tokens, log_probs))
        loss, weights = super().weigh(tokens, log_probs)
        return loss if self.loss is None else self.loss, weights


@STORED
def test_it_is_asked_once_with_labels_examples_and_log_probabilities(tmp_path: Path, stored: str) -> None:
    model = tiny_model("gemma2")
    parts, batches = parts_of(tmp_path, model, stored), ragged_batches()
    objective = Remembering([])
    loss, _ = run(parts, batches, objective)
    ((tokens, log_probs),) = objective.seen
    assert torch.equal(tokens.labels, torch.cat([batch.labels[batch.labels != IGNORED] for batch in batches]))
    assert torch.equal(tokens.sequences, sequence_numbers(batches))
    with torch.no_grad():
        expected = torch.cat(
            [
                functional.cross_entropy(
                    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1),
                    batch.labels.flatten(),
                    reduction="none",
                )[batch.labels.flatten() != IGNORED]
                for batch in batches
            ]
        ).neg()
    assert log_probs.dtype == torch.float32 and not log_probs.requires_grad
    assert torch.allclose(log_probs, expected, rtol=1e-5)  # float32 through three layers, and sums of 320 exponentials
    assert loss == pytest.approx(float(-expected.mean()), rel=1e-6)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_step(tmp_path: Path, loss: float) -> None:
    parts = parts_of(tmp_path, tiny_model("llama"), "plain")
    handed: list[object] = []
    with pytest.raises(NonFiniteError, match="at step 5"):
        take_step(make_engine(*parts), ragged_batches(), handed.append, step=5, objective=Remembering([], loss))
    assert not handed
