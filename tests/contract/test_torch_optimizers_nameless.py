"""Parameters without names, as the Trainer, Lightning and accelerate hand them over, and in other people's order."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainingArguments

import sophia_galore
from small_net import assert_same, loss_of, make_net, train, weights
from sophia_galore import Apollo, GaLore, Sophia
from sophia_galore.errors import ArgumentError, CheckpointError
from tiny import tiny_model

CLASSES: dict[str, Callable[..., Any]] = {
    "galore": lambda params, **more: GaLore(params, lr=1e-2, rank=6, update_proj_gap=3, state_bits=8, **more),
    "galore-random": lambda params, **more: GaLore(params, lr=1e-2, rank=6, subspace="random", **more),
    "apollo": lambda params, **more: Apollo(params, lr=1e-2, rank=6, update_proj_gap=3, **more),
    "apollo-mini": lambda params, **more: Apollo(params, lr=1e-2, mini=True, **more),
    "sophia": lambda params, **more: Sophia(params, lr=1e-3, state_bits=16, **more),
}
classes = pytest.mark.parametrize("kind", CLASSES)
# Ways in which the same parameters come without names, in the same order.
WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "generator": lambda net: net.parameters(),
    "list": lambda net: list(net.parameters()),
    "tuple": lambda net: tuple(net.parameters()),
    "values": lambda net: dict(net.named_parameters()).values(),
    "ParameterList": lambda net: nn.ParameterList(net.parameters()),
    "filter": lambda net: filter(lambda param: param.requires_grad, net.parameters()),
    "one group": lambda net: [{"params": net.parameters()}],
    "groups": lambda net: [{"params": param} for param in net.parameters()],
    "an empty group between": lambda net: [{"params": part} for part in ([], list(net.parameters()), [])],
}


def started(kind: str, params: Callable[[nn.Module], Any] = WAYS["generator"], **more: Any) -> tuple[nn.Module, Any]:
    net = make_net()
    optimizer = CLASSES[kind](params(net), **more)
    if optimizer.curved_parameters():
        sophia_galore.watch(optimizer, net)
    return net, optimizer


def on_disk(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@classes
def test_learns_and_goes_on_by_position(kind: str) -> None:
    net, optimizer = started(kind)
    losses = train(net, optimizer, range(1, 4))
    other, fresh = started(kind)
    other.load_state_dict(net.state_dict())
    fresh.load_state_dict(on_disk(optimizer.state_dict()))
    assert train(other, fresh, range(4, 7)) == train(net, optimizer, range(4, 7))
    assert_same(weights(other), weights(net))
    assert loss_of(net, 1).item() < losses[0]
    assert optimizer.param_groups[0]["param_names"][:2] == ["parameter 0", "parameter 1"]


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_be_given(way: str) -> None:
    (net, optimizer), (twin, other) = started("galore"), started("galore", WAYS[way])
    train(net, optimizer, range(1, 3))
    train(twin, other, range(1, 3))
    names = [name for group in other.param_groups for name in group["param_names"]]
    assert names == [f"parameter {place}" for place in range(len(names))]
    # A gap's refreshes are spread over the matrices of all groups, so these are the same bits.
    assert_same(weights(net), weights(twin))


@classes
def test_copies_and_pickles(kind: str) -> None:
    net, optimizer = started(kind)
    train(net, optimizer, range(1, 3))
    twins = [copy.deepcopy((net, optimizer))[1], pickle.loads(pickle.dumps(optimizer))]
    for one in (optimizer, *twins):
        for param in one.named_parameters().values():
            param.grad = torch.ones_like(param)
        one.step()
    for twin in twins:
        assert_same(twin.named_parameters(), optimizer.named_parameters())


def test_a_later_group_counts_on() -> None:
    net = make_net()
    optimizer = CLASSES["galore"](net.fall.parameters())
    optimizer.add_param_group({"params": net.rise.parameters(), "lr": 1e-3})
    assert list(optimizer.named_parameters()) == ["parameter 0", "parameter 1", "parameter 2"]
    with pytest.raises(ArgumentError, match="with names and others without"):
        optimizer.add_param_group({"params": net.norm.named_parameters()})
    with pytest.raises(ArgumentError, match="the same parameter twice, as parameter 0 and as parameter 3"):
        optimizer.add_param_group({"params": net.fall.parameters()})
    assert len(optimizer.param_groups) == 2
    named = CLASSES["galore"](net.fall.named_parameters())
    with pytest.raises(ArgumentError, match="with names and others without"):
        named.add_param_group({"params": net.norm.parameters()})


@pytest.mark.parametrize("way", [nn.Module.parameters, nn.Module.named_parameters])
def test_groups_of_a_finished_optimizer_make_another(way: Callable[[nn.Module], Any]) -> None:
    """With names, settings and all, as `param_groups` holds them."""
    net = make_net()
    optimizer = GaLore(way(net), lr=1e-2, rank=6, rule="muon", dense_lr=1e-3)
    optimizer.param_groups[0]["lr"] = 5e-3  # by a scheduler
    other = GaLore(optimizer.param_groups, lr=1.0)
    assert other.param_groups == optimizer.param_groups
    other.load_state_dict(optimizer.state_dict())


def test_names_and_positions_are_not_taken_for_each_other() -> None:
    net = make_net()
    by_name, by_position = CLASSES["galore"](net.named_parameters()), CLASSES["galore"](net.parameters())
    for one, other in ((by_name, by_position), (by_position, by_name)):
        with pytest.raises(CheckpointError, match=r"the name of a parameter was(.|\n)*with names or without"):
            one.load_state_dict(other.state_dict())


def test_numbers_of_numpy() -> None:
    net = make_net()
    ours = GaLore(
        net.parameters(), lr=np.float32(1e-2), rank=np.int64(6), betas=[0.9, np.float64(0.99)], seed=np.int64(3)
    )
    ours.param_groups[0]["lr"] = np.float64(5e-3)  # a scheduler's
    train(net, ours, range(1, 3))
    saved = on_disk(ours.state_dict())
    group = saved["param_groups"][0]
    assert (group["rank"], group["lr"], group["seed"]) == (6, 5e-3, 3)
    with pytest.raises(ArgumentError, match="rank="):
        GaLore(net.parameters(), lr=1e-2, rank=np.float64(6))


@pytest.mark.parametrize("kind", ["galore", "apollo"])
def test_update_in_backward(kind: str) -> None:
    (net, optimizer), (twin, other) = started(kind), started(kind)
    with sophia_galore.attach(optimizer, net):
        train(net, optimizer, range(1, 4))
    train(twin, other, range(1, 4))
    assert_same(weights(net), weights(twin))


def rows() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": row, "labels": row} for row in torch.randint(3, 300, (24, 8), generator=draw)]


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    """Of four steps by the Trainer, with a checkpoint after the second."""
    return TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        weight_decay=0.1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        **more,
    )


def test_the_trainer_makes_it_by_class_and_arguments(tmp_path: Path) -> None:
    """Nameless, in two groups with and without decay; what was resumed ends on the same bits."""

    def trainer() -> Trainer:
        settings = {"lr": 1e-2, "rank": 8, "update_proj_gap": 2, "state_bits": 8}
        return Trainer(
            tiny_model(), arguments(tmp_path), train_dataset=rows(), optimizer_cls_and_kwargs=(GaLore, settings)
        )

    whole, resumed = trainer(), trainer()
    start = weights(whole.model)
    whole.train()
    assert [group["weight_decay"] for group in whole.optimizer.param_groups] == [0.1, 0.0]
    assert not torch.equal(start["model.norm.weight"], whole.model.model.norm.weight)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(weights(resumed.model), weights(whole.model))


def test_accelerate(tmp_path: Path) -> None:
    """It gives the state back to the optimizer as it wraps it, and saves and loads it."""
    accelerator = Accelerator(cpu=True)
    net = make_net()
    model, optimizer = accelerator.prepare(net, CLASSES["galore"](net.parameters()))
    train(model, optimizer, range(1, 3))
    accelerator.save_state(str(tmp_path))
    losses = train(model, optimizer, range(3, 5))
    accelerator.load_state(str(tmp_path))
    assert train(model, optimizer, range(3, 5)) == losses


def test_a_compiled_model() -> None:
    """torch.compile renames parameters; by position nothing changes."""
    net, optimizer = started("galore")
    twin = make_net()
    wrapped = torch.compile(twin, backend="eager")
    other = CLASSES["galore"](wrapped.parameters())
    train(net, optimizer, range(1, 3))
    train(wrapped, other, range(1, 3))
    assert_same(weights(net), weights(twin))
    other.load_state_dict(optimizer.state_dict())


def test_the_loop_of_lightning() -> None:
    """`step` with a closure, the optimizer's own class extended, and its `state` walked through."""
    net, optimizer = started("galore")
    twin, other = started("galore")
    wrapped = type("LightningGaLore", (type(optimizer),), {"step": type(optimizer).step})
    optimizer.__class__ = wrapped
    for step in range(1, 4):

        def closure(step: int = step) -> torch.Tensor:
            loss = loss_of(net, step)
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            loss.backward()
            return loss

        optimizer.step(closure=closure)
        train(twin, other, range(step, step + 1))
    assert_same(weights(net), weights(twin))
    for param, entry in optimizer.state.items():  # as it moves states to a device
        optimizer.state[param] = {
            key: value.clone() if torch.is_tensor(value) else value for key, value in entry.items()
        }
    optimizer.zero_grad()
    for one, its in ((net, optimizer), (twin, other)):
        train(one, its, range(4, 6))
    assert_same(weights(net), weights(twin))
