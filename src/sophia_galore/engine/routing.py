"""How tokens are dealt to experts in one optimizer step, and the loss that keeps it even.

The auxiliary loss is that of the Switch Transformer (Fedus et al., arXiv 2101.03961, equations 4 to 6) as transformers
computes it over all layers: E sum_e f_e P_e, where f_e is the share of tokens whose likeliest experts include e, and
P_e its mean probability. Here both are means over the whole effective batch. The shares f are counts, so they are known
after forward, and the gradient with respect to a layer's probabilities is E f / rows: each layer adds its part in its
own backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sophia_galore.engine.capture import LayerCall
from sophia_galore.engine.reducer import Reducer
from sophia_galore.model.architecture import Architecture, Router


@dataclass(frozen=True)
class RoutingSummary:
    """How a step dealt tokens to experts.

    Args:
        tokens_per_expert: For each expert, the tokens that went to it, summed over the layers.
        largest_share: The largest share of a layer's choices that fell on one expert.
        num_idle: Experts of all layers without a token.
        entropy: Mean entropy of the router's probabilities, in nats.
        aux_loss: The auxiliary loss, times its coefficient; None: the model asks for none.
    """

    tokens_per_expert: tuple[int, ...]
    largest_share: float
    num_idle: int
    entropy: float
    aux_loss: float | None


class Routing:
    """The choices of a step's routers.

    Args:
        architecture: The model.
    """

    def __init__(self, architecture: Architecture) -> None:
        self._routers, self._balance = architecture.routers, architecture.balance
        # By layer: for each micro-batch, choices, top choices by probability, summed probabilities (all (E,)), summed
        # entropies and rows (both scalars).
        self._seen: dict[int, list[tuple[Tensor, Tensor, Tensor, float, int]]] = {}
        self._choices: dict[int, Tensor] = {}
        self._is_alone = True
        self.prob_grad: Tensor | None = None
        self.summary: RoutingSummary | None = None

    def begin(self, index: int) -> None:
        """Begin the forward of a layer; what an earlier attempt saw is forgotten."""
        self._seen[index] = []

    @contextmanager
    def watching(self, index: int) -> Iterator[list[Any]]:
        """Yield a list that receives what the layer's router returns inside the context."""
        router, outputs = self._routers[index], list[Any]()
        if router is None:
            yield outputs
            return
        handle = router.module.register_forward_hook(lambda module, args, out: outputs.append(out))
        try:
            yield outputs
        finally:
            handle.remove()

    @torch.no_grad()
    def see(self, index: int, call: LayerCall, outputs: Sequence[Any]) -> None:
        """Count the choices of a layer for one micro-batch."""
        router = self._routers[index]
        if router is None or not outputs:
            return
        logits, chosen = _rows(router, call, outputs)
        probs = logits.float().softmax(-1)
        likeliest = probs.topk(router.num_chosen, -1).indices
        entropy = -(probs * probs.clamp_min(1e-30).log()).sum()
        counts = [_counts(each, router.num_experts) for each in (likeliest if chosen is None else chosen, likeliest)]
        self._seen[index].append((counts[0], counts[1], probs.sum(0).double(), float(entropy), len(probs)))

    def summed_probs(self, index: int, call: LayerCall, outputs: Sequence[Any]) -> Tensor | None:
        """Return the sum of a layer's probabilities over the tokens of a micro-batch, (E,), with its graph."""
        router = self._routers[index]
        if router is None or not outputs or self._balance == 0:
            return None
        return _rows(router, call, outputs)[0].float().softmax(-1).sum(0)

    def finish(self, reducer: Reducer) -> None:
        """Sum over layers and processes, after the forward of the last layer."""
        self._is_alone = reducer.is_alone
        layers = [index for index, router in enumerate(self._routers) if router is not None]
        sizes = [router.num_experts for router in self._routers if router is not None]
        flat: list[float] = []
        for index in layers:
            flat += [value for column in range(3) for value in self._sum(index, column).tolist()]
            flat += [sum(each[3] for each in self._seen[index]), float(sum(each[4] for each in self._seen[index]))]
        values = iter(reducer.totals(flat))
        tops, probs, entropy, rows, largest = torch.zeros(()), torch.zeros(()), 0.0, 0.0, 0.0
        total = torch.zeros(max(sizes), dtype=torch.float64)
        for index, size in zip(layers, sizes, strict=True):
            chosen, likeliest, summed = (
                torch.tensor([next(values) for _ in range(size)], dtype=torch.float64) for _ in range(3)
            )
            entropy += next(values)
            rows += next(values)
            self._choices[index] = chosen
            total[:size] += chosen
            tops, probs = tops + likeliest, probs + summed
            largest = max(largest, float(chosen.max() / chosen.sum().clamp_min(1)))
        rows = max(rows, 1.0)
        aux = None
        if self._balance:
            # All layers have as many experts where transformers has this loss.
            self.prob_grad = (self._balance * len(tops) * tops / rows / rows).float()
            aux = float(self._balance * len(tops) * (tops / rows * probs / rows).sum())
        idle = sum(int((chosen == 0).sum()) for chosen in self._choices.values())
        self.summary = RoutingSummary(tuple(int(count) for count in total), largest, idle, entropy / rows, aux)
        self._seen.clear()

    def rests(self, index: int, name: str) -> bool:
        """Return whether an expert without a gradient in this process has no token in any other either.

        Args:
            index: The layer.
            name: Name of one of the expert's weights.
        """
        if self._is_alone or index not in self._choices:
            return True
        return float(self._choices[index][int(name.rpartition(".")[2])]) == 0

    def _sum(self, index: int, column: int) -> Tensor:
        found: list[Tensor] = [each[column] for each in self._seen[index]]  # type: ignore[misc]
        router = self._routers[index]
        assert router is not None
        return torch.stack(found).sum(0).cpu() if found else torch.zeros(router.num_experts, dtype=torch.float64)


def _rows(router: Router, call: LayerCall, outputs: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """Return the logits (N, E) and the chosen experts (N, k) of all tokens but padding; None if these are not given."""
    logits = torch.cat([router.logits(out).flatten(0, -2) for out in outputs])
    choices = [router.choices(out) for out in outputs]
    given = [each.flatten(0, -2) for each in choices if each is not None]
    chosen = torch.cat(given) if len(given) == len(choices) else None
    if call.real is None or call.alone:
        return logits, chosen
    return logits[call.real], None if chosen is None else chosen[call.real]


def _counts(chosen: Tensor, num_experts: int) -> Tensor:
    return torch.bincount(chosen.flatten().clamp(max=num_experts), minlength=num_experts)[:num_experts].double()
