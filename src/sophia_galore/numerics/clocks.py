"""Exponential variables from which labels are sampled: a pure function of seed, purpose, token and vocabulary entry.

Of independent exponential variables with the rates exp(z_j), the smallest one is number j with the probability
softmax(z)_j. It has the largest z_j - log(e_j), where e_j is exponential at rate 1. Since e_j depends on nothing but
its token and its entry, the label is the same however tokens and vocabulary are divided, into chunks or over processes.

A word of 64 bits is the exclusive or of a hash of the token and a hash of the entry (`splitmix.py`), mixed by two
multiplications. Its upper 23 bits are the uniform number behind the exponential one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sophia_galore.numerics.random import key
from sophia_galore.numerics.row_blocks import first_few
from sophia_galore.numerics.splitmix import hash_, shifted, signed

_MIX = ((32, 0xD6E8FEB86659FD93), (32, 0xD6E8FEB86659FD93))
# With one bit more, adding a half could give 1, whose exponential is 0: it would always be the first.
_BITS = 23
# Words that exist at once: they stay in the processor's cache.
_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Clocks:
    """The exponential variables of the counted tokens of an effective batch.

    Args:
        seed: The run's seed.
        purpose: What they are for, such as "sampled labels" and the step.
        first: Number of counted tokens before these, in other processes.
    """

    seed: int
    purpose: tuple[str | int, ...]
    first: int = 0

    def sample(self, logits: Tensor, tokens: slice, entries: slice) -> tuple[Tensor, Tensor]:
        """Find the entry whose clock rings first for each token, among some entries of the vocabulary.

        Args:
            logits: (t, v) float32, of these tokens and entries.
            tokens: The tokens, a slice of this process's counted tokens.
            entries: The entries, a slice of the vocabulary.

        Returns:
            (t,) float32, minus the logarithm of the time at which it rings; and (t,) int64, the entry's place in the
            slice. The token's label is the entry with the largest value over all slices of the vocabulary.
        """
        device, (num_tokens, num_entries) = logits.device, logits.shape
        of_tokens = self._hashes("token", self.first + tokens.start, num_tokens, device)[:, None]
        of_entries = self._hashes("entry", entries.start, num_entries, device)[None]
        value = torch.empty(num_tokens, dtype=torch.float32, device=device)
        place = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        at_once = max(1, _AT_ONCE // num_entries)
        for start in first_few(range(0, num_tokens, at_once)):
            rows = slice(start, start + at_once)
            # A uniform number in (0, 1), never at its ends: its exponential is finite and not zero.
            uniform = of_tokens[rows] ^ of_entries
            _mix(uniform)
            times = uniform.bitwise_right_shift_(64 - _BITS).bitwise_and_((1 << _BITS) - 1).float()
            del uniform
            times.add_(0.5).mul_(2.0**-_BITS).log_().neg_()
            torch.max(times.log_().neg_().add_(logits[rows]), 1, out=(value[rows], place[rows]))
        return value, place

    def _hashes(self, what: str, start: int, count: int, device: torch.device) -> Tensor:
        """Return a hash of each number from start on, (count,) int64."""
        words = torch.arange(start, start + count, dtype=torch.int64, device=device)
        return hash_(words, key(self.seed, *self.purpose, what))


def _mix(words: Tensor) -> None:
    for shift, factor in _MIX:
        words.mul_(signed(factor)).bitwise_xor_(shifted(words, shift))
