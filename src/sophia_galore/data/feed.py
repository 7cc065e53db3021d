"""Batch examples for the steps of a run: which rows, in which order, in which micro-batches.

There is no state: the micro-batches of any step can be computed at any time, so a resumed run continues exactly where
it stopped. A row is one example or, if packed, several side by side. Packing is done once per run, so that every epoch
has the same number of steps; the rows are shuffled again in each epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from sophia_galore.config import RunConfig
from sophia_galore.data.batches import MicroBatch, collate
from sophia_galore.data.example import Example
from sophia_galore.data.order import epoch_order, grouped_order
from sophia_galore.data.packing import Rows, pack
from sophia_galore.data.token_rows import lengths_of

Arrangement = Literal["shuffled", "grouped", "packed"]

# Number of steps searched for the largest one: a longer search takes seconds and finds little more.
_MOST_STEPS = 20_000


@dataclass(frozen=True, eq=False)
class Feed:
    """The micro-batches of a run or of its evaluation.

    Args:
        examples: The examples.
        rows: For each row, the indices of its examples.
        arrangement: shuffled; grouped: rows of similar length share a micro-batch; or packed.
        batch_size: Rows in a micro-batch.
        accumulation: Micro-batches in a step.
        seed: The run's seed.
        pad_id: The token id to pad with.
    """

    examples: Sequence[Example]
    rows: Rows
    arrangement: Arrangement
    batch_size: int
    accumulation: int
    seed: int
    pad_id: int

    @classmethod
    def of(cls, config: RunConfig, examples: Sequence[Example], pad_id: int = 0) -> Feed:
        """Make the feed that a configuration describes.

        Args:
            config: The configuration.
            examples: Training or evaluation examples, none longer than `training.max_length`.
            pad_id: The token id to pad with.
        """
        training, data = config.training, config.data
        lengths = lengths_of(examples)
        rows = pack(lengths, training.max_length, training.seed) if data.packing else one_each(len(lengths))
        return cls(
            examples,
            rows,
            "packed" if data.packing else "grouped" if data.group_by_length else "shuffled",
            training.batch_size,
            training.gradient_accumulation_steps,
            training.seed,
            pad_id,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps in one epoch. The last one may be smaller; no row is left out."""
        return -(-len(self.rows) // (self.batch_size * self.accumulation))

    def step(self, number: int) -> list[MicroBatch]:
        """Return the micro-batches of one optimizer step.

        Args:
            number: The step, from 1.

        Returns:
            At most `accumulation` micro-batches; fewer, and a smaller last one, in an epoch's last step.
        """
        epoch, index = divmod(number - 1, self.steps_per_epoch)
        size = self.batch_size * self.accumulation
        return self._batches(self.order(epoch)[index * size : (index + 1) * size])

    def order(self, epoch: int) -> Sequence[int]:
        """Return the indices of the rows in the order of an epoch.

        Args:
            epoch: The epoch, from 0.
        """
        if self.arrangement == "grouped":
            return grouped_order(self._lengths, self.batch_size, self.seed, epoch)
        return epoch_order(len(self.rows), self.seed, epoch)

    def longest_first(self) -> list[MicroBatch]:
        """Return all rows once for evaluation, sorted by length so that there is little padding.

        Returns:
            Micro-batches, the longest first: if memory is too small, this shows at once.
        """
        return self._batches(sorted(range(len(self.rows)), key=lambda row: -self._lengths[row]))

    def largest_step(self, num_steps: int) -> list[MicroBatch]:
        """Return the micro-batches of the step with the most tokens, including padding.

        Among equal steps, it is the one with the longest examples, since the cost of attention grows with the square.

        Args:
            num_steps: Number of optimizer steps of the run; only the first 20,000 are searched.
        """
        size = self.batch_size * self.accumulation
        largest: tuple[int, int] = (0, 0)
        chosen: Sequence[int] = (0,)
        order: Sequence[int] = ()
        for number in range(min(num_steps, _MOST_STEPS)):
            epoch, index = divmod(number, self.steps_per_epoch)
            if index == 0:
                order = self.order(epoch)
            rows = order[index * size : (index + 1) * size]
            found = (self._places(rows), sum(self._squares[row] for row in rows))
            if found > largest:
                largest, chosen = found, rows
        return self._batches(chosen)

    def largest_window(self) -> list[MicroBatch]:
        """Return micro-batches that are at least as large as those of any optimizer step.

        The longest rows are distributed so that each micro-batch gets one before any gets a second: padding is largest
        if every micro-batch has a long row. If there are fewer rows than a step takes, none is repeated. Packed rows
        have almost equal lengths, so those with the longest examples are taken and padded to the longest row.

        Returns:
            As many micro-batches as the largest step has, the one with the longest example first.
        """
        size = self.batch_size * self.accumulation
        if self.arrangement == "packed":
            hardest = sorted(range(len(self.rows)), key=lambda row: -self._squares[row])[:size]
            return self._batches(hardest, width=max(self._lengths))
        longest = sorted(range(len(self.rows)), key=lambda row: -self._lengths[row])[:size]
        num_batches = -(-len(longest) // self.batch_size)
        more, others = longest[num_batches:], self.batch_size - 1
        return [
            self._collate([first, *more[number * others : (number + 1) * others]])
            for number, first in enumerate(longest[:num_batches])
        ]

    @property
    def fill(self) -> float:
        """Fraction of tokens in the first epoch's micro-batches, from 0 to 1; the rest is padding."""
        return sum(self._lengths) / max(1, self._places(self.order(0)))

    def shuffled(self) -> Feed:
        """Return the same examples without packing or grouping."""
        return replace(self, rows=one_each(len(self.examples)), arrangement="shuffled")

    @cached_property
    def _lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        lengths = lengths_of(self.examples)
        return tuple(sum(lengths[number] for number in row) for row in self.rows)

    @cached_property
    def _squares(self) -> list[int]:
        """For each row the sum of its examples' squared lengths."""
        lengths = lengths_of(self.examples)
        return [sum(lengths[number] ** 2 for number in row) for row in self.rows]

    def _places(self, rows: Sequence[int]) -> int:
        """Return the number of tokens in the micro-batches of some rows, including padding."""
        lengths = [self._lengths[row] for row in rows]
        parts = (lengths[start : start + self.batch_size] for start in range(0, len(lengths), self.batch_size))
        return sum(len(part) * max(part) for part in parts)

    def _batches(self, rows: Sequence[int], width: int = 0) -> list[MicroBatch]:
        size = self.batch_size
        return [self._collate(rows[start : start + size], width) for start in range(0, len(rows), size)]

    def _collate(self, rows: Sequence[int], width: int = 0) -> MicroBatch:
        return collate([[self.examples[number] for number in self.rows[row]] for row in rows], self.pad_id, width=width)


def one_each(num_examples: int) -> Rows:
    """Return rows of one example each."""
    return tuple((number,) for number in range(num_examples))
