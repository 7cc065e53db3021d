"""Gradients where some weights are frozen, against ordinary autograd of a model with the same weights frozen."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contract.running_out import RunsOut
from engines import everything_projected, load_parts, make_engine, take_step
from sophia_galore.engine.layer import Layers
from tiny import FAMILIES, autograd_loss, ragged_batches, tiny_model

# As in test_gradients.py: both sides are float32, and a frozen weight takes part in no other sum.
TOLERANCE = 5e-7

# What is trained -> layers that are gone back through, of three; in a tied model `*embed*` is the head as well.
CASES: dict[str, tuple[list[str], int]] = {
    "the last layer": (["model.layers.2.*"], 1),
    "a layer in the middle": (["model.layers.1.*"], 2),
    "the first layer": (["model.layers.0.*"], 3),
    "some matrices of two layers": (["*.0.mlp.down_proj*", "*.2.self_attn*"], 3),
    "norms": (["*norm*"], 3),
    "the last norm": (["model.norm.weight"], 0),
    "the head": (["lm_head*"], 0),
    "the embedding": (["*embed*"], 3),
    "the embedding and a layer": (["*embed*", "model.layers.1.*"], 3),
    "the head and the last layer": (["lm_head*", "model.layers.2.*"], 1),
    "all": (["*"], 3),
}


def pick(names: list[str], patterns: list[str]) -> set[str]:
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


@pytest.mark.parametrize("keep_layers", [0, 3], ids=["recomputed", "kept"])
@pytest.mark.parametrize(("patterns", "num_active"), CASES.values(), ids=CASES)
def test_gradients_of_what_is_trained_equal_autograd(
    tmp_path: Path, patterns: list[str], num_active: int, keep_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an untied model; layers in and before which nothing is trained are not gone back through."""
    compare(tmp_path, monkeypatch, tiny_model("qwen2", tied=False), patterns, num_active, keep_layers=keep_layers)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("patterns", "num_active"), [(["*embed*"], 3), (["*.1.mlp*", "*norm*"], 3), (["*.2.mlp*"], 1)])
def test_so_it_is_in_tied_models_of_all_families(
    tmp_path: Path, family: str, patterns: list[str], num_active: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(tmp_path, monkeypatch, tiny_model(family, tied=True), patterns, num_active)


def compare(
    folder: Path, monkeypatch: pytest.MonkeyPatch, model: Any, patterns: list[str], num_active: int, **more: Any
) -> None:
    model.save_pretrained(folder)
    named = dict(model.named_parameters())
    trained = pick(list(named), patterns)
    for name, parameter in named.items():
        parameter.requires_grad_(name in trained)
    expected_loss = autograd_loss(model.train(), ragged_batches())
    gone_back: list[int] = []
    backward = Layers.backward
    monkeypatch.setattr(Layers, "backward", lambda self, i, *a, **k: gone_back.append(i) or backward(self, i, *a, **k))
    engine = make_engine(*load_parts(folder), frozen=named.keys() - trained, **more)
    got: dict[str, Tensor] = {}
    result = take_step(engine, ragged_batches(), lambda grads: got.update(grads), step=1)
    assert result.loss == pytest.approx(expected_loss, rel=1e-6)  # float32 sums of some 50 tokens
    assert got.keys() == trained
    for name in trained:
        error = float((got[name] - named[name].grad).norm() / named[name].grad.norm())
        assert error <= TOLERANCE, name
    assert gone_back == list(reversed(range(3)))[:num_active]


def test_no_gradient_is_formed_of_a_frozen_matrix(tmp_path: Path) -> None:
    """Backward of a layer with one trained norm takes fewer products of matrices than with all trained: one each."""
    tiny_model("llama").save_pretrained(tmp_path)
    parts = load_parts(tmp_path)
    matrices = 0

    class Products(RunsOut):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal matrices
            matrices += "aten.mm." in str(func) or "aten.addmm" in str(func)
            return super().__torch_dispatch__(func, types, args, kwargs)

    def products(frozen: set[str]) -> int:
        nonlocal matrices
        matrices, count = 0, Products()
        engine = make_engine(*parts, observer=count, frozen=frozen)
        with count:
            take_step(engine, ragged_batches()[:1], lambda grads: None, step=1)
        return matrices

    names = set(parts[0].parameter_shapes())
    linears = set(parts[0].linear_names())
    all_trained = products(set())
    assert products(linears) == all_trained - len(linears)
    # Two thirds of the work on layers are backward's.
    assert products(names - {"model.norm.weight"}) < all_trained / 2


def test_products_in_place_of_gradients_are_those_of_what_is_trained(tmp_path: Path) -> None:
    tiny_model("llama", tied=False).save_pretrained(tmp_path)
    parts = load_parts(tmp_path)
    projectors = everything_projected(parts[0])
    trained = {"lm_head.weight", "model.layers.1.mlp.up_proj.weight"}
    frozen = parts[0].parameter_shapes().keys() - trained
    asked: list[str] = []

    def projector(name: str) -> Any:
        asked.append(name)
        return projectors.get(name)

    whole: dict[str, Tensor] = {}
    take_step(make_engine(*parts), ragged_batches(), lambda grads: whole.update(grads), step=1)
    got: dict[str, Tensor] = {}
    engine = make_engine(*parts, frozen=frozen)
    take_step(engine, ragged_batches(), lambda grads: got.update(grads), step=1, wants=projector)
    assert set(asked) == got.keys() == trained
    for name in trained:
        assert torch.allclose(got[name], projectors[name].of(whole[name]), rtol=1e-5, atol=1e-7)
