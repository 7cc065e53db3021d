"""Noise on embeddings: gradients against ordinary autograd with the same noise, and what the noise depends on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contract.running_out import TOLERANCE as SPLIT_TOLERANCE
from contract.running_out import RunsOut, gradients, worst
from engines import load_parts, make_engine, take_step
from sophia_galore.data.batches import MicroBatch
from sophia_galore.engine.embedding import EmbeddingNoise
from sophia_galore.engine.retry import split_rows
from sophia_galore.numerics.random import generator
from tiny import FAMILIES, autograd_loss, ragged_batches, tiny_model

TOLERANCE = 3e-6  # both sides are float32; the worst seen is 1.1e-6, of a norm whose gradient is small
ALPHA, SEED, STEP = 5.0, 3, 7


def plain_noise(length: int, width: int, row: int) -> Tensor:
    """The paper's formula for one example, from the numbers that belong to its row."""
    draw = torch.empty(length, width).uniform_(-1, 1, generator=generator(SEED, "neftune", STEP, row))
    return draw * (ALPHA / math.sqrt(length * width))


def noisy(model: Any, batches: list[MicroBatch]) -> Callable[..., Tensor]:
    """A hook that adds the noise to what the embedding gives, micro-batch after micro-batch."""

    def noises() -> Iterator[Tensor]:
        row = 0
        for batch in batches:
            count, length = batch.input_ids.shape
            noise = torch.zeros(count, length, model.config.hidden_size)
            for place, own in enumerate(noise):
                tokens = length if batch.attention_mask is None else int(batch.attention_mask[place].sum())
                own[:tokens] = plain_noise(tokens, own.shape[1], row)
                row += 1
            yield noise

    made = noises()
    return lambda module, inputs, output: output + next(made)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_autograd_with_the_same_noise(tmp_path: Path, family: str, tied: bool) -> None:
    model = tiny_model(family, tied=tied)
    model.save_pretrained(tmp_path)
    batches = ragged_batches()
    model.get_input_embeddings().register_forward_hook(noisy(model, batches))
    expected_loss = autograd_loss(model.train(), batches)
    got: dict[str, Tensor] = {}
    engine = make_engine(*load_parts(tmp_path), seed=SEED, neftune_alpha=ALPHA)
    result = take_step(engine, batches, lambda grads: got.update(grads), step=STEP)
    assert result.loss == pytest.approx(expected_loss, rel=1e-6)  # float32 sums of some 50 tokens
    for name, parameter in model.named_parameters():
        error = float((got[name] - parameter.grad).norm() / parameter.grad.norm())
        assert error <= TOLERANCE, name


def added(batches: list[MicroBatch], *, alpha: float = ALPHA, step: int = STEP, width: int = 16) -> list[Tensor]:
    """What is added to the embeddings of each row, padding included."""
    noise, rows, before = EmbeddingNoise(alpha, SEED, step), [], 0
    for batch in batches:
        embedded = torch.zeros(*batch.input_ids.shape, width)
        noise.add_to(embedded, batch, before)
        before += len(embedded)
        rows += list(embedded)
    return rows


def test_its_size_is_that_of_the_paper_for_each_example_alone() -> None:
    """By the tokens of the example, not by those of the row it is padded to; nothing is added to padding."""
    lengths = [13, 7, 21, 5, 5, 9]  # of `ragged_batches`
    for row, length in zip(added(ragged_batches()), lengths, strict=True):
        bound = ALPHA / math.sqrt(length * 16)
        assert 0.9 * bound < row[:length].abs().max() <= bound
        assert torch.count_nonzero(row[length:]) == 0


def test_it_does_not_depend_on_how_rows_are_put_together() -> None:
    whole = added(ragged_batches())
    split = added([part for batch in ragged_batches() for part in split_rows(batch, 1)])
    assert all(torch.equal(one, other) for one, other in zip(whole, split, strict=True))
    padded = ragged_batches()[0]
    more = torch.zeros(1, 4, dtype=torch.int64)
    wider = replace(
        padded,
        input_ids=torch.cat([padded.input_ids, more], 1),
        attention_mask=torch.cat([torch.ones_like(padded.input_ids), more], 1),
    )
    assert torch.equal(added([wider])[0][:13], added([padded])[0])


def test_each_step_and_row_draws_its_own() -> None:
    first, again, other = added(ragged_batches()), added(ragged_batches()), added(ragged_batches(), step=STEP + 1)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(first, other, strict=True))
    assert not torch.equal(first[3][:5], first[4][:5])  # of the same length


@pytest.mark.parametrize(("phase", "which"), [("forward", 0), ("forward", 2), ("backward", 0), ("backward", 2)])
def test_smaller_micro_batches_for_want_of_memory_see_the_same_noise(tmp_path: Path, phase: Any, which: int) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    parts = load_parts(tmp_path)
    count, memory = RunsOut(), RunsOut(phase, which, -1)
    expected = gradients(make_engine(*parts, observer=count, neftune_alpha=ALPHA), ragged_batches(), count)
    engine = make_engine(*parts, observer=memory, on_oom="adapt", neftune_alpha=ALPHA)
    assert worst(gradients(engine, ragged_batches(), memory), expected) <= SPLIT_TOLERANCE
    assert memory.ran_out == 1


def test_evaluation_has_none(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    parts = load_parts(tmp_path)
    plain = make_engine(*parts).evaluate(ragged_batches())
    assert make_engine(*parts, neftune_alpha=50.0).evaluate(ragged_batches()) == plain
