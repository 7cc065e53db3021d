"""Random numbers as a pure function of seed and purpose.

So a draw does not depend on earlier draws, their order, or whether the run was resumed.
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
        device: Device of the generator. CPU and CUDA give different numbers for the same key.

    Returns:
        The seeded generator.
    """
    made = torch.Generator(device=device)
    made.manual_seed(key(seed, *purpose))
    return made


def draw_classes(logits: Tensor, draw: torch.Generator) -> Tensor:
    """Sample one class per row from softmax(logits).

    Args:
        logits: (N, V) float32.
        draw: The generator; on the device of `logits`.

    Returns:
        (N,) int64.
    """
    # Of exponential variables with rates p_j, the smallest is number j with probability p_j. Not torch.multinomial:
    # it raises if logits are not finite (on CUDA it breaks the process's context); here the loss shows them.
    return (logits.softmax(-1) / draw_exponential(logits, draw)).argmax(-1)


def draw_exponential(like: Tensor, draw: torch.Generator) -> Tensor:
    """Draw independent samples from the exponential distribution with rate 1.

    Args:
        like: Tensor whose shape, device and dtype are used.
        draw: The generator; on the same device.

    Returns:
        Positive numbers.
    """
    # A sample of exactly 0 (once in 2^24 draws in float32) would always be the smallest, whatever its rate.
    return torch.empty_like(like).exponential_(generator=draw).clamp_min_(2.0**-25)
