"""Loading weights: every dtype, shards, tied copies, damage; the store shares nothing with its file."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines import load_parts
from sophia_galore.errors import ModelError
from sophia_galore.weights.files import load_store
from sophia_galore.weights.store import WeightStore
from tiny import FAMILIES, tiny_model, write_tiny_model

CPU = torch.device("cpu")
SHAPES = {"a.weight": torch.Size([4, 3]), "a.b.weight": torch.Size([3]), "ab.weight": torch.Size([2])}


def make_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in SHAPES.items()}


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32, tied_head: str | None = None) -> WeightStore:
    return load_store(folder, SHAPES, tied_head=tied_head, dtype=dtype, device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_each_weight_is_the_files_rounded_once(source: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = make_tensors(source)
    store = load(write(tmp_path, tensors), dtype)
    assert [name for name, _ in store.tensors().items()] == list(SHAPES), "in the model's order, not the file's"
    for name, weight in store.tensors().items():
        assert weight.dtype == dtype and weight.is_contiguous()
        assert torch.equal(weight, tensors[name].to(dtype))
    assert sum(weight.nbytes for _, weight in store.tensors().items()) == dtype.itemsize * (12 + 3 + 2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back_bit_by_bit(family: str, tied: bool, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", family, tied=tied)
    _, store = load_parts(folder)
    expected = dict(tiny_model(family, tied=tied).named_parameters())
    assert {name for name, _ in store.tensors().items()} == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in store.tensors().items())


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_does_not_change_with_the_store(source: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    """Memory that is mapped from a file must not be what training writes to, nor stay mapped under it."""
    folder = write(tmp_path, make_tensors(source))
    before = (folder / "model.safetensors").read_bytes()
    store = load(folder, dtype)
    kept = {name: weight.clone() for name, weight in store.tensors().items()}
    (folder / "model.safetensors").write_bytes(bytes(len(before)))
    assert all(torch.equal(weight, kept[name]) for name, weight in store.tensors().items())
    (folder / "model.safetensors").write_bytes(before)
    store = load(folder, dtype)
    for _, weight in store.tensors().items():
        weight.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("extra", [None, "optimizer.safetensors", "consolidated.safetensors"])
def test_shards_are_read_by_their_index(extra: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder, max_shard_size="100KB")
    shards = list(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and not (folder / "model.safetensors").exists()
    if extra:
        save_file({"what else lies there": torch.ones(1)}, folder / extra)
    _, store = load_parts(folder)
    assert all(torch.equal(store[name].first, weight) for name, weight in tiny_model().named_parameters())


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder, max_shard_size="100KB")
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        load_parts(folder)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_a_broken_index_is_named(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index\.json"):
        load_parts(folder)


def test_a_second_copy_of_the_tied_head_is_left_out(tmp_path: Path) -> None:
    tensors = {**make_tensors(), "head.weight": torch.ones(9, 9), "layer.0.rotary_emb.inv_freq": torch.ones(2)}
    folder = write(tmp_path, tensors)
    assert [name for name, _ in load(folder, tied_head="head.weight").items()] == list(SHAPES)
    with pytest.raises(ModelError, match=r"head\.weight, which this architecture does not have"):
        load(folder)


def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name == "ab.weight"}


DAMAGE: list[tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = [
    (without, "lacks 2 weights, the first is a.weight"),
    (lambda tensors: {**tensors, "more": torch.ones(1)}, "holds more"),
    (lambda tensors: {**tensors, "ab.weight": torch.ones(3)}, "ab.weight has shape (3,), config.json says (2,)"),
    (lambda tensors: {**tensors, "a.weight": torch.ones(3, 4)}, "a.weight has shape (3, 4)"),
    (lambda tensors: {**tensors, "ab.weight": torch.tensor([1.0, torch.nan])}, "ab.weight holds values"),
    (lambda tensors: {**tensors, "ab.weight": torch.tensor([1.0, -torch.inf])}, "not finite"),
    # Larger than any float32, so it is infinite only in the store.
    (lambda tensors: {**tensors, "ab.weight": torch.tensor([1e300, 1.0], dtype=torch.float64)}, "not finite"),
]


@pytest.mark.parametrize(("damage", "cause"), DAMAGE, ids=[cause for _, cause in DAMAGE])
def test_what_does_not_fit_is_named(
    damage: Callable[[dict[str, Tensor]], dict[str, Tensor]], cause: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        load(write(tmp_path, damage(make_tensors())))
    assert cause in caught.value.cause
    assert str(tmp_path) in caught.value.cause
    assert caught.value.remedy


@pytest.mark.parametrize("how", ["cut", "header", "empty", "missing"])
def test_a_damaged_file_is_named(how: str, tmp_path: Path) -> None:
    path = write(tmp_path, make_tensors()) / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-1], "header": b"\xff" * 16 + data[16:], "empty": b"", "missing": b""}[how])
    if how == "missing":
        path.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors") as caught:
        load(tmp_path)
    assert caught.value.remedy


def test_names_below_a_module() -> None:
    store = WeightStore(make_tensors())
    for module, names in {"a": ["weight", "b.weight"], "a.b": ["weight"], "c": []}.items():
        with store.borrow(module) as borrowed:
            assert list(borrowed.values_of(module, torch.float32)) == names


@pytest.mark.parametrize(("dtype", "shares"), [(torch.float32, True), (torch.bfloat16, False)])
def test_materialising_copies_only_to_convert(dtype: torch.dtype, shares: bool) -> None:
    store = WeightStore(make_tensors())
    stored = store["a.weight"].values(torch.float32)
    with store.borrow("a.weight") as borrowed:
        values = borrowed["a.weight"].values(dtype)
    assert values.dtype == dtype and (values.data_ptr() == stored.data_ptr()) is shares
    assert torch.equal(values, stored.to(dtype))


def test_nothing_decoded_outlives_its_use() -> None:
    store = WeightStore(make_tensors())
    with store.borrow("a") as borrowed:
        values = borrowed.values_of("a", torch.bfloat16)
        seen = [weakref.ref(value) for value in values.values()]
        del values
        assert not any(ref() is not None for ref in seen)
    with pytest.raises(KeyError):
        borrowed["a.weight"]
    with store.borrow_rows("a.weight", slice(0, 1), torch.bfloat16) as lent:
        row = weakref.ref(lent[0])
    assert row() is None


def test_index_and_single_file_the_single_file_wins(tmp_path: Path) -> None:
    """As in transformers."""
    folder = write(tmp_path, make_tensors())
    index: dict[str, Any] = {"weight_map": dict.fromkeys(SHAPES, "nowhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load(folder)["a.weight"].first, load_file(folder / "model.safetensors")["a.weight"])
