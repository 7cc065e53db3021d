"""Collate examples into micro-batches; a row holds one example or, if packed, several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from sophia_galore.data.example import Example

IGNORED = -100
"""The label of a position whose next token does not count."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """The input of one forward and backward: B rows, padded on the right to T tokens.

    Attributes:
        input_ids: Token ids, (B, T) int64.
        attention_mask: 1 for tokens and 0 for padding, (B, T) int64; None if there is no padding or `lengths` is given.
        labels: Targets, (B, T) int64, already shifted: ``labels[:, t]`` is token t + 1 if that counts, else -100. The
            last token of an example has no target.
        num_tokens: Number of tokens without padding.
        num_counted: Number of targets that are not -100.
        lengths: For each packed row, the lengths of its examples, which do not attend to each other; None: each row is
            one example.
        block: Number of the block of micro-batches that it belongs to (`data/portion.py`).
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor
    num_tokens: int
    num_counted: int
    lengths: tuple[tuple[int, ...], ...] | None = None
    block: int = 0


class _InBlock(Protocol):
    @property
    def block(self) -> int:
        """Number of a block of micro-batches."""


Member = TypeVar("Member", bound=_InBlock)


def by_block(members: Sequence[Member]) -> list[list[Member]]:
    """Return what belongs to each block of micro-batches.

    Args:
        members: The micro-batches, or one thing for each; those of a block follow each other.
    """
    return [list(of_block) for _, of_block in groupby(members, lambda member: member.block)]


def collate(rows: Sequence[Sequence[Example]], pad_id: int, *, width: int = 0) -> MicroBatch:
    """Concatenate the examples of each row, and pad the rows on the right to the longest.

    Args:
        rows: B >= 1 rows of one or more examples.
        pad_id: The token id to pad with.
        width: Minimum length after padding.
    """
    lengths = tuple(tuple(example.num_tokens for example in row) for row in rows)
    is_packed = any(len(row) > 1 for row in rows)
    sums = [sum(row) for row in lengths]
    shape = (len(rows), max(width, *sums))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    attention_mask = None
    if not is_packed and min(sums) < shape[1]:
        attention_mask = torch.zeros(shape, dtype=torch.int64)
    for number, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + example.num_tokens
            input_ids[number, start:end] = example.input_ids
            if attention_mask is not None:
                attention_mask[number, start:end] = 1
            # Copied first: a view of the example would be counted as memory of the step.
            targets = example.input_ids.to(torch.int64).masked_fill_(~example.counted, IGNORED)
            labels[number, start : end - 1] = targets[1:]
            start = end
    return MicroBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        num_tokens=sum(sums),
        num_counted=int((labels != IGNORED).sum()),
        lengths=lengths if is_packed else None,
    )


def pad_token(tokenizer: Any) -> int:
    """Return a token to pad batches with; it is masked, so any token is suitable.

    Args:
        tokenizer: A Hugging Face tokenizer.
    """
    known_ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known_ids if token is not None)
