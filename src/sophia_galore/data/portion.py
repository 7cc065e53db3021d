"""The portion of an effective batch that one of several processes works on.

Micro-batches are dealt out in blocks: the first process gets the first ones, and so on. What depends on the place of a
row or a token in the effective batch (dropout, noise on embeddings, sampled labels) depends on its place among all of
them, and a token's weight on how many there are, so the numbers do not depend on the number of processes.

What still does is the order in which gradients are summed. It doesn't either if the micro-batches are divided into
blocks: gradients are summed inside each block, then over the blocks pairwise (`numerics/pairwise_sum.py`). A process
has a half of the blocks, or a quarter, and so on, which is a part of that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sophia_galore.data.batches import IGNORED, MicroBatch


@dataclass(frozen=True)
class Portion:
    """Some micro-batches of an effective batch, and their place in it.

    Args:
        batches: The micro-batches; at least one.
        num_tokens: Tokens of the effective batch, without padding.
        num_counted: Tokens of the effective batch whose loss counts.
        first_batch: Number of micro-batches before these.
        first_row: Number of rows before these.
        first_counted: Number of counted tokens before these.
    """

    batches: Sequence[MicroBatch]
    num_tokens: int
    num_counted: int
    first_batch: int = 0
    first_row: int = 0
    first_counted: int = 0


def whole(batches: Sequence[MicroBatch]) -> Portion:
    """Return all micro-batches of an effective batch as the portion of a single process.

    Args:
        batches: The micro-batches.
    """
    return deal(batches, 0, 1)


def deal(batches: Sequence[MicroBatch], rank: int, num_processes: int, *, sum_blocks: int = 1) -> Portion:
    """Return the portion of a process: a block of micro-batches, at most one more than any other process gets.

    Args:
        batches: The micro-batches of the effective batch.
        rank: Number of the process, from 0.
        num_processes: Number of processes.
        sum_blocks: Number of blocks that the effective batch is divided into, a multiple of the number of processes; 1:
            gradients are summed in the order of the micro-batches.

    Returns:
        The portion. If there are fewer micro-batches than processes, as in the last step of an epoch, those that are
        left without any get a small one in which no token counts: it adds nothing to sums.
    """
    start, end = (len(batches) * number // num_processes for number in (rank, rank + 1))
    before, own = batches[:start], batches[start:end]
    if sum_blocks > 1:
        first = sum_blocks * rank // num_processes
        own = [replace(batch, block=batch.block - first) for batch in in_blocks(batches, sum_blocks)[start:end]]
    return Portion(
        own or [_idle(batches[0])],
        num_tokens=sum(batch.num_tokens for batch in batches),
        num_counted=sum(batch.num_counted for batch in batches),
        first_batch=len(before),
        first_row=sum(len(batch.input_ids) for batch in before),
        first_counted=sum(batch.num_counted for batch in before),
    )


def in_blocks(batches: Sequence[MicroBatch], sum_blocks: int) -> list[MicroBatch]:
    """Divide micro-batches into blocks of about the same size.

    Args:
        batches: The micro-batches.
        sum_blocks: Number of blocks; some are empty if there are fewer micro-batches.

    Returns:
        The micro-batches with the numbers of their blocks.
    """
    if sum_blocks == 1:
        return list(batches)
    # Block b has those from count * b // sum_blocks on, as a process of so many has.
    return [
        replace(batch, block=((number + 1) * sum_blocks - 1) // len(batches)) for number, batch in enumerate(batches)
    ]


def to_evaluate(batches: Sequence[MicroBatch], sum_blocks: int) -> Sequence[MicroBatch]:
    """Return micro-batches that are evaluated together, in the blocks over which their losses are computed.

    Args:
        batches: The micro-batches.
        sum_blocks: As for `deal`; with more than one, each micro-batch is a block, since it depends on the number of
            processes which of them are evaluated together. Sums of float32 losses in float64 have no order.
    """
    return in_blocks(batches, len(batches)) if sum_blocks > 1 else batches


def _idle(batch: MicroBatch) -> MicroBatch:
    """Return the first row of a micro-batch, with no token that counts."""
    labels = torch.full_like(batch.labels[:1], IGNORED)
    mask = None if batch.attention_mask is None else batch.attention_mask[:1]
    lengths = None if batch.lengths is None else batch.lengths[:1]
    return replace(
        batch,
        input_ids=batch.input_ids[:1],
        labels=labels,
        attention_mask=mask,
        num_tokens=0,
        num_counted=0,
        lengths=lengths,
        block=0,
    )
