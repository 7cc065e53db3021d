"""The micro-batches that memory is planned for: the data's largest or, where the data are not known, the worst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sophia_galore.config import RunConfig
from sophia_galore.config.schema_data import sources_in_words
from sophia_galore.data.batches import IGNORED, MicroBatch
from sophia_galore.data.dataset import Dataset
from sophia_galore.data.feed import Feed

_MOST_BATCHES = 8
"""So many micro-batches are run as they are; what more of them take is computed from what these do."""


@dataclass(frozen=True)
class Load:
    """What a run works on at once.

    Args:
        train: The micro-batches of the largest step.
        probe: Those of the probe step, which may be larger; empty: there is none, or none that is larger.
        eval: Those that are evaluated together; empty: there is no evaluation.
        source: Where they come from, in words.
    """

    train: tuple[MicroBatch, ...]
    probe: tuple[MicroBatch, ...]
    eval: tuple[MicroBatch, ...]
    source: str


@dataclass(frozen=True)
class Sample:
    """Fewer micro-batches, from which follows what all of them take.

    Args:
        fewer: Some micro-batches; empty: `more` is all.
        more: More of them.
        factor: How many times what `more` has beyond `fewer` has to be added to `more`.
    """

    fewer: tuple[MicroBatch, ...]
    more: tuple[MicroBatch, ...]
    factor: float


def load_of_data(config: RunConfig, dataset: Dataset, num_steps: int, pad_id: int) -> Load:
    """What a run works on: its largest step, its probe step, and what is evaluated first, which is the longest.

    Args:
        config: What was asked.
        dataset: The tokenised data.
        num_steps: Steps of the run.
        pad_id: The token id to pad with.
    """
    training = config.training
    feed = Feed.of(config, dataset.train, pad_id)
    train = feed.largest_step(num_steps)
    probe = feed.largest_window() if training.probe_step else []
    if _sizes(probe) == _sizes(train):
        probe = []  # it needs no more than a first step
    together = training.gradient_accumulation_steps
    evaluated = Feed.of(config, dataset.eval, pad_id).longest_first()[:together]
    longest = max(batch.input_ids.shape[1] for batch in (*probe, *train))
    what = "fullest rows" if feed.arrangement == "packed" else "longest examples"
    words = (
        f"the {what} of {sources_in_words(config.data.train)}: {len(train)} x {train[0].input_ids.shape[0]} x {longest}"
    )
    return Load(tuple(train), tuple(probe), tuple(evaluated), f"{words} tokens")


def _sizes(batches: Sequence[MicroBatch]) -> list[tuple[int, ...]]:
    return sorted((*batch.input_ids.shape, batch.num_counted, _squares(batch)) for batch in batches)


def _squares(batch: MicroBatch) -> int:
    """What attention takes grows with it where it forms scores."""
    rows, width = batch.input_ids.shape
    return rows * width**2 if batch.lengths is None else sum(length**2 for row in batch.lengths for length in row)


def assumed_load(config: RunConfig, vocab_size: int) -> Load:
    """What a step works on at worst.

    Args:
        config: What was asked.
        vocab_size: Words that the model knows.
    """
    training = config.training
    size, together, length = training.batch_size, training.gradient_accumulation_steps, training.max_length
    batches = full_batches(size, together, length, vocab_size)
    evaluates = config.data.eval is not None or config.data.eval_fraction > 0
    source = f"examples of training.max_length: {together} x {size} x {length} tokens"
    return Load(batches, (), batches if evaluates else (), source)


def full_batches(batch_size: int, num_batches: int, length: int, vocab_size: int) -> tuple[MicroBatch, ...]:
    """Micro-batches in which every example is as long as can be, every token counts, and as few as can be are alike.

    Args:
        batch_size: Examples in a micro-batch.
        num_batches: Micro-batches in a step.
        length: Tokens of each example.
        vocab_size: Words that there are.
    """
    tokens = torch.arange(num_batches * batch_size * length).remainder_(vocab_size)
    batches: list[MicroBatch] = []
    for input_ids in tokens.view(num_batches, batch_size, length):
        labels = torch.full_like(input_ids, IGNORED)
        labels[:, :-1] = input_ids[:, 1:]
        batches.append(MicroBatch(input_ids, None, labels, batch_size * length, batch_size * (length - 1)))
    return tuple(batches)


def sample(batches: Sequence[MicroBatch]) -> Sample:
    """Take so few micro-batches that running them is quick.

    Args:
        batches: All of them.
    """
    if len(batches) <= _MOST_BATCHES:
        return Sample((), tuple(batches), 0.0)
    # What memory a phase takes grows with the tokens of all, or with the counted ones, and has a part that depends on
    # the largest micro-batch alone.
    largest, *rest = sorted(batches, key=lambda batch: (-batch.input_ids.numel(), -_squares(batch)))
    num_tokens = sum(batch.input_ids.numel() for batch in rest)
    usual = min(rest, key=lambda batch: abs(batch.input_ids.numel() - num_tokens / len(rest)))
    half, most = _MOST_BATCHES // 2, _MOST_BATCHES
    wanted = 1 + num_tokens / usual.input_ids.numel()
    usual = _counting(usual, sum(batch.num_counted for batch in rest) / (wanted - 1))
    return Sample((largest, *[usual] * (half - 1)), (largest, *[usual] * (most - 1)), (wanted - most) / (most - half))


def _counting(batch: MicroBatch, num_counted: float) -> MicroBatch:
    """The same tokens, of which another number counts."""
    ids = batch.input_ids
    may_count = torch.ones_like(ids, dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask != 0
    places = may_count.flatten().nonzero().flatten()[: round(num_counted)]
    labels = torch.full_like(ids, IGNORED)
    labels.view(-1)[places] = ids.view(-1)[places]
    return replace(batch, labels=labels, num_counted=len(places))
