"""Repeat a part of a step with smaller chunks when memory runs out.

Smaller chunks are: fewer layers without activation checkpointing, logits of fewer tokens at once, or smaller
micro-batches. The effective batch and its sums stay the same, so results agree up to rounding. The smaller sizes stay
for the rest of the run, and each change is reported once. A part may be repeated only if it leaves no lasting changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from traceback import clear_frames
from typing import Literal, TypeVar

import torch

from sophia_galore.data.batches import IGNORED, MicroBatch
from sophia_galore.engine.cross_entropy import chunk_tokens, smaller_chunk_bytes
from sophia_galore.errors import lacks_memory

OnOom = Literal["stop", "adapt"]
Made = TypeVar("Made")


@dataclass(frozen=True)
class ChunkSizes:
    """The sizes that determine how much memory the engine needs at once.

    Args:
        keep_layers: Number of last layers without activation checkpointing.
        logits_bytes: Size of the float32 logits that are computed at once, in bytes.
        max_rows: Micro-batches with more rows are split; None: none is split.
    """

    keep_layers: int
    logits_bytes: int
    max_rows: int | None = None


@dataclass(frozen=True)
class Smaller:
    """Chunk sizes that need less memory.

    Args:
        sizes: The new sizes.
        change: What changes, as text.
    """

    sizes: ChunkSizes
    change: str


def fewer_kept_layers(sizes: ChunkSizes) -> Smaller | None:
    """Halve the number of layers without activation checkpointing; return None if there are none."""
    before = sizes.keep_layers
    if before == 0:
        return None
    after = before // 2
    kept = f"the graphs of {_count(after, 'layer')} are kept instead of {before}" if after else "no graphs are kept"
    return Smaller(replace(sizes, keep_layers=after), kept)


def smaller_logits(sizes: ChunkSizes, num_tokens: int, num_entries: int) -> Smaller | None:
    """Halve the number of tokens in a tile of the head's logits.

    Args:
        sizes: The current sizes.
        num_tokens: Number of counted tokens; a tile never has more.
        num_entries: Vocabulary entries of a tile.

    Returns:
        The new sizes; None: the tile is already as small as possible.
    """
    smaller = smaller_chunk_bytes(sizes.logits_bytes, num_tokens, num_entries)
    if smaller is None:
        return None
    before = min(num_tokens, chunk_tokens(num_entries, sizes.logits_bytes))
    change = f"the head takes {_count(chunk_tokens(num_entries, smaller), 'token')} at once instead of {before}"
    return Smaller(replace(sizes, logits_bytes=smaller), change)


def logits_twice(sizes: ChunkSizes, num_tokens: int, vocab_size: int) -> Smaller:
    """Compute the logits of the head twice, where they are kept between two passes.

    Args:
        sizes: The current sizes.
        num_tokens: Number of counted tokens.
        vocab_size: V.
    """
    after = replace(sizes, logits_bytes=4 * num_tokens * vocab_size - 1)
    return Smaller(after, "the head computes its logits twice instead of keeping them")


def fewer_rows(sizes: ChunkSizes, batches: Sequence[MicroBatch]) -> Smaller | None:
    """Halve the rows of the largest micro-batches; return None if they have one row."""
    before = max(len(batch.input_ids) for batch in batches)
    if before == 1:
        return None
    after = -(-before // 2)
    change = f"micro-batches have {_count(after, 'row')} instead of {before}; the effective batch stays the same"
    return Smaller(replace(sizes, max_rows=after), change)


def split_rows(batch: MicroBatch, max_rows: int) -> list[MicroBatch]:
    """Split a micro-batch into halves, repeatedly, until no part has more than `max_rows` rows.

    Args:
        batch: B rows, padded to T tokens; the parts stay padded to T, so that their results are the same.
        max_rows: At least 1.

    Returns:
        The parts in the order of their rows, as views. B rows become ceil(B / 2) and floor(B / 2) rows, and so on.
    """
    num_rows, length = batch.input_ids.shape
    if num_rows <= max_rows:
        return [batch]
    middle = -(-num_rows // 2)
    parts: list[MicroBatch] = []
    for rows in (slice(0, middle), slice(middle, num_rows)):
        mask = None if batch.attention_mask is None else batch.attention_mask[rows]
        labels = batch.labels[rows]
        lengths = None if batch.lengths is None else batch.lengths[rows]
        num_tokens = len(labels) * length if mask is None else int(mask.sum())
        half = MicroBatch(
            input_ids=batch.input_ids[rows],
            attention_mask=mask,
            labels=labels,
            num_tokens=num_tokens if lengths is None else sum(map(sum, lengths)),
            num_counted=int((labels != IGNORED).sum()),
            lengths=lengths,
            block=batch.block,
        )
        parts += split_rows(half, max_rows)
    return parts


class Retry:
    """Repeats parts of a step that ran out of memory, and remembers the smaller chunk sizes.

    Args:
        sizes: The initial sizes.
        on_oom: "adapt"; or "stop": nothing is repeated.
        say: Receives a sentence about each change.
        device: The compute device.

    Attributes:
        sizes: The current chunk sizes.
        adapts: Whether parts may be repeated.
    """

    def __init__(self, sizes: ChunkSizes, on_oom: OnOom, say: Callable[[str], None], device: torch.device) -> None:
        self.sizes = sizes
        self.adapts, self._say, self._device = on_oom == "adapt", say, device

    def run(
        self,
        part: Callable[[], Made],
        *,
        where: Callable[[], str],
        smaller: Callable[[], Smaller | None],
        shrink: Callable[[ChunkSizes], None],
    ) -> Made:
        """Run a part of a step; repeat it while memory runs out and chunks can become smaller.

        Args:
            part: The part; it must be repeatable after a failure.
            where: Returns the part and the step as text, to follow "Memory ran out in".
            smaller: Returns the chunk sizes to try next; None: no smaller sizes would help.
            shrink: Splits or drops kept tensors to fit the new sizes.

        Returns:
            The result of `part`.
        """
        while True:
            try:
                return part()
            except Exception as error:
                found = smaller() if self.adapts and lacks_memory(error) else None
                if found is None:
                    raise
                place = where()
                # The traceback's frames still hold the part's tensors, which would take memory during the repetition.
                clear_frames(error.__traceback__)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            self.sizes = found.sizes
            shrink(found.sizes)
            self._say(f"Memory ran out in {place}: from here on {found.change}.")


def silent(sentence: str) -> None:
    """Ignore a sentence."""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
