"""What a model does to its logits behind the head: a factor, a cap.

Models differ here by a line of code: Granite divides the logits, Cohere multiplies them, Gemma 2 caps them. The form is
found by trying: the base model and the head are replaced, for one call, by modules that return given numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sophia_galore.errors import ModelError

# Double precision; models may compute a part of this in float32.
_TOLERANCE = 1e-6
_HUGE = 1e30


@dataclass(frozen=True)
class LogitForm:
    """The logits as a function of what the head's linear map returns, z: scale * z, or cap * tanh(scale * z / cap).

    Args:
        scale: The factor.
        cap: The cap; None: there is none.
    """

    scale: float = 1.0
    cap: float | None = None

    def of(self, z: Tensor) -> Tensor:
        """Return the logits, of the same shape."""
        return self.scale * z if self.cap is None else self.cap * torch.tanh(self.scale * z / self.cap)


def find_logit_form(model: Any, base: nn.Module, head: nn.Module) -> LogitForm:
    """Find what a model does between its base model and its logits.

    Args:
        model: A Hugging Face causal language model; its parameters may be on the meta device.
        base: The model below the head.
        head: The linear map to the vocabulary.

    Returns:
        The form; that of a head without a bias contains a factor on the head's input as well.

    Raises:
        ModelError: It is neither a factor nor a cap.
    """
    if base is model:
        return LogitForm()  # nothing comes behind it that could be called apart
    hidden = torch.ones(1, 1, 1, dtype=torch.float64)
    tried = torch.tensor([[[-60.0, -5.0, -1.0, 1e-3, 1.0, 5.0, 60.0, _HUGE]]], dtype=torch.float64)
    with _answering(base, _BaseOutput(hidden)), _answering(head, tried) as seen:
        try:
            logits = model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False).logits.double()
        except Exception:  # whatever a model's code says if another part of it is called than is thought
            logits = torch.empty(0)
    # On its way into the head, the one of `hidden` has become a factor; more numbers are not from `base`.
    factor = float(seen[-1]) if seen and seen[-1].shape == hidden.shape else 0.0
    has_bias = getattr(head, "bias", None) is not None
    if logits.shape == tried.shape and factor > 0 and not (has_bias and factor != 1):
        form = _through(logits.flatten().tolist())
        if form and torch.allclose(form.of(tried[..., :-1]), logits[..., :-1], rtol=_TOLERANCE, atol=0):
            return LogitForm(_tidy(form.scale * factor), None if form.cap is None else _tidy(form.cap))
    raise ModelError(
        f"What {type(model).__name__} does to its logits behind the head is neither a factor nor a cap, so its loss "
        "can't be computed in parts.",
        "Take another model.",
    )


def _through(logits: list[float]) -> LogitForm | None:
    """Return the form that gives these logits for 1 (the fourth from the end) and for a huge number (the last)."""
    of_one, largest = logits[-4], abs(logits[-1])
    if not math.isfinite(largest) or largest > _HUGE / 1e9:
        return LogitForm(of_one)
    return LogitForm(largest * math.atanh(of_one / largest), largest) if 0 < of_one < largest else None


def _tidy(number: float) -> float:
    """Return a number without the noise of its last bits: what a configuration says has few digits."""
    return float(f"{number:.12g}")


class _BaseOutput:
    """The base model's output as far as heads read it; what else there may be is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: int | slice) -> Any:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _answering(module: nn.Module, answer: Any) -> Iterator[list[Tensor]]:
    """Let a module return an answer inside the context; yields what it is called with."""
    seen: list[Tensor] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.extend(args[:1])
        return answer

    vars(module)["forward"] = forward
    try:
        yield seen
    finally:
        del vars(module)["forward"]
