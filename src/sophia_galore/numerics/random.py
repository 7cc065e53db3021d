"""Randomness as a function, never a stream.

A draw depends on (seed, purpose) alone: who asks first, how often something else was drawn and
whether the run was resumed can't change it.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def key(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit number that is a pure function of its arguments.

    Args:
        seed: The run's seed.
        purpose: What the randomness is for, such as a parameter's name, the step and "rounding".

    Returns:
        A number in [0, 2**63).
    """
    words = "\x1f".join([str(seed), *(f"{type(word).__name__}:{word}" for word in purpose)])
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *purpose: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a fresh `torch.Generator` whose draws are a pure function of `seed` and `purpose`.

    Args:
        seed: The run's seed.
        purpose: What the randomness is for.
        device: Where the generator draws. CPU and CUDA give different numbers for the same key.

    Returns:
        The seeded generator.
    """
    made = torch.Generator(device=device)
    made.manual_seed(key(seed, *purpose))
    return made


def draw_classes(logits: Tensor, draw: torch.Generator) -> Tensor:
    """One class a row from softmax(logits).

    Args:
        logits: (N, V) float32.
        draw: Where the randomness comes from; on the device of `logits`.

    Returns:
        (N,) int64.
    """
    # The first of V clocks to ring, clock j at rate p_j, is j with probability p_j. Not torch.multinomial: on
    # logits that are not finite it raises (on CUDA it ends the process's context); here the loss tells of them.
    return (logits.softmax(-1) / draw_exponential(logits, draw)).argmax(-1)


def draw_exponential(like: Tensor, draw: torch.Generator) -> Tensor:
    """When clocks ring that do so at rate 1: independent draws from the exponential distribution.

    Args:
        like: Its shape, device and dtype are those of the draws.
        draw: Where the randomness comes from; on the same device.

    Returns:
        Positive numbers.
    """
    # A clock at exactly 0, once in 2^24 draws in float32, would be first however slow its rate is.
    return torch.empty_like(like).exponential_(generator=draw).clamp_min_(2.0**-25)
