"""From examples to batches, in an order that is a function of (seed, epoch).

Nothing here has a state: which examples make up step 7 of epoch 2 can be asked at any time, so a
resumed run continues exactly where it stopped, without replaying what came before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sophia_galore.data.example import Example
from sophia_galore.numerics.random import generator

IGNORED = -100
"""The label of a position whose next token does not count."""

# Steps that are looked at for the largest one: more would take seconds and find little more.
_MOST_STEPS = 20_000


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one forward and backward works on: B examples, padded on the right to T tokens.

    Attributes:
        input_ids: Token ids, (B, T) int64.
        attention_mask: 1 for tokens and 0 for padding, (B, T) int64; None if nothing is padded.
        labels: Targets, (B, T) int64, already shifted: ``labels[:, t]`` is token t + 1 if that
            counts, else -100. The last column is -100.
        num_tokens: Tokens without padding.
        num_counted: Targets that are not -100.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor
    num_tokens: int
    num_counted: int


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of the examples in one epoch.

    Args:
        n: Number of examples.
        seed: The run's seed.
        epoch: The epoch, from 0.

    Returns:
        A permutation of 0 .. n-1, a pure function of the arguments.
    """
    order: list[int] = torch.randperm(n, generator=generator(seed, "epoch order", epoch)).tolist()
    return order


def windows(n: int, batch_size: int, accumulation: int) -> int:
    """The number of optimizer steps in one epoch.

    Args:
        n: Number of examples.
        batch_size: Examples in a micro-batch.
        accumulation: Micro-batches in a step.

    Returns:
        ceil(n / (batch_size * accumulation)): the last step may be smaller, nothing is left out.
    """
    return -(-n // (batch_size * accumulation))


def window(
    examples: Sequence[Example],
    *,
    seed: int,
    epoch: int,
    index: int,
    batch_size: int,
    accumulation: int,
    pad_id: int,
) -> list[MicroBatch]:
    """The micro-batches of one optimizer step.

    Args:
        examples: All training examples.
        seed: The run's seed.
        epoch: The epoch, from 0.
        index: The step within the epoch, from 0 to `windows` - 1.
        batch_size: Examples in a micro-batch.
        accumulation: Micro-batches in a step.
        pad_id: The token id to pad with.

    Returns:
        At most `accumulation` micro-batches; fewer, and a smaller last one, in the epoch's last step.

    Raises:
        IndexError: The epoch has no such step.
    """
    if not 0 <= index < windows(len(examples), batch_size, accumulation):
        raise IndexError(f"an epoch of {len(examples)} examples has no window {index}")
    size = batch_size * accumulation
    chosen = epoch_order(len(examples), seed, epoch)[index * size : (index + 1) * size]
    return _micro_batches([examples[i] for i in chosen], batch_size, pad_id)


def largest_step(
    examples: Sequence[Example], *, seed: int, num_steps: int, batch_size: int, accumulation: int, pad_id: int
) -> list[MicroBatch]:
    """The micro-batches of that step of a run which has most tokens, padding included.

    Args:
        examples: All training examples.
        seed: The run's seed.
        num_steps: Optimizer steps of the run; of very many the first ones are looked at.
        batch_size: Examples in a micro-batch.
        accumulation: Micro-batches in a step.
        pad_id: The token id to pad with.
    """
    size, num_windows = batch_size * accumulation, windows(len(examples), batch_size, accumulation)
    order: list[int] = []
    largest, place = 0, (0, 0)
    for step in range(min(num_steps, _MOST_STEPS)):
        epoch, index = divmod(step, num_windows)
        if index == 0:
            order = epoch_order(len(examples), seed, epoch)
        lengths = [examples[i].num_tokens for i in order[index * size : (index + 1) * size]]
        parts = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
        num_tokens = sum(len(part) * max(part) for part in parts)
        if num_tokens > largest:
            largest, place = num_tokens, (epoch, index)
    epoch, index = place
    return window(
        examples,
        seed=seed,
        epoch=epoch,
        index=index,
        batch_size=batch_size,
        accumulation=accumulation,
        pad_id=pad_id,
    )


def eval_batches(examples: Sequence[Example], batch_size: int, pad_id: int) -> list[MicroBatch]:
    """Batches of all examples for evaluation, sorted by length so that little is padded.

    Args:
        examples: The evaluation examples.
        batch_size: Examples in a batch.
        pad_id: The token id to pad with.

    Returns:
        The batches, longest first: if memory does not suffice, that shows at once.
    """
    return _micro_batches(sorted(examples, key=lambda example: -example.num_tokens), batch_size, pad_id)


def largest_window(examples: Sequence[Example], *, batch_size: int, accumulation: int, pad_id: int) -> list[MicroBatch]:
    """Micro-batches that are at least as large as those of any optimizer step can be.

    The longest examples are spread over them, one to each before any gets a second: padding is most where every
    micro-batch holds a long one. They are not repeated where there are fewer than a step takes, since no step has
    more then either.

    Args:
        examples: All training examples.
        batch_size: Examples in a micro-batch.
        accumulation: Micro-batches in a step.
        pad_id: The token id to pad with.

    Returns:
        As many micro-batches as the largest step has, the one with the longest example first.
    """
    longest = sorted(examples, key=lambda example: -example.num_tokens)[: batch_size * accumulation]
    num_batches = -(-len(longest) // batch_size)
    more, size = longest[num_batches:], batch_size - 1
    return [
        collate([first, *more[number * size : (number + 1) * size]], pad_id)
        for number, first in enumerate(longest[:num_batches])
    ]


def collate(examples: Sequence[Example], pad_id: int) -> MicroBatch:
    """Pads examples on the right to the longest of them.

    Args:
        examples: B >= 1 examples.
        pad_id: The token id to pad with.

    Returns:
        The micro-batch.
    """
    lengths = [example.num_tokens for example in examples]
    shape = (len(examples), max(lengths))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        input_ids[row, :length] = example.input_ids
        attention_mask[row, :length] = 1
        # Copied before it is cut: a view of an example, which was there before, would count as memory of the step.
        targets = example.input_ids.to(torch.int64).masked_fill_(~example.counted, IGNORED)
        labels[row, : length - 1] = targets[1:]
    return MicroBatch(
        input_ids=input_ids,
        attention_mask=attention_mask if min(lengths) < max(lengths) else None,
        labels=labels,
        num_tokens=sum(lengths),
        num_counted=int((labels != IGNORED).sum()),
    )


def _micro_batches(examples: Sequence[Example], batch_size: int, pad_id: int) -> list[MicroBatch]:
    return [collate(examples[i : i + batch_size], pad_id) for i in range(0, len(examples), batch_size)]
