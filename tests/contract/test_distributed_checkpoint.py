"""Optimizer states by way of `torch.distributed.checkpoint`: asked for, saved and loaded in every form, to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

import sophia_galore
from processes import in_processes
from small_net import VARIANTS, assert_same, assert_same_entries, entries, loss_of, make_net, train, weights

FORMS: dict[str, dict[str, Any]] = {
    "named": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "full-cpu": {"full_state_dict": True, "cpu_offload": True},
}
variants = pytest.mark.parametrize("variant", VARIANTS)
forms = pytest.mark.parametrize("form", FORMS)
formats = pytest.mark.parametrize("state_bits", [32, 16, 8])


def started(variant: str, num_steps: int, **more: Any) -> tuple[nn.Module, Any]:
    net = make_net()
    optimizer = VARIANTS[variant](net, **more)
    if optimizer.curved_parameters():
        sophia_galore.watch(optimizer, net)
    train(net, optimizer, range(1, 1 + num_steps))
    return net, optimizer


def plain_layout(value: Any) -> bool:
    """Whether there is nothing in it but what distributed checkpoints keep."""
    if isinstance(value, dict):
        return all(plain_layout(one) for one in value.values())
    if isinstance(value, list):
        return all(plain_layout(one) for one in value)
    return value is None or isinstance(value, (Tensor, int, float, str, bool))


@pytest.mark.pairwise
@variants
@forms
@pytest.mark.parametrize("num_steps", [0, 3])
def test_asking_for_the_state_changes_no_bit(variant: str, form: str, num_steps: int) -> None:
    """torch steps on zero gradients where it finds no state: moments moved, and a basis was made from nothing."""
    net, optimizer = started(variant, num_steps)
    before, kept = weights(net), entries(optimizer)
    state = get_optimizer_state_dict(net, optimizer, options=StateDictOptions(**FORMS[form]))
    assert plain_layout(state)
    assert_same(weights(net), before)
    assert_same_entries(entries(optimizer), kept)
    assert optimizer.num_steps == num_steps
    assert all(param.grad is None for param in net.parameters())


@pytest.mark.pairwise
@variants
@forms
@formats
@pytest.mark.parametrize("num_steps", [0, 3])
def test_goes_on_from_a_checkpoint_to_the_bit(
    variant: str, form: str, state_bits: int, num_steps: int, tmp_path: Path
) -> None:
    net, optimizer = started(variant, num_steps, state_bits=state_bits)
    options = StateDictOptions(**FORMS[form])
    model_state, state = get_state_dict(net, optimizer, options=options)
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=tmp_path / "saved", no_dist=True)
    other, fresh = started(variant, 0, state_bits=state_bits)
    model_state, state = get_state_dict(other, fresh, options=options)
    saved = {"model": model_state, "optimizer": state}
    dcp.load(saved, checkpoint_id=tmp_path / "saved", no_dist=True)
    set_state_dict(other, fresh, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options)
    assert_same_entries(entries(fresh), entries(optimizer))
    # With `watch`, the first steps after it show whether the number of steps is right.
    steps = range(num_steps + 1, num_steps + 5)
    assert train(other, fresh, steps) == train(net, optimizer, steps)
    assert_same(weights(other), weights(net))


@forms
def test_what_is_asked_for_is_live_and_what_is_set_is_a_copy(form: str) -> None:
    (net, optimizer), (other, fresh) = started("tracked", 2), started("tracked", 0)
    options = StateDictOptions(**FORMS[form])
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=options))
    set_optimizer_state_dict(other, fresh, saved, options=options)
    kept = entries(fresh)
    train(net, optimizer, range(3, 5))
    assert_same_entries(entries(fresh), kept)
    live = optimizer.state_dict()["state"][0]["exp_avg"]
    assert live is optimizer.state[net.temperature]["exp_avg"]


def test_groups_schedules_and_frozen_parameters() -> None:
    """Two groups, a scheduler's own key in them, and a layer that is frozen: torch leaves out what is frozen."""

    def make() -> tuple[nn.Module, Any, Any]:
        net = make_net()
        net.fall.requires_grad_(False)
        decayed = [pair for pair in net.named_parameters() if pair[1].ndim > 1]
        others = [pair for pair in net.named_parameters() if pair[1].ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 1e-3}]
        optimizer = sophia_galore.GaLore(groups, lr=1e-2, rank=6, update_proj_gap=3)
        return net, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    for form in FORMS:
        options = StateDictOptions(**FORMS[form])
        (net, optimizer, scheduler), (other, fresh, _) = make(), make()
        assert entries(fresh)["fall.weight"].keys() == {"place"}  # what is frozen takes no memory
        train(net, optimizer, range(1, 4), scheduler)
        state = copy.deepcopy(get_state_dict(net, optimizer, options=options))
        set_state_dict(other, fresh, model_state_dict=state[0], optim_state_dict=state[1], options=options)
        assert_same_entries(entries(fresh), entries(optimizer))
        for one in (optimizer, fresh):
            assert [group["lr"] for group in one.param_groups] == [1e-2 / 4, 1e-3 / 4]
            assert [group["initial_lr"] for group in one.param_groups] == [1e-2, 1e-3]
        for one in (net, other):
            one.fall.requires_grad_(True)
        assert train(other, fresh, range(4, 6)) == train(net, optimizer, range(4, 6))


def test_a_state_that_somebody_emptied_begins_anew() -> None:
    (net, optimizer), (twin, other) = started("adaptive", 2), started("adaptive", 0)
    optimizer.state = {}
    twin.load_state_dict(net.state_dict())
    for group in other.param_groups:  # what concerns the whole optimizer stays
        group["num_steps"] = 2
    train(net, optimizer, range(3, 5))
    train(twin, other, range(3, 5))
    assert_same(weights(net), weights(twin))


def as_version_0_5_wrote_it(optimizer: Any) -> dict[str, Any]:
    """By names, with all that concerns the whole optimizer beside the states."""
    group = optimizer.param_groups[0]
    params = optimizer.named_parameters()
    state, places = {}, {}
    for name, param in params.items():
        entry = dict(optimizer.state[param])
        if "place" in entry:
            places[name] = entry.pop("place")
        if step := entry.pop("step"):
            if "next_refresh" in entry:
                counters = [entry.pop("next_refresh"), entry.pop("refresh_gap")]
                entry["next_refresh"] = torch.tensor(counters, dtype=torch.int64)
            state[name] = {"step": step, "tensors": entry}
    keys = ("optimizer", "seed", "curvature_every", "curvature_seen", "num_steps")
    plain = [
        {key: value for key, value in one.items() if key not in keys} | {"params": list(range(len(one["params"])))}
        for one in optimizer.param_groups
    ]
    return {
        "format": 1,
        **{key: group[key] for key in keys},
        "places": places,
        "state": state,
        "shapes": {name: list(param.shape) or [1] for name, param in params.items()},
        "param_groups": plain,
    }


@variants
@formats
def test_states_of_version_0_5_are_loaded(variant: str, state_bits: int) -> None:
    net, optimizer = started(variant, 3, state_bits=state_bits)
    old = copy.deepcopy(as_version_0_5_wrote_it(optimizer))
    other, fresh = started(variant, 0, state_bits=state_bits)
    other.load_state_dict(net.state_dict())
    fresh.load_state_dict(old)
    assert_same_entries(entries(fresh), entries(optimizer))
    assert train(other, fresh, range(4, 6)) == train(net, optimizer, range(4, 6))
    old["shapes"]["rise.weight"] = [80, 65]
    with pytest.raises(sophia_galore.errors.CheckpointError, match=r"shape of rise\.weight was \[80, 65\]"):
        fresh.load_state_dict(old)


@pytest.mark.parametrize("broadcast", [False, True], ids=["each", "broadcast"])
def test_under_ddp(broadcast: bool, tmp_path: Path) -> None:
    """Two processes: asked for, saved together, loaded in every form; each goes on as the undisturbed run does."""
    names = ["tracked", "adaptive", "rule-adafactor", "apollo", "fira"]

    def steps(net: nn.Module, optimizer: Any, numbers: range) -> None:
        for number in numbers:
            loss_of(net, number).backward()
            optimizer.step()
            optimizer.zero_grad()

    def body() -> dict[str, dict[str, Tensor]]:
        ends = {}
        for name in names:
            for form in ("full",) if broadcast else ("named", "flat"):
                inner, twin = make_net(), make_net()
                inner.idle.requires_grad_(False)  # DDP waits for the gradient of all others
                twin.idle.requires_grad_(False)
                net, other = DistributedDataParallel(inner), DistributedDataParallel(twin)
                optimizer, fresh = VARIANTS[name](inner), VARIANTS[name](twin)
                steps(net, optimizer, range(1, 4))
                options = StateDictOptions(**FORMS[form], broadcast_from_rank0=broadcast)
                saved = {"optimizer": get_optimizer_state_dict(net, optimizer, options=options)}
                dcp.save(saved, checkpoint_id=tmp_path / f"{name}-{form}")
                loaded = {"optimizer": get_optimizer_state_dict(other, fresh, options=options)}
                dcp.load(loaded, checkpoint_id=tmp_path / f"{name}-{form}")
                set_optimizer_state_dict(other, fresh, loaded["optimizer"], options=options)
                twin.load_state_dict(inner.state_dict())
                assert_same_entries(entries(fresh), entries(optimizer))
                steps(net, optimizer, range(4, 6))
                steps(other, fresh, range(4, 6))
                assert_same(weights(twin), weights(inner))
                ends[name] = weights(inner)
        return ends

    one, two = in_processes(body, 2, tmp_path / "processes")
    for name in names:
        assert_same(one[name], two[name])
