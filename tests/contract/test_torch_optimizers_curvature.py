"""`watch`: Sophia's curvature from the logits that pass by, in loops that know nothing of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutput

import sophia_galore
from small_net import assert_same, loss_of, make_batch, make_net, train, weights
from sophia_galore.errors import ArgumentError, NonFiniteError, StepError
from sophia_galore.numerics.random import draw_classes, generator
from tiny import tiny_model


def ids(step: int) -> Tensor:
    return torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(step))


def masked(step: int) -> dict[str, Tensor]:
    """A padded batch whose prompt is no label."""
    tokens, mask = ids(step), torch.ones(2, 12, dtype=torch.long)
    mask[0, 8:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def test_equals_the_hand_made_form_over_two_micro_batches() -> None:
    """Drawn by (seed, step, micro-batch), weighted by their labels, summed, and squared once."""
    model, twin = tiny_model().train(), tiny_model().train()
    optimizer = sophia_galore.Sophia(model.named_parameters(), lr=1e-3, curvature_every=3, seed=7)
    sophia_galore.watch(optimizer, model)
    other = sophia_galore.Sophia(twin.named_parameters(), lr=1e-3, curvature_every=3, seed=7)
    for step in range(1, 6):
        batches = [masked(10 * step), {"input_ids": ids(10 * step + 1), "labels": ids(10 * step + 1)}]
        if step in (1, 4):
            total, count = torch.zeros(()), 0
            for number, batch in enumerate(batches):
                rows = twin(**batch).logits[:, :-1][batch["labels"][:, 1:] != -100]
                draw = generator(7, "sampled labels", step, number)
                total = total + functional.cross_entropy(rows, draw_classes(rows.detach(), draw), reduction="sum")
                count += len(rows)
            (total / count).backward()
            other.observe_curvature(num_samples=count)
        for net, one in ((model, optimizer), (twin, other)):
            for batch in batches:
                (net(**batch).loss / 2).backward()
            assert bool(optimizer.sampled.count) == (net is model and step in (1, 4))
            one.step()
            one.zero_grad()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        # Sums in another order, divided by a small curvature. Worst seen 2.5e-6, at a rate of 1e-3.
        assert torch.allclose(a, b, rtol=0, atol=1e-5), name


class Logits(nn.Module):
    """A causal model that returns what it is told to."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 12)
        self.head = nn.Linear(12, 20)
        self.form = form

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        logits = self.head(self.embed(input_ids))
        return {
            "tensor": logits,
            "dict": {"logits": logits},
            "output": CausalLMOutput(logits=logits),
            "none": CausalLMOutput(loss=logits.mean()),
            "tuple": (logits.mean(), logits),
            "last": logits[:, -1:],
        }[self.form]


def counted(form: str, **inputs: Any) -> int:
    model = Logits(form)
    optimizer = sophia_galore.Sophia(model.named_parameters(), lr=1e-3)
    with sophia_galore.watch(optimizer, model):
        model(torch.ones(2, 5, dtype=torch.long), **inputs)
    return optimizer.sampled.count


LABELS = torch.tensor([[-100, -100, 1, 2, 3], [1, 2, 3, -100, -100]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.mark.parametrize("form", ["tensor", "dict", "output"])
def test_which_positions_count(form: str) -> None:
    assert counted(form) == 10
    assert counted(form, attention_mask=MASK) == 4 + 2
    assert counted(form, attention_mask=MASK, labels=LABELS) == 3 + 2
    assert counted(form, shift_labels=LABELS) == 6
    assert counted(form, labels=torch.full((2, 5), -100)) == 0


def test_rows_of_logits_without_time() -> None:
    net = make_net().train()
    optimizer = sophia_galore.Sophia(net.named_parameters(), lr=1e-3)
    sophia_galore.watch(optimizer, net)
    net(make_batch(1)[0])
    assert optimizer.sampled.count == 16
    assert "idle" not in optimizer.sampled.sums


@pytest.mark.parametrize(("form", "message"), [("none", "has none"), ("tuple", "has none")])
def test_an_output_without_logits(form: str, message: str) -> None:
    with pytest.raises(StepError, match=message):
        counted(form)


def test_logits_of_other_positions() -> None:
    with pytest.raises(StepError, match=r"logits are for \(2, 1\) positions(.|\n)*logits_to_keep"):
        counted("last", labels=LABELS)


def test_looks_only_when_a_step_comes_for_which_it_is_due() -> None:
    net, twin = make_net(), make_net()
    optimizer = sophia_galore.Sophia(net.named_parameters(), lr=1e-3, curvature_every=3)
    handle = sophia_galore.watch(optimizer, net)
    net.eval()
    loss_of(net, 1)
    net.train()
    with torch.no_grad():
        loss_of(net, 1)
    assert not optimizer.sampled.count
    seen = []
    for step in range(1, 8):
        loss_of(net, step).backward()
        seen.append(optimizer.sampled.count > 0)
        optimizer.step()
        optimizer.zero_grad()
    assert seen == [True, False, False, True, False, False, True]
    handle.remove()
    loss_of(net, 8).backward()
    optimizer.step()  # the curvature stays
    # The look at the logits changes no gradient of the training itself.
    fresh = make_net()
    with sophia_galore.watch(sophia_galore.Sophia(fresh.named_parameters(), lr=1e-3), fresh):
        loss_of(fresh, 1).backward()
    loss_of(twin, 1).backward()
    for a, b in zip(fresh.parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    model, plain = tiny_model().train(), tiny_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    optimizers = []
    for one in (model, plain):
        optimizer = sophia_galore.Sophia(one.named_parameters(), lr=1e-3)
        sophia_galore.watch(optimizer, one)
        if one is model and use_reentrant:
            with pytest.raises(StepError, match="'use_reentrant': False"):
                one(**masked(1), use_cache=False)
            return
        one(**masked(1), use_cache=False).loss.backward()
        optimizer.step()
        optimizers.append(optimizer)
    assert_same(weights(model), weights(plain))


def test_bad_curvature_changes_nothing() -> None:
    net = make_net()
    optimizer = sophia_galore.Sophia(net.named_parameters(), lr=1e-3)
    sophia_galore.watch(optimizer, net)
    before = weights(net)
    loss_of(net, 1).backward()
    optimizer.sampled.sums["head.bias"][0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"head\.bias"):
        optimizer.step()
    assert_same(weights(net), before)
    assert not any(entry["step"] or entry["curvature"].any() for entry in optimizer.state.values())
    optimizer.zero_grad()
    train(net, optimizer, range(2, 4))  # the next estimate begins anew


def test_by_hand() -> None:
    net = make_net()
    optimizer = sophia_galore.GaLore(net.named_parameters(), lr=1e-3, rank=6, rule="sophia")
    with pytest.raises(ArgumentError, match="num_samples=0"):
        optimizer.observe_curvature(0)
    with pytest.raises(StepError, match="No parameter with the rule 'sophia' has a gradient"):
        optimizer.observe_curvature(16)
    loss_of(net, 1).backward()
    optimizer.observe_curvature(16)
    train(net, optimizer, range(1, 4))
    assert optimizer.state[net.rise.weight]["curvature"].any()
    adamw = sophia_galore.GaLore(net.named_parameters(), lr=1e-3, rank=6)
    loss_of(net, 1).backward()
    with pytest.raises(StepError, match="No parameter with the rule"):
        adamw.observe_curvature(16)


def test_what_is_refused() -> None:
    net = make_net()
    optimizer = sophia_galore.Sophia(net.named_parameters(), lr=1e-3)
    with pytest.raises(ArgumentError, match="A SGD has no curvature"):
        sophia_galore.watch(torch.optim.SGD(net.parameters()), net)
    with pytest.raises(ArgumentError, match="has the rule 'sophia'"):
        sophia_galore.watch(sophia_galore.Apollo(net.named_parameters(), lr=1e-3, mini=True), net)
    with pytest.raises(ArgumentError, match="not in the model"):
        sophia_galore.watch(optimizer, make_net())
    with sophia_galore.watch(optimizer, net), pytest.raises(ArgumentError, match="watched already"):
        sophia_galore.watch(optimizer, net)
    sophia_galore.watch(optimizer, net)
