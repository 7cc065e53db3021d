"""Mixtures of experts: the balancing loss and its gradients against transformers', and what a step counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engines import make_engine, take_step
from sophia_galore.data.batches import MicroBatch, collate
from sophia_galore.model.experts import run_one_by_one, separate_experts
from sophia_galore.model.find_parts import find_architecture
from sophia_galore.weights.plain import PlainWeight
from sophia_galore.weights.store import WeightStore
from tiny import examples_of, tiny_model

# Relative error of a parameter's gradient, as in test_gradients.py; over four families the worst seen is 6.7e-7.
TOLERANCE = 2e-6
LENGTHS = (11, 5, 17, 8)
COEFFICIENT = 0.5


def batches(*groups: tuple[int, ...]) -> list[MicroBatch]:
    examples = examples_of(LENGTHS)
    return [collate([[examples[number]] for number in group], pad_id=2) for group in groups]


@pytest.mark.parametrize("keep_layers", [0, 3])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_the_balancing_loss_is_exact_over_the_effective_batch(family: str, keep_layers: int) -> None:
    """transformers sees all examples at once, the engine in micro-batches of different shapes, some padded."""
    model = tiny_model(family, output_router_logits=True, router_aux_loss_coef=COEFFICIENT).train()
    (batch,) = batches((0, 1, 2, 3))
    out = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_router_logits=True, use_cache=False
    )
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
    (loss + COEFFICIENT * out.aux_loss).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    run_one_by_one(model.config)
    separate_experts(model)
    architecture = find_architecture(model)
    store = WeightStore({name: PlainWeight(parameter.detach()) for name, parameter in model.named_parameters()})
    found: dict[str, Tensor] = {}
    engine = make_engine(architecture, store, keep_layers=keep_layers)
    result = take_step(engine, batches((0,), (1, 3), (2,)), found.update, step=1)
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    assert result.routing is not None
    assert result.routing.aux_loss == pytest.approx(COEFFICIENT * float(out.aux_loss.detach()), rel=1e-6)
    num_tokens, config = sum(LENGTHS), model.config
    assert sum(result.routing.tokens_per_expert) == num_tokens * config.num_experts_per_tok * config.num_hidden_layers
    for name, grad in expected.items():
        ours = (
            torch.stack([found.get(f"{name}.{number}", torch.zeros_like(part)) for number, part in enumerate(grad)])
            if name in architecture.expert_tensors
            else found[name]
        )
        assert float((ours - grad).norm()) <= TOLERANCE * float(grad.norm()), name


def test_without_the_configurations_word_there_is_no_balancing_loss() -> None:
    model = tiny_model("qwen3_moe").train()
    run_one_by_one(model.config)
    separate_experts(model)
    architecture = find_architecture(model)
    store = WeightStore({name: PlainWeight(parameter.detach()) for name, parameter in model.named_parameters()})
    result = take_step(make_engine(architecture, store), batches((0, 1)), lambda grads: None, step=1)
    assert result.routing is not None and result.routing.aux_loss is None
    assert result.routing.entropy > 0
