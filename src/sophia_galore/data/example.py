"""Training examples: token ids with a loss mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenised text. Stored as small tensors: 5 bytes per token, instead of about 100 as lists of ints.

    Attributes:
        input_ids: Token ids, (T,) int32.
        counted: Which tokens count in the loss, (T,) bool. The first one never does, since no token precedes it.
        where: Location of the record, for error messages.
    """

    input_ids: Tensor
    counted: Tensor
    where: str

    @classmethod
    def of(cls, input_ids: list[int], counted: list[bool], where: str) -> Example:
        """Build an example from lists of length T.

        Args:
            input_ids: Token ids.
            counted: Which tokens count; the first is set to False.
            where: Location of the record, for error messages.
        """
        mask = torch.tensor(counted, dtype=torch.bool)
        mask[:1] = False
        return cls(torch.tensor(input_ids, dtype=torch.int32), mask, where)

    @property
    def num_tokens(self) -> int:
        """Number of tokens T."""
        return self.input_ids.numel()

    @property
    def num_counted(self) -> int:
        """Number of counted tokens, which are the targets in the loss."""
        return int(self.counted.sum())


def describe(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Split the text of an example where the mask changes, to show what is learned.

    Args:
        example: The example.
        tokenizer: The tokenizer that made it.

    Returns:
        Pairs of text (special tokens written out) and whether it counts, in order.
    """
    ids, counted = example.input_ids.tolist(), example.counted.tolist()
    ends = [i for i in range(1, len(ids)) if counted[i] != counted[i - 1]] + [len(ids)]
    segments: list[tuple[str, bool]] = []
    before = ""
    for end in ends:
        # The difference of two prefixes: decoding a middle part alone loses its leading space in some tokenizers.
        text = str(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        segments.append((text[len(before) :], counted[end - 1]))
        before = text
    return segments
