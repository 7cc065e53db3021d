"""What the engine does when memory runs out: the part that failed is repeated with less in memory at once.

Fewer kept graphs, smaller tiles of logits, smaller micro-batches: the effective batch and its sums stay the same, so
numbers do up to rounding. What was learned stays, and is said once. Who repeats a part must have changed nothing in it
that lasts: a layer's partial sums are dropped with everything else that the part made.
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
# Makes it so that less is in memory; returns what is different from here on, in words.
Remedy = Callable[[], str]
Made = TypeVar("Made")


@dataclass(frozen=True)
class AtOnce:
    """How much an engine has in memory at once.

    Args:
        keep_layers: Graphs of so many last layers are kept through forward.
        chunk_bytes: Bytes of the float32 logits that are worked on at once; 0: as suits the device.
        most_rows: Rows of the largest micro-batch that is not split; None: none is.
    """

    keep_layers: int
    chunk_bytes: int
    most_rows: int | None = None


def split_rows(batch: MicroBatch, most_rows: int) -> list[MicroBatch]:
    """A micro-batch in halves, and these in halves, until none has more rows than asked.

    Args:
        batch: B rows, padded to T tokens; the parts stay padded to T, so that their numbers are the same.
        most_rows: At least 1.

    Returns:
        The parts in the order of their rows: views; of B rows two with ceil(B / 2) and floor(B / 2), and so on.
    """
    num_rows, length = batch.input_ids.shape
    if num_rows <= most_rows:
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
        parts += split_rows(half, most_rows)
    return parts


class Relief:
    """Repeats parts of a step that memory was too small for, and remembers with how little.

    Args:
        at_once: What is in memory at once in the beginning.
        on_oom: adapt; or stop: nothing is ever repeated.
        say: Is told each change, in a sentence.
        device: Where memory ran out.

    Attributes:
        adapts: Whether something may be repeated.
    """

    def __init__(self, at_once: AtOnce, on_oom: OnOom, say: Callable[[str], None], device: torch.device) -> None:
        self.at_once = at_once
        self.adapts, self._say, self._device = on_oom == "adapt", say, device

    def run(self, where: Callable[[], str], part: Callable[[], Made], remedy: Callable[[], Remedy | None]) -> Made:
        """Run a part of a step, again and again as long as memory runs out and there is a remedy.

        Args:
            where: The part and the step, in words that follow "ran out in".
            part: May be run again after it failed: it changes nothing but what a repetition sets anew.
            remedy: What would take less memory in this part; None: nothing.

        Returns:
            What the part returns.
        """
        while True:
            try:
                return part()
            except Exception as error:
                found = remedy() if self.adapts and lacks_memory(error) else None
                if found is None:
                    raise
                place = where()
                # What the part had made is alive in its frames, and would be during the repetition.
                clear_frames(error.__traceback__)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            self._say(f"Memory ran out in {place}: from here on {found()}.")

    def fewer_graphs(self, drop: Callable[[], None]) -> Remedy | None:
        """Half as many kept graphs.

        Args:
            drop: Drops those that are no longer kept.
        """
        before = self.at_once.keep_layers
        if before == 0:
            return None

        def halve() -> str:
            after = before // 2
            self.at_once = replace(self.at_once, keep_layers=after)
            drop()
            if after == 0:
                return "no graphs are kept"
            return f"the graphs of {_count(after, 'layer')} are kept instead of {before}"

        return halve

    def fewer_logits(self, num_tokens: int, num_words: int, default_bytes: int) -> Remedy | None:
        """Half as many tokens in a tile of the head.

        Args:
            num_tokens: Counted tokens, which a tile has no more of.
            num_words: Words of a tile.
            default_bytes: Bytes of a tile's logits, where none were asked for.
        """
        now = self.at_once.chunk_bytes or default_bytes
        smaller = smaller_chunk_bytes(now, num_tokens, num_words)
        if smaller is None:
            return None

        def halve() -> str:
            self.at_once = replace(self.at_once, chunk_bytes=smaller)
            before = min(num_tokens, chunk_tokens(num_words, now))
            after = chunk_tokens(num_words, smaller)
            return f"the head takes {_count(after, 'token')} at once instead of {before}"

        return halve

    def fewer_rows(self, batches: Sequence[MicroBatch], split: Callable[[int], None]) -> Remedy | None:
        """The largest micro-batches in two.

        Args:
            batches: The micro-batches.
            split: Splits those that have more rows than so many.
        """
        before = max(len(batch.input_ids) for batch in batches)
        if before == 1:
            return None

        def halve() -> str:
            after = -(-before // 2)
            self.at_once = replace(self.at_once, most_rows=after)
            split(after)
            return f"micro-batches have {_count(after, 'row')} instead of {before}; the effective batch stays the same"

        return halve


def silent(sentence: str) -> None:
    """Says nothing to anybody."""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
