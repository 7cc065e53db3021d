"""What the engine hands on in a step: from forward to backward, and from backward to the stepper."""

from __future__ import annotations

from dataclasses import dataclass

from sophia_galore.engine.activations import StepActivations, StepRequest
from sophia_galore.engine.heads import Heads
from sophia_galore.engine.layer_graph import Gradients
from sophia_galore.engine.routing import RoutingSummary
from sophia_galore.weights.store import Borrowed


@dataclass(frozen=True)
class StepResult:
    """The loss and the token counts of one step.

    Args:
        loss: The objective's loss over the counted tokens of the effective batch, in all processes; for cross-entropy
            the mean, in nats.
        num_tokens: Tokens of the effective batch, without padding.
        num_counted: Tokens whose loss counts.
        routing: How tokens were dealt to experts; None: there are none.
    """

    loss: float
    num_tokens: int
    num_counted: int
    routing: RoutingSummary | None = None


@dataclass(frozen=True)
class ForwardPass:
    """The result of `LayerwiseEngine.forward`, from which `backward` continues.

    Args:
        result: The loss and the token counts.
        request: The settings of the step.
        activations: The kept activations.
        head: The head, which still has to form a tied weight's gradient.
        gradients: The gradients of the norm and of an untied head.
    """

    result: StepResult
    request: StepRequest
    activations: StepActivations
    head: Heads
    gradients: Gradients


@dataclass(frozen=True)
class FinishedGradients:
    """Gradients over the whole effective batch, with the borrowed weights that they belong to.

    Args:
        weights: The borrowed weights; weights that have a gradient may be written.
        gradients: By the parameter's name. Pop them one by one, so that each is freed as soon as it was used.
        parts: The names of the gradients of each part of the model: a layer, or what is around the layers. Mostly there
            is one part.
    """

    weights: Borrowed
    gradients: Gradients
    parts: tuple[tuple[str, ...], ...]
