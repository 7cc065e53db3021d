"""A model in several files is the model in one file: every format, written, read, refused where a file is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from engines import CPU, open_store
from sophia_galore.errors import ModelError
from sophia_galore.model.export import convert_model, write_model
from sophia_galore.model.hub_push import files_to_push
from sophia_galore.model.quantised import refuse_quantised
from sophia_galore.model.skeleton import build_skeleton, load_model_config
from sophia_galore.model.source_files import read_source_files
from sophia_galore.model.tied_head import head_differs
from sophia_galore.records.files import INT8_FILE, INT8_INDEX, MODEL, MODEL_INDEX
from sophia_galore.weights.deferred import DeferredWeight
from sophia_galore.weights.files import load_store
from sophia_galore.weights.folder import is_int8, weight_files
from sophia_galore.weights.int8 import Int8Format, Int8Weight
from sophia_galore.weights.manifest import check_model_folder
from sophia_galore.weights.plain import DTYPES
from sophia_galore.weights.saved import read_weights
from sophia_galore.weights.store import WeightStore
from tiny import write_tiny_model

FORM = Int8Format(24)
# Smaller than the embedding, so that it has a file of its own; larger than all other weights.
SHARD_BYTES = 60_000
WHOLE = 10**9
FORMATS = ["fp32", "bf16", "fp16", "int8", "deferred"]
EVERY = pytest.mark.parametrize("form", FORMATS)
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def make_store(source: Path, form: str) -> WeightStore:
    """A model in a format; `deferred` is int8 with an update in each matrix that is not in its codes."""
    architecture = build_skeleton(load_model_config(source), CPU)
    shapes = architecture.parameter_shapes()
    packed = form in ("int8", "deferred")
    store = load_store(
        source,
        shapes,
        tied_head="lm_head.weight" if architecture.tied else None,
        dtype=torch.float32 if packed else DTYPES[form],
        device=CPU,
        int8=[name for name, shape in shapes.items() if packed and len(shape) == 2],
        form=FORM,
    )
    draw = torch.Generator().manual_seed(0)
    for name, weight in list(store.items()):
        if form == "deferred" and isinstance(weight, Int8Weight):
            rows, columns = weight.shape
            factors = (torch.randn(rows, 2, generator=draw), torch.randn(2, columns, generator=draw))
            store[name] = with_update(weight, *(factor.mul(0.1).bfloat16() for factor in factors))
    return store


def with_update(weight: Int8Weight, left: Tensor, right: Tensor) -> DeferredWeight:
    return DeferredWeight(weight, torch.tensor([0.5]), lambda: (left, right))


def written(folder: Path, source: Path, store: WeightStore, dtype: torch.dtype | None, shard_bytes: int) -> Path:
    folder.mkdir()
    write_model(folder, store=store, dtype=dtype, source=read_source_files(source), shard_bytes=shard_bytes)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


@EVERY
@TIED
@pytest.mark.parametrize("shard_bytes", [SHARD_BYTES, WHOLE], ids=["sharded", "whole"])
def test_what_is_stored_comes_back(form: str, tied: bool, shard_bytes: int, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source", tied=tied)
    store = make_store(source, form)
    folder = written(tmp_path / "made", source, store, None, shard_bytes)
    check_model_folder(folder)
    assert same(tensors_of(folder), store.tensors()), "as the library reads it"
    assert same(open_store(folder, CPU).tensors(), store.tensors()), "as we read it"
    packed = form in ("int8", "deferred")
    single, index = (INT8_FILE, INT8_INDEX) if packed else (MODEL, MODEL_INDEX)
    assert is_int8(folder) is packed and refuse_quantised(folder) is None and head_differs(folder) is not tied
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if shard_bytes == WHOLE:
        assert shards == [single] and not list(folder.glob("*.index.json"))
    else:
        stem, count = single.removesuffix(".safetensors"), len(shards)
        assert count > 2
        assert shards == [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        content = json.loads((folder / index).read_text())
        assert content["metadata"] == {"total_size": sum(tensor.nbytes for tensor in store.tensors().values())}
        assert content["weight_map"] == {name: path.name for path in weight_files(folder) for name in load_file(path)}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == ({"block_size": "24"} if packed else {"format": "pt"})
    if packed:
        with pytest.raises(OSError, match=r"model\.safetensors"):
            AutoModelForCausalLM.from_pretrained(folder)
        with pytest.raises(ModelError, match="no other program opens"):
            files_to_push(folder)
    else:
        assert {path.name for path in files_to_push(folder)} >= {*shards, *([index] if len(shards) > 1 else [])}


@EVERY
@TIED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_exported_opens_in_transformers(form: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source", tied=tied)
    store = make_store(source, form)
    sharded = written(tmp_path / "sharded", source, store, dtype, SHARD_BYTES)
    whole = written(tmp_path / "whole", source, store, dtype, WHOLE)
    assert (sharded / MODEL_INDEX).is_file() and not (sharded / MODEL).exists()
    assert same(tensors_of(sharded), tensors_of(whole))
    one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (sharded, whole))
    assert one.dtype == dtype and (one.lm_head.weight is one.get_input_embeddings().weight) is tied
    tokens = torch.arange(20)[None]
    assert torch.equal(one(tokens).logits, other(tokens).logits)
    found = dict(one.named_parameters())
    assert all(torch.equal(found[name], weight.values(dtype)) for name, weight in store.items())


@EVERY
@TIED
@pytest.mark.parametrize("target", ["fp32", "bf16", "fp16", "int8", None])
def test_a_conversion_of_shards_is_that_of_the_whole(form: str, tied: bool, target: str | None, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source", tied=tied)
    store = make_store(source, form)
    to = FORM if target == "int8" else DTYPES[target] if target else None
    made: list[dict[str, Tensor]] = []
    for name, before, after in (("whole", WHOLE, WHOLE), ("sharded", SHARD_BYTES, SHARD_BYTES)):
        folder = written(tmp_path / name, source, store, None, before)
        (tmp_path / f"{name} converted").mkdir()
        convert_model(folder, tmp_path / f"{name} converted", to, shard_bytes=after)
        made.append(tensors_of(tmp_path / f"{name} converted"))
    assert same(*made)
    assert len(weight_files(tmp_path / "sharded converted")) > 1
    for _, name, weight in read_weights(tmp_path / "whole converted"):
        expected = store[name]
        if target != "int8":
            dtype = to if isinstance(to, torch.dtype) else expected.dtype
            assert torch.equal(weight.values(dtype), expected.values(dtype))


def test_shards_are_filled_as_the_library_fills_them(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source", tied=False)
    store = make_store(source, "fp32")
    # No weight is larger than a file here; the library would put such a one before the file that is being filled.
    limit = 100_000
    folder = written(tmp_path / "made", source, store, None, limit)
    expected = split_torch_state_dict_into_shards(store.tensors(), max_shard_size=limit)
    index = json.loads((folder / MODEL_INDEX).read_text())
    assert index == {"metadata": expected.metadata, "weight_map": expected.tensor_to_filename}


@pytest.mark.parametrize("limit", [1, 20_000, 60_000])
def test_tensors_of_a_weight_are_in_one_file(limit: int, tmp_path: Path) -> None:
    """Else codes would be read without their scales."""
    source = write_tiny_model(tmp_path / "source")
    folder = written(tmp_path / "made", source, make_store(source, "deferred"), None, limit)
    places = json.loads((folder / INT8_INDEX).read_text())["weight_map"]
    for name, file in places.items():
        for ending in (".scales", ".left", ".right", ".shrink"):
            assert places.get(name + ending, file) == file


@pytest.fixture
def shards(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[list[Path]]:
    source = write_tiny_model(tmp_path / "source")
    yield weight_files(written(tmp_path / "made", source, make_store(source, request.param), None, SHARD_BYTES))


@pytest.mark.parametrize("shards", ["bf16", "int8"], indirect=True)
@pytest.mark.parametrize("how", ["missing", "cut", "no file"])
def test_a_shard_that_is_missing_or_damaged_is_named(how: str, shards: list[Path]) -> None:
    shard = shards[1]
    if how == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1] if how == "cut" else b"?")
    with pytest.raises(ModelError) as checked:
        check_model_folder(shard.parent)
    with pytest.raises(ModelError) as read:
        list(read_weights(shard.parent))
    with pytest.raises(ModelError) as converted:
        (shard.parent / "out").mkdir()
        convert_model(shard.parent, shard.parent / "out", torch.float32)
    for caught in (checked, read, converted):
        assert str(shard) in caught.value.cause and "Copy the folder again" in caught.value.remedy


@pytest.mark.parametrize("shards", ["bf16", "int8"], indirect=True)
@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_a_broken_index_is_named(text: str, shards: list[Path]) -> None:
    folder = shards[0].parent
    index = next(folder.glob("*.index.json"))
    index.write_text(text)
    for ask in (check_model_folder, weight_files):
        with pytest.raises(ModelError, match=r"index\.json"):
            ask(folder)


def test_the_files_of_an_index_may_have_any_names(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    store = make_store(source, "int8")
    folder = written(tmp_path / "made", source, store, None, SHARD_BYTES)
    index = json.loads((folder / INT8_INDEX).read_text())
    for number, path in enumerate(weight_files(folder)):
        path.rename(folder / f"layer{number}.safetensors")
        names = {name: f"layer{number}.safetensors" for name, file in index["weight_map"].items() if file == path.name}
        index["weight_map"] |= names
    (folder / INT8_INDEX).write_text(json.dumps(index))
    check_model_folder(folder)
    assert same(open_store(folder, CPU).tensors(), store.tensors())
