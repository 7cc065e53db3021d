"""What the `torch.optim` optimizers refuse, and what they say then."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import sophia_galore
from small_net import assert_same, assert_same_entries, entries, loss_of, make_net, train, weights
from sophia_galore import Apollo, GaLore, Sophia
from sophia_galore.errors import ArgumentError, CheckpointError, StepError, UserError


def named() -> list[tuple[str, torch.Tensor]]:
    return list(make_net().named_parameters())


SETTINGS: list[tuple[type, dict[str, Any]]] = [
    *[(GaLore, {"lr": bad}) for bad in (-1e-3, math.nan, math.inf, "1e-3", None, True)],
    *[(GaLore, {"rank": bad}) for bad in (0, -1, 1.5, "8", True, None)],
    *[(GaLore, {"update_proj_gap": bad}) for bad in (0, 2.0, 10**400)],
    *[(GaLore, {"scale": bad}) for bad in (0, -0.25, math.nan, None, 1e300)],
    *[(GaLore, {"betas": bad}) for bad in ((0.9,), (0.9, 1.0), (-0.1, 0.9), 0.9, (0.9, "x"))],
    *[(GaLore, {"rule": bad}) for bad in ("adam", None, 1)],
    *[(GaLore, {"subspace": bad}) for bad in ("SVD", "gaussian")],
    *[(GaLore, {"residual": bad}) for bad in ("channel", True, None)],
    *[(GaLore, {"projection_bits": bad}) for bad in (8, "16", None)],
    *[(GaLore, {"state_bits": bad}) for bad in (4, 0)],
    *[(GaLore, {flag: 1}) for flag in ("moment_transport", "stagger", "adaptive_gap")],
    *[(GaLore, {"eps": bad}) for bad in (0.0, 1e-50)],
    (GaLore, {"weight_decay": -0.1}),
    (GaLore, {"rho": 0.0}),
    (GaLore, {"dense_lr": 0.0}),
    (GaLore, {"curvature_every": 0}),
    (GaLore, {"seed": -1}),
    (Apollo, {"rank": 0}),
    (Apollo, {"mini": 1}),
    (Apollo, {"scale": 0.0}),
    (Sophia, {"betas": (0.9, 1.0)}),
    (Sophia, {"rho": -0.04}),
    (Sophia, {"state_bits": 4}),
]


@pytest.mark.parametrize(("kind", "setting"), SETTINGS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_settings(kind: Callable[..., Any], setting: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(setting))}=") as caught:
        kind(named(), **{"lr": 1e-3, **setting})
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, UserError)


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ArgumentError, match="adaptive_gap looks at"):
        GaLore(named(), lr=1e-3, adaptive_gap=True, subspace="random")
    with pytest.raises(ArgumentError, match="in proportion to lr=0"):
        GaLore(named(), lr=0.0, dense_lr=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [], "given no parameters"),
        (lambda: [{"params": []}, {"params": iter(())}], "given no parameters"),
        (lambda: [{"params": [], "rank": 0}], "rank=0"),
        (lambda: [*named()[:2], nn.Parameter(torch.ones(2))], "with names and others without"),
        (lambda: [{"params": named()[:2]}, {"params": nn.Parameter(torch.ones(2))}], "with names and others without"),
        (lambda: [{"params": nn.Parameter(torch.ones(2))}, {"params": named()[:2]}], "with names and others without"),
        (lambda: [{"params": [nn.Parameter(torch.ones(2))], "param_names": ["v", "w"]}], "2 names for 1 parameters"),
        (lambda: set(make_net().parameters()), "a set in place of parameters"),
        (lambda: [{"params": set(named())}], "a set in place of parameters"),
        (lambda: [{"params": make_net()}], "a Net in place of parameters"),
        (lambda: [{"params": 3}], "an? int in place of parameters"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "a Sequential in place of parameters"),
        (lambda: None, "a NoneType in place of parameters"),
        (lambda: "weights", "a str in place of parameters"),
        (lambda: [(nn.Parameter(torch.ones(2)), "w")], "a tuple in place of a parameter"),
        (lambda: [p := nn.Parameter(torch.ones(2)), p], "the same parameter twice, as parameter 0 and as parameter 1"),
        (lambda: [nn.Parameter(torch.ones(2)), 3], "with names and others without|in place of a parameter"),
        (make_net, "a Net in place"),
        (lambda: dict(named()), "a dict in place"),
        (lambda: nn.Parameter(torch.ones(2)), "a Parameter in place"),
        (lambda: 3, "an? int in place"),
        (lambda: [("w", 3)], "w is not a parameter"),
        (lambda: [("w", nn.Parameter(torch.ones(2)) * 2)], "w is not a parameter"),
        (lambda: ["w"], "a str in place of a parameter"),
        (lambda: [named()[0], {"params": []}], "a dict in place of a parameter"),
        (lambda: [{"params": named(), "fused": True}], "unknown setting 'fused'"),
        (lambda: [{"params": named(), "maximize": True}], "unknown setting 'maximize'"),
        (lambda: [{"rank": 3}], "no 'params'"),
        (lambda: [{"params": named(), "weigth_decay": 0.1}], "unknown setting 'weigth_decay'"),
        (lambda: [("w", nn.Parameter(torch.ones(2))), ("w", nn.Parameter(torch.ones(2)))], "two parameters named w"),
        (lambda: [("v", p := nn.Parameter(torch.ones(2))), ("w", p)], "the same parameter twice, as v and as w"),
        (lambda: [{"params": (n := named())}, {"params": n}], "two parameters named"),
        (lambda: make_net(torch.float16).named_parameters(), "temperature is stored in float16, whose steps would"),
        (lambda: make_net(torch.float16).parameters(), "parameter 0 is stored in float16, whose steps would"),
        (lambda: [nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))], "parameter 0 is stored in complex64; only"),
    ],
)
def test_parameters(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        GaLore(make(), lr=1e-3, rank=6)


def test_a_later_group() -> None:
    net = make_net()
    optimizer = GaLore([{"params": net.fall.named_parameters()}, {"params": []}], lr=1e-3, rank=6)
    train(net, optimizer, range(1, 3))  # one of several groups may be empty
    with pytest.raises(ArgumentError, match="two parameters named weight"):
        optimizer.add_param_group({"params": net.rise.named_parameters()})
    with pytest.raises(ArgumentError, match="a list as a parameter group"):
        optimizer.add_param_group([])
    assert len(optimizer.param_groups) == 2
    optimizer.load_state_dict(optimizer.state_dict())


def test_sparse_gradients() -> None:
    net = nn.Embedding(50, 20, sparse=True)
    optimizer = GaLore(net.named_parameters(), lr=1e-3, rank=6)
    net(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(StepError, match=r"The gradient of weight is sparse(.|\n)*sparse=False"):
        optimizer.step()


def test_values_that_never_came() -> None:
    """Loading made other parameters than those that the optimizer knows; to train nothing would be a silent end."""
    with torch.device("meta"):
        net = make_net()
    optimizer = GaLore(net.parameters(), lr=1e-3, rank=6)
    net.load_state_dict(make_net().state_dict(), assign=True)
    loss_of(net, 1).backward()
    with pytest.raises(StepError, match=r"parameter 0 is on the meta device(.|\n)*after loading the weights"):
        optimizer.step()


@pytest.mark.parametrize("word", ["foreach", "fused", "capturable", "differentiable", "maximize", "amsgrad"])
@pytest.mark.parametrize("kind", [GaLore, Apollo, Sophia])
def test_arguments_of_others(kind: Any, word: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{word}'"):
        kind(named(), lr=1e-3, **{word: True})


def test_a_parameter_that_became_another_kind() -> None:
    net = make_net()
    optimizer = GaLore(net.named_parameters(), lr=1e-3, rank=6)
    net.half()
    net.rise.weight.grad = torch.ones_like(net.rise.weight)
    with pytest.raises(StepError, match=r"rise\.weight is stored in float16"):
        optimizer.step()
    net.float()
    net.rise.weight.grad = None
    net.rise.weight.data = torch.ones(3, 3)
    net.rise.weight.grad = torch.ones(3, 3)
    with pytest.raises(StepError, match=r"rise\.weight has the shape \(3, 3\)"):
        optimizer.step()


@pytest.mark.parametrize("make", [Sophia, lambda p, lr: GaLore(p, lr=lr, rank=6, rule="sophia")], ids=["all", "low"])
def test_sophia_without_a_curvature(make: Callable[..., Any]) -> None:
    net = make_net()
    optimizer = make(net.named_parameters(), lr=1e-3)
    before = weights(net)
    loss_of(net, 1).backward()
    with pytest.raises(StepError, match=r"before this first step\.\n.*watch\(optimizer, model\)"):
        optimizer.step()
    assert_same(weights(net), before)


def test_states_that_do_not_fit() -> None:
    net = make_net()
    optimizer = GaLore(net.named_parameters(), lr=1e-2, rank=6, state_bits=8)
    train(net, optimizer, range(1, 3))
    good, kept = optimizer.state_dict(), entries(optimizer)

    def refused(change: Callable[[dict[str, Any]], Any], message: str) -> None:
        bad = copy.deepcopy(good)
        change(bad)
        with pytest.raises(CheckpointError, match=message):
            optimizer.load_state_dict(bad)
        assert_same_entries(entries(optimizer), kept)

    number = [name for name, _ in net.named_parameters()].index("rise.weight")
    state = {"s": lambda d: d["state"][number]}
    group = {"g": lambda d: d["param_groups"][0]}
    refused(lambda d: d.pop("state"), "no state_dict of a GaLore of sophia_galore")
    refused(lambda d: group["g"](d).pop("num_steps"), "no state_dict of a GaLore of sophia_galore")
    refused(lambda d: group["g"](d).update(optimizer="Apollo"), "optimizer was 'Apollo' and is 'GaLore'")
    refused(lambda d: group["g"](d).update(seed=1), "seed was 1 and is 0")
    refused(lambda d: d["param_groups"].append({}), "number of groups was 2 and is 1")
    refused(lambda d: group["g"](d).update(rank=7), "rank was 7 and is 6")
    refused(lambda d: group["g"](d).update(subspace="svd"), "subspace was 'svd'")
    refused(lambda d: group["g"](d)["param_names"].reverse(), "the name of a parameter was 'idle'|was 'head.bias'")
    refused(lambda d: state["s"](d).pop("basis"), r"state basis of rise\.weight was None")
    refused(lambda d: state["s"](d).update(basis=torch.ones(2, 2)), r"state basis of rise\.weight was \(\(2, 2\)")
    refused(lambda d: state["s"](d).pop("step"), r"state basis of rise\.weight was \(\(64, 6\)(.|\n)*and is None")
    refused(lambda d: group["g"](d).update(param_names=["_orig_mod.x"]), "was '_orig_mod.x'(.|\n)*torch.compile")
    refused(lambda d: d["state"].update({99: {"step": 1, "y": torch.ones(1)}}), "state y of parameter 99")
    with pytest.raises(CheckpointError, match="no state_dict"):
        optimizer.load_state_dict(None)
    with pytest.raises(CheckpointError, match="no state_dict"):
        optimizer.load_state_dict(torch.optim.AdamW(net.parameters()).state_dict())


def test_lazy_names_and_unknown_ones() -> None:
    assert set(sophia_galore.__all__) <= set(dir(sophia_galore))
    with pytest.raises(AttributeError, match="no attribute 'GaLoer'"):
        _ = sophia_galore.GaLoer
