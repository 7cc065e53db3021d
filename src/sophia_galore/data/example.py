"""What the model trains on: token ids, and which of them count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenised text. Kept as small tensors: five bytes a token, not hundred as lists of ints.

    Attributes:
        input_ids: Token ids, (T,) int32.
        counted: Which tokens the model is to learn to say, (T,) bool. Never the first one, since
            nothing stands before it to predict it from.
        where: The place of the record that it came from.
    """

    input_ids: Tensor
    counted: Tensor
    where: str

    @classmethod
    def of(cls, input_ids: list[int], counted: list[bool], where: str) -> Example:
        """Builds an example from lists.

        Args:
            input_ids: Token ids, T of them.
            counted: Which tokens count, T of them; the first is set to False.
            where: The place of the record.

        Returns:
            The example.
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
        """Number of tokens that count, which is the number of targets in the loss."""
        return int(self.counted.sum())


def describe(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Cuts an example's text where the mask changes, to show what is learned.

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
