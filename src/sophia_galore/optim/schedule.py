"""The learning rate as a function of the step, with the shapes of Hugging Face's schedules."""

from __future__ import annotations

from collections.abc import Callable

import torch


def schedule(name: str, *, warmup_steps: int, num_steps: int) -> Callable[[int], float]:
    """Return the factor on the peak learning rate as a function of the step.

    The shapes are those of `transformers.get_scheduler`, so a run uses the same rates as a `Trainer` with the same
    settings.

    Args:
        name: A `lr_scheduler_type`, such as "cosine".
        warmup_steps: Steps over which the factor rises from 0 to 1.
        num_steps: Optimizer steps of the whole run.

    Returns:
        A pure function from the step (counted from 1) to the factor.
    """
    from transformers import get_scheduler

    # get_scheduler needs an optimizer, but only its function of the step is used.
    carrier = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    made = get_scheduler(name, carrier, num_warmup_steps=warmup_steps, num_training_steps=num_steps)
    factor = made.lr_lambdas[0]
    return lambda step: float(factor(step - 1))
