"""The `torch.optim` optimizers: one contract for every variant, in the plain loops that people write."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import sophia_galore
from small_net import (
    VARIANTS,
    apollo,
    assert_same,
    assert_same_entries,
    entries,
    galore,
    loss_of,
    make_net,
    train,
    weights,
)
from sophia_galore.errors import NonFiniteError, StepError
from sophia_galore.numerics.hyper import Hyper
from sophia_galore.numerics.rules import RULES
from sophia_galore.optim.build import apollo_scale
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.optim.spec import ParamSpec, SubspaceSpec

variants = pytest.mark.parametrize("variant", VARIANTS)
formats = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def started(variant: str, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[nn.Module, Any]:
    net = make_net(dtype)
    optimizer = VARIANTS[variant](net, **more)
    if optimizer.curved_parameters():
        sophia_galore.watch(optimizer, net)
    return net, optimizer


@pytest.mark.pairwise
@variants
@pytest.mark.parametrize("state_bits", [32, 16, 8])
@formats
def test_learns_and_continues_from_disk_to_the_bit(
    variant: str, state_bits: int, dtype: torch.dtype, tmp_path: Any
) -> None:
    net, optimizer = started(variant, dtype, state_bits=state_bits)
    losses = train(net, optimizer, range(1, 5))
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    losses += train(net, optimizer, range(5, 9))
    assert loss_of(net, 1).item() < losses[0]
    assert torch.equal(net.idle, torch.ones_like(net.idle))

    other, fresh = started(variant, dtype, state_bits=state_bits)
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    other.load_state_dict(saved["net"])
    fresh.load_state_dict(saved["optimizer"])
    assert train(other, fresh, range(5, 9)) == losses[4:]
    assert_same(weights(other), weights(net))


@variants
def test_a_copy_and_a_pickle_go_on_like_the_original(variant: str) -> None:
    net, optimizer = started(variant)
    train(net, optimizer, range(1, 3))
    twins = [copy.deepcopy((net, optimizer))[1], pickle.loads(pickle.dumps(optimizer))]
    for one in (optimizer, *twins):
        for param in one.named_parameters().values():
            param.grad = torch.ones_like(param)
        one.step()
    for twin in twins:
        assert_same(twin.named_parameters(), optimizer.named_parameters())
        assert twin.num_steps == 3


def expected_specs(net: nn.Module, kind: str) -> list[ParamSpec]:
    """Routes written out by hand: what GaLore and APOLLO project, what they leave to AdamW, and what it gets."""
    specs = []
    projected = [name for name, param in net.named_parameters() if param.ndim == 2 and min(param.shape) > 6]
    for name, param in net.named_parameters():
        shape = tuple(param.shape) or (1,)
        decay = 0.1 if param.ndim > 1 else 0.0
        bits = 8 if param.numel() >= 4096 else 32
        hyper, place = (
            Hyper(*RULES["adamw"].betas),
            projected.index(name) / len(projected) if name in projected else 0.0,
        )
        if name not in projected:
            rate = 0.25 if kind == "galore" else 1.0
            specs.append(ParamSpec(name, shape, rate, decay, hyper, state_bits=bits))
        elif kind == "galore":
            subspace = SubspaceSpec(6, 5, int(place * 5), 0.25, "tracked", transport=True, projection_bits=16)
            specs.append(ParamSpec(name, shape, 1.0, decay, hyper, state_bits=bits, subspace=subspace))
        else:
            scale = apollo_scale(shape, 6)
            subspace = SubspaceSpec(6, 5, int(place * 5), scale, "gaussian", residual="channel")
            specs.append(ParamSpec(name, shape, 1.0, decay, hyper, state_bits=bits, subspace=subspace))
    return specs


@pytest.mark.parametrize("kind", ["galore", "apollo"])
@formats
def test_equals_the_door_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    make = {"galore": galore(), "apollo": apollo()}[kind]
    net, twin = make_net(dtype), make_net(dtype)
    optimizer = make(net, update_proj_gap=5, weight_decay=0.1, state_bits=8, seed=3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    door = ParamOptimizer(expected_specs(twin, kind), seed=3)
    for step in range(1, 8):
        loss_of(twin, step).backward()
        with torch.no_grad():
            for name, param in twin.named_parameters():
                if param.grad is not None:
                    weight, grad = (t.view(t.shape or 1) for t in (param.data, param.grad.float()))
                    door.step_param(name, weight, grad, step=step, factor=optimizer.param_groups[0]["lr"])
        twin.zero_grad()
        train(net, optimizer, range(step, step + 1), scheduler)
    assert_same(weights(net), weights(twin))


def test_rates_and_decays_follow_the_groups() -> None:
    """Schedulers write into groups: rates, and OneCycle betas too; what can't change says so."""
    net, optimizer = started("tracked")
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=10)
    train(net, optimizer, range(1, 4), scheduler)
    beta1 = optimizer.param_groups[0]["betas"]
    assert beta1[0] != 0.9
    group = optimizer.param_groups[0]
    group.update(lr=0.0, weight_decay=0.5)
    before = weights(net)
    train(net, optimizer, range(4, 5))
    assert_same(weights(net), before)
    group["rank"] = 7
    loss_of(net, 1).backward()
    with pytest.raises(StepError, match="rank of a parameter group was changed from 6 to 7"):
        optimizer.step()


def test_groups_have_settings_of_their_own() -> None:
    net = make_net()
    named = dict(net.named_parameters())
    large = [(name, named.pop(name)) for name in ("rise.weight", "fall.weight")]
    groups = [
        {"params": large, "rank": 4, "weight_decay": 0.1, "rule": "muon", "state_bits": 16},
        {"params": iter(named.items()), "lr": 5e-3, "dense_lr": 1e-3},
    ]
    optimizer = sophia_galore.GaLore(groups, lr=1e-2, rank=6)
    assert [group["rank"] for group in optimizer.param_groups] == [4, 6]
    train(net, optimizer, range(1, 3))
    state = entries(optimizer)["rise.weight"]
    assert state["basis"].shape == (64, 4)
    assert state["exp_avg"].dtype == torch.bfloat16
    assert "exp_avg_sq" not in state
    # Alone, the first dense step of AdamW is its rate.
    twin = make_net()
    alone = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0)
    net = make_net()
    ours = sophia_galore.GaLore([{"params": net.named_parameters(), "dense_lr": 1e-3}], lr=1e-2, rank=64)
    train(net, ours, range(1, 2))
    train(twin, alone, range(1, 2))
    assert torch.allclose(net.norm.bias, twin.norm.bias, rtol=1e-5, atol=0)


def test_accumulating_two_halves_equals_one_whole() -> None:
    """To the bit: halves are exact, and two gradients have one sum."""
    (net, optimizer), (twin, other) = started("tracked"), started("tracked")
    for step in range(1, 5):
        ((loss_of(net, step) + loss_of(net, step + 10)) / 2).backward()
        (loss_of(twin, step) / 2).backward()
        (loss_of(twin, step + 10) / 2).backward()
        for one in (optimizer, other):
            one.step()
            one.zero_grad()
    assert_same(weights(net), weights(twin))


def test_step_leaves_gradients_alone_and_clipping_is_seen() -> None:
    net, optimizer = started("fira")
    loss_of(net, 1).backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    assert norm > 1e-3
    grads = {name: param.grad.clone() for name, param in net.named_parameters() if param.grad is not None}
    optimizer.step()
    for name, grad in grads.items():
        assert torch.equal(dict(net.named_parameters())[name].grad, grad), name


def test_closure() -> None:
    (net, optimizer), (twin, other) = started("tracked"), started("tracked")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(net, 1)
        loss.backward()
        return loss

    assert torch.is_tensor(optimizer.step(closure))
    train(twin, other, range(1, 2))
    assert_same(weights(net), weights(twin))


def test_grad_scaler() -> None:
    """A step with an overflow is left out; the others are those without a scaler."""
    (net, optimizer), (twin, other) = started("tracked"), started("tracked")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(1, 4):
        scaler.scale(loss_of(net, step)).backward()
        if step == 2:
            net.rise.weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step != 2:
            train(twin, other, range(step, step + 1))
    assert_same(weights(net), weights(twin))  # a scale that is a power of two changes no bit


def test_torch_hooks_of_steps_and_states_are_called() -> None:
    net, optimizer = started("tracked")
    seen: list[str] = []
    optimizer.register_step_post_hook(lambda *_: seen.append("step"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("after"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    train(net, optimizer, range(1, 2))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["step", "before", "after", "load", "loaded"]


def test_a_parameter_counts_its_own_steps() -> None:
    """What gets its first gradient late, or is frozen for a while, begins and goes on with corrections of its own."""
    net, optimizer = started("tracked")
    net.rise.requires_grad_(False)
    train(net, optimizer, range(1, 4))
    assert entries(optimizer)["rise.weight"].keys() == {"place"}  # what nothing has trained takes no memory
    net.rise.requires_grad_(True)
    train(net, optimizer, range(4, 6))
    steps = {name: entry["step"] for name, entry in entries(optimizer).items()}
    assert (steps["rise.weight"], steps["fall.weight"], steps["idle"]) == (2, 5, 0)


def test_frozen_parameters_may_be_of_any_kind_and_groups_can_be_added() -> None:
    net = make_net()
    net.rise.requires_grad_(False).half()
    optimizer = sophia_galore.GaLore(net.fall.named_parameters(prefix="fall"), lr=1e-2, rank=6)
    optimizer.add_param_group({"params": net.norm.named_parameters(prefix="norm"), "lr": 1e-3})
    net.rise.float()
    train(net, optimizer, range(1, 3))
    assert set(entries(optimizer)) == {"fall.weight", "norm.weight", "norm.bias"}
    assert sophia_galore.GaLore(net.half().requires_grad_(False).named_parameters(), lr=1.0, rank=6).param_groups


@variants
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(variant: str, bad: float) -> None:
    net, optimizer = started(variant)
    train(net, optimizer, range(1, 3))
    before, state = weights(net), entries(optimizer)
    loss_of(net, 3).backward()
    net.head.bias.grad[-1] = bad  # one of the last, when others could have moved
    with pytest.raises(NonFiniteError, match=r"head\.bias is not finite at step 3"):
        optimizer.step()
    assert_same(weights(net), before)
    assert_same_entries(entries(optimizer), state)


def test_state_is_made_where_the_parameter_is() -> None:
    """ "meta" stands for another device, where nothing can be computed; what the host reads stays on the host."""
    net, optimizer = started("adaptive")
    train(net, optimizer, range(1, 3))
    fresh = VARIANTS["adaptive"](make_net().to("meta"))
    fresh.load_state_dict(optimizer.state_dict())
    entry = entries(fresh)["rise.weight"]
    assert {value.device.type for value in entry.values() if torch.is_tensor(value)} == {"meta"}
    assert (entry["step"], entry["next_refresh"]) == (2, entries(optimizer)["rise.weight"]["next_refresh"])


def test_two_optimizers_on_one_parameter_warn_once_while_both_live() -> None:
    net, optimizer = started("tracked")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        train(net, optimizer, range(1, 2))
        second = VARIANTS["tracked"](net)
        assert not seen  # to make one is no mistake yet
        for step in range(2, 5):
            train(net, second, range(step, step + 1))
            train(net, optimizer, range(step, step + 1))
        assert [str(one.message).split(" is stepped by a second")[0] for one in seen] == ["temperature"]
        del second
        gc.collect()
        train(net, VARIANTS["tracked"](make_net()), range(1, 2))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # keeps its optimizer in a cycle
        del optimizer, scheduler
        train(net, VARIANTS["tracked"](net), range(1, 2))
        assert len(seen) == 1


def test_all_matrices_dense_is_said_once() -> None:
    net = make_net()
    with pytest.warns(UserWarning, match="GaLore projects nothing") as seen:
        optimizer = sophia_galore.GaLore(net.named_parameters(), lr=1e-2, rank=128)
    assert len(seen) == 1
    train(net, optimizer, range(1, 3))
    assert "basis" not in entries(optimizer)["rise.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VARIANTS["tracked"](net)


def test_a_group_that_joined_later_keeps_its_place_in_the_gap() -> None:
    """Refreshes are spread by the order of joining, which a new optimizer over all groups at once can't know."""

    def groups(net: nn.Module) -> list[dict[str, Any]]:
        named = list(net.named_parameters())
        return [{"params": [pair for pair in named if ("fall" in pair[0]) == late]} for late in (False, True)]

    net = make_net()
    first, late = groups(net)
    optimizer = sophia_galore.GaLore([first], lr=1e-2, rank=6, update_proj_gap=10)
    optimizer.add_param_group(late)
    train(net, optimizer, range(1, 9))
    other = make_net()
    other.load_state_dict(net.state_dict())
    fresh = sophia_galore.GaLore(groups(other), lr=1e-2, rank=6, update_proj_gap=10)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, range(9, 20))
    train(other, fresh, range(9, 20))
    assert_same(weights(net), weights(other))


@pytest.mark.parametrize("large", [1e16, 3e38])
def test_a_gradient_whose_squares_leave_float32_is_refused(large: float) -> None:
    for variant in VARIANTS:
        net, optimizer = started(variant)
        train(net, optimizer, range(1, 3))
        before = {name: weight.clone() for name, weight in weights(net).items()}
        loss_of(net, 3).backward()
        net.fall.weight.grad[0, 0] = large
        with pytest.raises(NonFiniteError, match=r"fall\.weight"):
            optimizer.step()
        assert_same(before, weights(net))
