"""The update in backward: the same bits as `step()`, and what can't be had with it is refused."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sophia_galore
from small_net import VARIANTS, assert_same, loss_of, make_net, train, weights
from sophia_galore.errors import ArgumentError, NonFiniteError, StepError
from tiny import tiny_model


def started(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[nn.Module, Any]:
    net = make_net(dtype)
    chosen = {"lr": 1e-2, "rank": 6, "update_proj_gap": 3, **settings}
    return net, sophia_galore.GaLore(net.named_parameters(), **chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", ["none", "fira"])
def test_equals_step_to_the_bit_and_can_be_removed(dtype: torch.dtype, residual: str) -> None:
    (net, optimizer), (twin, other) = (started(dtype, residual=residual, state_bits=8) for _ in range(2))
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(one, 1e-2, total_steps=10) for one in (optimizer, other)]
    with sophia_galore.attach(optimizer, net):
        for step in range(1, 5):
            before = weights(net)
            loss_of(net, step).backward()
            assert all(param.grad is None for param in net.parameters())
            assert not torch.equal(net.rise.weight, before["rise.weight"])
            after = weights(net)
            optimizer.step()
            optimizer.zero_grad()
            schedulers[0].step()
            assert_same(weights(net), after)
            train(twin, other, range(step, step + 1), schedulers[1])
            assert_same(weights(net), weights(twin))
    train(net, optimizer, range(5, 8), schedulers[0])
    train(twin, other, range(5, 8), schedulers[1])
    assert_same(weights(net), weights(twin))
    assert optimizer.num_steps == other.num_steps == 7


def test_a_closure_steps_in_backward() -> None:
    (net, optimizer), (twin, other) = started(), started()
    handle = sophia_galore.attach(optimizer, net)

    def closure() -> Tensor:
        loss = loss_of(net, 1)
        loss.backward()
        return loss

    optimizer.step(closure)
    handle.remove()
    handle.remove()  # twice does no harm
    train(twin, other, range(1, 2))
    assert_same(weights(net), weights(twin))


def test_clips_each_parameter_by_itself() -> None:
    (net, optimizer), (twin, other) = started(), started()
    with sophia_galore.attach(optimizer, net, max_grad_norm=1e-2):
        train(net, optimizer, range(1, 3))
    for step in (1, 2):
        loss_of(twin, step).backward()
        for param in twin.parameters():
            if param.grad is not None and float(param.grad.norm()) > 1e-2:
                param.grad.mul_(1e-2 / float(torch.linalg.vector_norm(param.grad)))
        other.step()
        other.zero_grad()
    assert_same(weights(net), weights(twin))


def test_a_second_backward_is_refused_before_any_weight_moves_twice() -> None:
    net, optimizer = started()
    with sophia_galore.attach(optimizer, net):
        loss_of(net, 1).backward()
        after = weights(net)
        with pytest.raises(StepError, match=r"second gradient before optimizer\.step\(\)(.|\n)*gradient_accumulation"):
            loss_of(net, 2).backward()
        assert_same(weights(net), after)
        optimizer.step()
        optimizer.zero_grad()
        train(net, optimizer, range(2, 3))


class Shared(nn.Module):
    """One weight in two checkpointed segments."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 12)
        self.shared = nn.Linear(12, 12)
        self._use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = checkpoint(self.shared, x, use_reentrant=self._use_reentrant)
        return x.square().mean()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_shared_weights_under_checkpointing(use_reentrant: bool) -> None:
    """Reentrant checkpointing runs a backward of its own for each segment, so a shared weight gets two gradients."""
    net, twin = Shared(use_reentrant), Shared(False)
    optimizer = sophia_galore.GaLore(net.named_parameters(), lr=1e-2, rank=4)
    x = torch.randn(5, 12)
    with sophia_galore.attach(optimizer, net):
        if use_reentrant:
            with pytest.raises(StepError, match=r"shared\.(weight|bias) got a second(.|\n)*use_reentrant=False"):
                net(x).backward()
            return
        net(x).backward()
        optimizer.step()
    other = sophia_galore.GaLore(twin.named_parameters(), lr=1e-2, rank=4)
    twin(x).backward()
    other.step()
    assert_same(weights(net), weights(twin))


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_a_tied_model_with_checkpointed_layers(use_reentrant: bool | None) -> None:
    """Embedding and head are one weight outside of the checkpoints: it steps once, when both gradients are in."""
    ids = torch.arange(3, 35).view(2, 16)
    ends = []
    for attached in (True, False):
        model = tiny_model("llama", tied=True).train()
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        optimizer = sophia_galore.GaLore(model.named_parameters(), lr=1e-2, rank=8)
        handle = sophia_galore.attach(optimizer, model) if attached else None
        for _ in range(2):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if handle:
            handle.remove()
        ends.append(weights(model))
    assert_same(*ends)


def test_a_gradient_that_is_not_finite_ends_the_backward() -> None:
    net, optimizer = started()
    with sophia_galore.attach(optimizer, net):
        before = weights(net)
        with pytest.raises(NonFiniteError, match="at step 1"):
            (loss_of(net, 1) * float("inf")).backward()
        # The first gradient that was ready is not finite, so here nothing moved at all.
        assert_same(weights(net), before)
        optimizer.zero_grad()
        optimizer.step()
        train(net, optimizer, range(2, 3))
        assert not torch.equal(net.rise.weight, before["rise.weight"])


def test_what_is_refused() -> None:
    net, optimizer = started()
    with pytest.raises(ArgumentError, match="the update of a SGD"):
        sophia_galore.attach(torch.optim.SGD(net.parameters()), net)
    with pytest.raises(ArgumentError, match="max_grad_norm=-1"):
        sophia_galore.attach(optimizer, net, max_grad_norm=-1)
    with pytest.raises(ArgumentError, match=r"temperature \(and 10 more\) of this GaLore is not in the model"):
        sophia_galore.attach(optimizer, make_net())
    with pytest.raises(ArgumentError, match="A list was given in place of the model"):
        sophia_galore.attach(optimizer, [net])
    for curved in (
        sophia_galore.Sophia(net.named_parameters(), lr=1e-3),
        sophia_galore.GaLore(net.named_parameters(), lr=1e-3, rank=6, rule="sophia"),
    ):
        with pytest.raises(ArgumentError, match="curvature from gradients of all parameters at once"):
            sophia_galore.attach(curved, net)
    second = sophia_galore.GaLore(net.fall.named_parameters(), lr=1e-3, rank=6)
    part = sophia_galore.GaLore(net.rise.named_parameters(), lr=1e-3, rank=6)
    with sophia_galore.attach(part, net):
        with pytest.raises(ArgumentError, match="This GaLore is attached already"):
            sophia_galore.attach(part, net)
        with pytest.raises(ArgumentError, match="Another optimizer is attached to this model"):
            sophia_galore.attach(second, net)
    with sophia_galore.attach(second, net):
        pass


def test_nothing_is_kept_alive() -> None:
    net, optimizer = started()
    handle = sophia_galore.attach(optimizer, net)
    train(net, optimizer, range(1, 2))
    gone = weakref.ref(optimizer)
    handle.remove()
    del net, optimizer, handle
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "sophia" not in name])
@pytest.mark.parametrize("state_bits", [32, 16, 8])
def test_every_variant_steps_in_backward_as_in_step(variant: str, state_bits: int) -> None:
    plain, attached = make_net(torch.bfloat16), make_net(torch.bfloat16)
    train(plain, VARIANTS[variant](plain, state_bits=state_bits), range(1, 6))
    optimizer = VARIANTS[variant](attached, state_bits=state_bits)
    with sophia_galore.attach(optimizer, attached):
        train(attached, optimizer, range(1, 6))
    assert_same(weights(plain), weights(attached))


def test_a_parameter_that_was_frozen_when_attached_is_named() -> None:
    net = make_net()
    net.rise.weight.requires_grad_(False)
    optimizer = sophia_galore.GaLore(net.named_parameters(), lr=1e-2, rank=6)
    handle = sophia_galore.attach(optimizer, net)
    train(net, optimizer, range(1, 2))
    net.rise.weight.requires_grad_(True)
    loss_of(net, 2).backward()
    with pytest.raises(StepError, match=r"rise\.weight has a gradient that nothing used"):
        optimizer.step()
    handle.remove()
    sophia_galore.attach(optimizer, net)
    optimizer.zero_grad()
    train(net, optimizer, range(3, 5))
