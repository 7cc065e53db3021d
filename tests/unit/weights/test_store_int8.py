"""Weights in eight bits in a store, in files, and in answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from engines import CPU, open_store
from sophia_galore.engine.generate import answer
from sophia_galore.errors import ModelError
from sophia_galore.model.export import convert_model, write_model
from sophia_galore.model.skeleton import build_skeleton, load_model_config, load_tokenizer
from sophia_galore.model.source_files import read_source_files
from sophia_galore.records.files import INT8_FILE
from sophia_galore.weights.deferred import DeferredWeight
from sophia_galore.weights.files import convert, load_store, save_weights
from sophia_galore.weights.int8 import Int8Format, Int8Weight, quantise
from sophia_galore.weights.plain import PlainWeight
from sophia_galore.weights.saved import read_weights
from sophia_galore.weights.store import WeightStore
from tiny import tiny_model, write_tiny_model

FORM = Int8Format(24)


def load(folder: Path, *, form: Int8Format = FORM, skip: str = "", **more: bool) -> WeightStore:
    """A tiny model with its matrices in eight bits, but for those that begin with `skip`."""
    architecture = build_skeleton(load_model_config(folder), CPU)
    shapes = architecture.parameter_shapes()
    matrices = [name for name, shape in shapes.items() if len(shape) == 2 and not (skip and name.startswith(skip))]
    return load_store(folder, shapes, tied_head=None, dtype=torch.float32, device=CPU, int8=matrices, form=form, **more)


def dequantised(store: WeightStore) -> dict[str, Tensor]:
    return {name: weight.values(torch.float32) for name, weight in store.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_matrices_are_rounded_to_nearest_and_the_rest_stays(tmp_path: Path) -> None:
    store = load(write_tiny_model(tmp_path / "model"), skip="model.layers.1.")
    for name, parameter in tiny_model().named_parameters():
        weight = store[name]
        if parameter.ndim == 2 and not name.startswith("model.layers.1."):
            assert isinstance(weight, Int8Weight)
            expected = quantise(parameter.detach(), FORM)
            assert torch.equal(weight.codes, expected.codes) and torch.equal(weight.scales, expected.scales)
        else:
            assert isinstance(weight, PlainWeight) and torch.equal(weight.tensor, parameter)
        assert weight.is_ready(torch.float32) == isinstance(weight, PlainWeight)
    assert store.plain_dtype() == torch.float32


def test_rows_and_whole_weights(tmp_path: Path) -> None:
    store = load(write_tiny_model(tmp_path / "model"))
    whole = dequantised(store)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        for rows in (slice(2, 9), torch.tensor([5, 1, 5])):
            assert torch.equal(store[name][rows].values(torch.float32), whole[name][rows])


def test_codes_and_scales_go_to_a_file_and_back_exactly(tmp_path: Path) -> None:
    store = load(write_tiny_model(tmp_path / "model"))
    save_weights(tmp_path, store)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [INT8_FILE]
    stored = load_file(tmp_path / INT8_FILE)
    assert equal(stored, store.tensors())
    assert stored["model.embed_tokens.weight"].dtype == torch.int8
    assert equal(open_store(tmp_path, CPU).tensors(), stored)


def test_the_same_weights_make_the_same_file(tmp_path: Path) -> None:
    store = load(write_tiny_model(tmp_path / "model"))
    written = set()
    for _ in range(8):
        save_weights(tmp_path, store)
        written.add((tmp_path / INT8_FILE).read_bytes())
    assert len(written) == 1


def test_a_folder_in_eight_bits_is_taken_as_it_is_or_converted(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    (tmp_path / "int8").mkdir()
    convert_model(source, tmp_path / "int8", FORM)
    same, other = load(tmp_path / "int8"), load(tmp_path / "int8", form=Int8Format(0))
    assert equal(same.tensors(), load(source).tensors())
    assert same["model.embed_tokens.weight"].form == FORM  # type: ignore[union-attr]
    values = dequantised(same)
    for name, weight in other.items():
        if isinstance(weight, Int8Weight):
            expected = quantise(values[name], Int8Format(0))
            assert torch.equal(weight.codes, expected.codes)
    plain = load_store(
        tmp_path / "int8",
        build_skeleton(load_model_config(source), CPU).parameter_shapes(),
        tied_head=None,
        dtype=torch.float32,
        device=CPU,
    )
    assert equal(plain.tensors(), values)


def test_transformers_finds_no_weights_rather_than_wrong_ones(tmp_path: Path) -> None:
    (tmp_path / "int8").mkdir()
    convert_model(write_tiny_model(tmp_path / "model"), tmp_path / "int8", FORM)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "int8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_export_is_an_ordinary_model(dtype: torch.dtype, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model", tied=False)
    store = load(source)
    (tmp_path / "out").mkdir()
    write_model(
        tmp_path / "out",
        store=store,
        dtype=dtype,
        source=read_source_files(source),
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == dtype
    found = dict(model.named_parameters())
    assert all(torch.equal(found[name], value.to(dtype)) for name, value in dequantised(store).items())


def test_a_remainder_is_part_of_the_weight_but_not_of_a_run_that_goes_on(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    store, name = load(source), "model.layers.0.mlp.up_proj.weight"
    base = store[name]
    assert isinstance(base, Int8Weight)
    left, right = torch.randn(96, 2).to(torch.bfloat16), torch.randn(2, 64).to(torch.bfloat16)
    store[name] = DeferredWeight(base, torch.tensor([0.5]), lambda: (left, right))
    values = dequantised(store)
    (tmp_path / "saved").mkdir()
    write_model(
        tmp_path / "saved",
        store=store,
        dtype=None,
        source=read_source_files(source),
    )
    assert equal(
        {key: weight.values(torch.float32) for _, key, weight in read_weights(tmp_path / "saved") if key == name},
        {name: values[name]},
    )  # type: ignore[union-attr]
    going_on = load(tmp_path / "saved", without_updates=True)[name]
    assert isinstance(going_on, Int8Weight) and torch.equal(going_on.codes, base.codes)
    anew = load(tmp_path / "saved")[name]
    assert isinstance(anew, Int8Weight)
    scales = anew.scales.float().repeat_interleave(FORM.block, 1)[:, :64]
    assert ((anew.values(torch.float32) - values[name]).abs() <= scales).all()


def test_a_remainder_goes_into_the_codes_without_bias() -> None:
    """It is smaller than a code nearly everywhere, so that nearest would lose it."""
    base = quantise(0.05 * torch.randn(400, 64), Int8Format(64))
    left, right = 1e-5 * torch.ones(400, 2), torch.ones(2, 64)  # 2e-5, where a code is some 1e-3
    folded = DeferredWeight(base, torch.ones(1), lambda: (left, right))
    made = convert(folded, Int8Format(64), CPU)
    assert isinstance(made, Int8Weight) and made.codes.data_ptr() != base.codes.data_ptr()
    moved = made.values(torch.float32) - base.values(torch.float32)
    # 25,600 draws of a code with probability 2 in a hundred: a deviation of its mean of 1.8e-6.
    assert float(moved.mean()) == pytest.approx(2e-5, abs=9e-6)


def test_a_remainder_stays_one_where_a_folder_is_opened(tmp_path: Path) -> None:
    store, name = load(write_tiny_model(tmp_path / "model")), "model.layers.0.mlp.up_proj.weight"
    base = store[name]
    assert isinstance(base, Int8Weight)
    left, right = torch.randn(96, 2).to(torch.bfloat16), torch.randn(2, 64).to(torch.bfloat16)
    store[name] = DeferredWeight(base, torch.tensor([0.5]), lambda: (left, right))
    save_weights(tmp_path, store)
    assert equal(dequantised(open_store(tmp_path, CPU)), dequantised(store))


@pytest.mark.parametrize("how", ["left is missing", "right does not fit", "NaN"])
def test_a_broken_remainder_is_refused(how: str, tmp_path: Path) -> None:
    store, name = load(write_tiny_model(tmp_path / "model")), "model.layers.0.mlp.up_proj.weight"
    base = store[name]
    assert isinstance(base, Int8Weight)
    store[name] = DeferredWeight(base, torch.ones(1), lambda: (torch.ones(96, 2), torch.ones(2, 64)))
    tensors = store.tensors()
    if how == "left is missing":
        del tensors[f"{name}.left"]
    elif how == "right does not fit":
        tensors[f"{name}.right"] = torch.ones(3, 64, dtype=torch.bfloat16)
    else:
        tensors[f"{name}.left"][0, 0] = torch.nan
    save_file(tensors, tmp_path / INT8_FILE, metadata={"block_size": str(FORM.block)})
    with pytest.raises(ModelError, match="remainder"):
        open_store(tmp_path, CPU)


def broken(how: str, tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    if how == "no scales":
        del tensors[f"{name}.scales"]
    elif how == "too few scales":
        tensors[f"{name}.scales"] = tensors[f"{name}.scales"][:, :1].clone()
    elif how == "NaN":
        tensors[f"{name}.scales"][3, 0] = torch.nan
    else:
        tensors[name][0, 0] = -128


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no scales", "scales are not there"),
        ("too few scales", "scales of shape"),
        ("NaN", "not finite"),
        ("a code that is none", "-128"),
    ],
)
def test_codes_without_their_scales_are_refused(how: str, words: str, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    (tmp_path / "int8").mkdir()
    convert_model(source, tmp_path / "int8", FORM)
    path = tmp_path / "int8" / INT8_FILE
    tensors = load_file(path)
    broken(how, tensors)
    save_file(tensors, path, metadata={"format": "pt", "block_size": str(FORM.block)})
    with pytest.raises(ModelError, match=words) as caught:
        load(tmp_path / "int8")
    assert "model.layers.0.mlp.up_proj.weight" in caught.value.cause


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
@pytest.mark.parametrize("tied", [True, False])
def test_answers_are_those_of_the_dequantised_model(family: str, tied: bool, tmp_path: Path) -> None:
    """Token by token the same, decoded one weight at a time; and the skeleton is as it was."""
    folder = write_tiny_model(tmp_path / "model", family, tied=tied)
    architecture = build_skeleton(load_model_config(folder), CPU)
    packed = load(folder)
    plain = WeightStore(dequantised(packed))
    tokenizer = load_tokenizer(folder)
    questions = ["what is the sum of one and two", "so"]
    given = [
        answer(architecture, store, tokenizer, questions, max_new_tokens=8, device=CPU) for store in (packed, plain)
    ]
    assert given[0] == given[1]
    assert all(parameter.is_meta for parameter in architecture.model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in architecture.model.modules())
