"""What happens when memory runs out: the part of a step that failed is repeated with smaller chunks.

Fewer layers without activation checkpointing, fewer tokens' logits at once, smaller micro-batches: the effective batch
and its sums stay the same, so numbers do up to rounding. What was learned stays for the rest of the run, and is said
once. A part that may be repeated must have changed nothing that lasts.
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
    """How much an engine has in memory at once.

    Args:
        keep_layers: So many last layers go without activation checkpointing.
        logits_bytes: Bytes of the float32 logits that are worked on at once.
        max_rows: Rows of the largest micro-batch that is not split; None: none is.
    """

    keep_layers: int
    logits_bytes: int
    max_rows: int | None = None


@dataclass(frozen=True)
class Smaller:
    """Chunk sizes that need less memory.

    Args:
        sizes: The new sizes.
        change: What changes from here on, as text.
    """

    sizes: ChunkSizes
    change: str


def fewer_kept_layers(sizes: ChunkSizes) -> Smaller | None:
    """Half as many layers without activation checkpointing; None: there are none."""
    before = sizes.keep_layers
    if before == 0:
        return None
    after = before // 2
    kept = f"the graphs of {_count(after, 'layer')} are kept instead of {before}" if after else "no graphs are kept"
    return Smaller(replace(sizes, keep_layers=after), kept)


def smaller_logits(sizes: ChunkSizes, num_tokens: int, num_entries: int) -> Smaller | None:
    """Half as many tokens in a tile of the head.

    Args:
        sizes: Those of now.
        num_tokens: Counted tokens, which a tile has no more of.
        num_entries: Vocabulary entries of a tile.

    Returns:
        None: a tile is as small as it may be.
    """
    smaller = smaller_chunk_bytes(sizes.logits_bytes, num_tokens, num_entries)
    if smaller is None:
        return None
    before = min(num_tokens, chunk_tokens(num_entries, sizes.logits_bytes))
    change = f"the head takes {_count(chunk_tokens(num_entries, smaller), 'token')} at once instead of {before}"
    return Smaller(replace(sizes, logits_bytes=smaller), change)


def fewer_rows(sizes: ChunkSizes, batches: Sequence[MicroBatch]) -> Smaller | None:
    """The largest micro-batches in two; None: they have one row."""
    before = max(len(batch.input_ids) for batch in batches)
    if before == 1:
        return None
    after = -(-before // 2)
    change = f"micro-batches have {_count(after, 'row')} instead of {before}; the effective batch stays the same"
    return Smaller(replace(sizes, max_rows=after), change)


def split_rows(batch: MicroBatch, max_rows: int) -> list[MicroBatch]:
    """A micro-batch in halves, and these in halves, until none has more rows than asked.

    Args:
        batch: B rows, padded to T tokens; the parts stay padded to T, so that their numbers are the same.
        max_rows: At least 1.

    Returns:
        The parts in the order of their rows: views; of B rows two with ceil(B / 2) and floor(B / 2), and so on.
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
        )
        parts += split_rows(half, max_rows)
    return parts


class Retry:
    """Repeats parts of a step that memory was too small for, and remembers the chunk sizes that fitted.

    Args:
        sizes: Those to begin with.
        on_oom: adapt; or stop: nothing is ever repeated.
        say: Receives a sentence about each change.
        device: Where memory ran out.

    Attributes:
        adapts: Whether something may be repeated.
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
        """Run a part of a step, again and again as long as memory runs out and chunks can be smaller.

        Args:
            part: May be run again after it failed: it changes nothing but what a repetition sets anew.
            where: The part and the step; continues "ran out in".
            smaller: The chunk sizes to try next; None: there are none that would help.
            shrink: Cuts what is in memory between the parts to new sizes.

        Returns:
            What the part returns.
        """
        while True:
            try:
                return part()
            except Exception as error:
                found = smaller() if self.adapts and lacks_memory(error) else None
                if found is None:
                    raise
                place = where()
                # What the part had made is alive in its frames, and would be during the repetition.
                clear_frames(error.__traceback__)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            self.sizes = found.sizes
            shrink(found.sizes)
            self._say(f"Memory ran out in {place}: from here on {found.change}.")


def silent(sentence: str) -> None:
    """Says nothing to anybody."""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
